"""What ranks do in the tests of the harness."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from jobs.distributed import init_process_group, shutdown
from jobs.engine import Engine, process
from jobs.own_time import FUNCTIONS
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json
from strategies.errors import PlanInfeasible


def echo(env: RankEnv, word: str) -> dict[str, Any]:
    """Say who I am."""
    return {"rank": env.rank, "word": word, "port": env.master_port, "pid": os.getpid(), "parent": os.getppid()}


def fail(env: RankEnv, rank: int) -> None:
    """Raise on one rank; the others would go on for long."""
    if env.rank == rank:
        print("about to fail")
        raise RuntimeError("on purpose")
    time.sleep(60)


def hang(env: RankEnv) -> None:
    """Never end."""
    time.sleep(600)


def total(env: RankEnv) -> float:
    """Sum of the ranks, through the rendezvous that every gang gets."""
    init_process_group(env, "gloo")
    value = torch.tensor(float(env.rank))
    dist.all_reduce(value)
    shutdown()
    return float(value)


def refusal(env: RankEnv, job: dict[str, Any]) -> str:
    """What the engine says to a plan that it cannot run."""
    try:
        Engine.build(from_json(JobSpec, job), env)
    except PlanInfeasible as error:
        return str(error)
    return ""


def built_slowly(env: RankEnv, job: dict[str, Any], *, late: bool, seconds: float) -> dict[str, Any]:
    """Build an engine where each process group that is made, and each collective, takes so much longer.

    Args:
        env: This rank.
        job: What it trains.
        late: As if a group were connected by its first collective only.
        seconds: That.

    Returns:
        How long it took by part (``built``), and how often: ``made`` groups, ``calls`` of collectives while it was
        built, for how many ``groups``.
    """
    made: list[Any] = []
    calls: list[Any] = []

    def slow(function: Callable[..., Any], count: list[Any]) -> Callable[..., Any]:
        @wraps(function)
        def slowed(*arguments: Any, **options: Any) -> Any:
            time.sleep(seconds)
            values = (*arguments, *options.values())
            count.append(next((v for v in values if isinstance(v, dist.ProcessGroup)), dist.group.WORLD))
            return function(*arguments, **options)

        return slowed

    dist.new_group = slow(dist.new_group, made)
    for name in FUNCTIONS:
        setattr(dist, name, slow(getattr(dist, name), calls))
    process.connects_late = lambda: late
    engine = Engine.build(from_json(JobSpec, job), env)
    found = {"built": engine.built, "made": len(made), "calls": len(calls), "groups": len(set(calls))}
    engine.close()
    return found

"""What ranks do in the tests of the harness."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

from jobs.distributed import init_process_group, shutdown
from jobs.engine import Engine
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

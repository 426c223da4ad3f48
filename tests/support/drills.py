"""Made-up records of rehearsals: who did what, and what the controller's log says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.drill import evidence
from launcher.drill.case import Aim, Case
from launcher.drill.catalogue import named
from launcher.drill.rehearsal import Ended
from launcher.run import EventKind
from launcher.store import RunStore
from tests.support.fakes import tiny_request
from tests.support.runs import T0, put

AIM = Aim(rank=3, node=1, other=0, step=8)
NODES = ["a", "b"]


def case(name: str) -> Case:
    """A fault of the catalogue."""
    found = named(name)
    assert found is not None
    return found


def gathered(name: str, run: RunStore, aim: Aim = AIM, **more: Any) -> evidence.Evidence:
    """The evidence of a fault."""
    return evidence.gather(case(name), aim, Ended(**{"store": run, "exits": (0,), **more}))


def proof(run: RunStore, name: str, at: float, **more: Any) -> None:
    """The record of who did it."""
    run.paths.faults.mkdir(exist_ok=True)
    record = {"fault": name, "time": T0 + at, "done": T0 + at, "attempt": 1} | more
    (run.paths.faults / f"{name}.json").write_text(json.dumps(record))


def metrics(run: RunStore, attempt: int, steps: Sequence[int], at: float, loss: float = 0.1) -> None:
    """Ten steps a second."""
    with open(run.paths.metrics, "a") as file:
        for step in steps:
            line = {"step": step, "attempt": attempt, "time": T0 + at + step * 0.1, "loss": loss * step}
            line |= {"seconds": 0.08, "stall_s": 0.02}
            file.write(json.dumps(line | {"grad_norm": 1.0, "lr": 1e-3}) + "\n")


def begun(folder: Path, name: str = "run") -> RunStore:
    """A run whose controller has started, and that copies its state in memory after every step."""
    request = tiny_request(folder, name=name)
    job = replace(request.job, checkpoint=replace(request.job.checkpoint, memory_every=1))
    store = RunStore.create(replace(request, job=job))
    store.paths.events.unlink()
    put(store, 0, EventKind.RUN_SUBMITTED, epoch=0, request="x")
    put(store, 1, EventKind.CONTROLLER_STARTED, adopted=False, pid=1)
    return store


def attempt(run: RunStore, number: int, at: float, *, first: int = 1, nodes: Sequence[str] = NODES, why: str) -> None:
    """An attempt that trains 0.1 s after it was planned."""
    data: dict[str, Any] = {"plan": run.request().job.plan, "nodes": list(nodes), "resume_from": "", "reason": why}
    put(run, at, EventKind.ATTEMPT_PLANNED, attempt=number, **data, first_step=first)
    put(run, at + 0.1, EventKind.TRAINING_STARTED, attempt=number, step=first)


def fall(run: RunStore, at: float, kind: str, *, rank: int = -1, node: str = "b", last: int = 7) -> None:
    """The first attempt has failed, and its ranks are gone 0.1 s later."""
    where: dict[str, Any] = {"rank": rank, "node": node}
    detail = f"rank {rank} was killed" if rank >= 0 else f"node {node} was lost"
    failure = {"kind": kind, "time": T0 + at, "detail": detail} | where
    put(run, at, EventKind.FAILURE_DETECTED, attempt=1, failure=failure, last_step=last, failed_at=T0 + at)
    put(run, at + 0.1, EventKind.GANG_STOPPED, attempt=1, cause=detail, failure=kind, last_step=last, **where)


def ended(run: RunStore, at: float, number: int = 2, step: int = 20) -> None:
    """The run has succeeded."""
    put(run, at, EventKind.RUN_SUCCEEDED, attempt=number, step=step, weights_digest="w")

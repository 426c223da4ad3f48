"""Run directories made by hand, with a fixed past: what a run of two attempts leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher import build, launch
from launcher.config import compose
from launcher.run import EventKind, RunEvent
from launcher.schema import Config
from launcher.store import RunStore, append_line, dump
from strategies.codec import to_json

T0 = 1_750_000_000.0
BUILT = {"device_s": 0.25, "communicators_s": 0.375, "engine_s": 0.125, "restored_s": 0.0625}
WORDS = ["experiment=quickstart", "tracking=none", "train.steps=20", "faults=[node_kill@node=2,step=13]"]


def configuration(parent: Path, name: str = "demo", words: list[str] = WORDS) -> Config:
    """The settled configuration of the run."""
    return build.settle(compose([*words, f"run.dir={parent}"]), name=name, cwd=parent)


def make_run(parent: Path, name: str = "demo", *, words: list[str] = WORDS) -> RunStore:
    """A run directory as submit leaves it, its first event at :data:`T0`."""
    config = configuration(parent, name, words)
    store = RunStore.create(build.build_request(config, words))
    launch.write_config(store, config, words)
    store.paths.events.unlink()
    put(store, 0.0, EventKind.RUN_SUBMITTED, epoch=0, request=store.request().digest)
    return store


def put(store: RunStore, after_s: float, kind: EventKind, *, epoch: int = 1, attempt: int = 0, **data: Any) -> None:
    """Append an event of a given time."""
    seq = len(store.events()) + 1
    event = RunEvent(seq=seq, time=T0 + after_s, epoch=epoch, attempt=attempt, kind=kind, data=to_json(data))
    append_line(store.paths.events, json.dumps(to_json(event)).encode() + b"\n")


def begin_attempt(
    store: RunStore, number: int, at: float, *, nodes: list[str], step: int, reason: str, **built: Any
) -> None:
    """An attempt from its plan to its first step."""
    plan = store.request().job.plan
    source = str(store.paths.checkpoints / f"step-{step - 1:08d}" / "x.manifest.json") if step > 1 else ""
    data: dict[str, Any] = {"plan": plan, "nodes": nodes, "resume_from": source, "first_step": step, "reason": reason}
    put(store, at, EventKind.ATTEMPT_PLANNED, attempt=number, **data)
    put(store, at + 1, EventKind.RANKS_SPAWNED, attempt=number, ranks=8, resume_from=source)
    put(store, at + 2, EventKind.TRAINING_STARTED, attempt=number, step=step, **built)
    rows = [{"rank": r, "node": nodes[r // 2], "pid": 100 + r, "coordinates": to_json(None)} for r in range(8)]
    store.paths.attempt(number).mkdir(parents=True)
    store.paths.ranks(number).write_bytes(dump(rows))


def add_steps(store: RunStore, attempt: int, first: int, last: int, at: float) -> None:
    """One step per second."""
    for step in range(first, last + 1):
        line = {
            "step": step,
            "loss": 9.0 - step / 4,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "tokens_per_s": 1000.0,
            "attempt": attempt,
            "time": T0 + at + step - first + 1,
        }
        append_line(store.paths.metrics, json.dumps(line).encode() + b"\n")


def fail(store: RunStore, at: float) -> None:
    """The injected fault of :data:`WORDS`, and what follows from it."""
    name = "node_kill.node-2.step-13"
    record = {"id": name, "fault": "node_kill@node=2,step=13", "time": T0 + at, "step": 13, "attempt": 1}
    store.paths.faults.mkdir(exist_ok=True)
    (store.paths.faults / f"{name}.json").write_text(json.dumps(record))
    failure = {"kind": "node_lost", "node": "c", "detail": "node c was lost: the connection was closed"}
    put(store, at + 1, EventKind.FAILURE_DETECTED, attempt=1, failure=failure, last_step=12, failed_at=T0 + at)
    put(store, at + 1.5, EventKind.FAULT_FIRED, attempt=1, fault=name, record=record)
    put(store, at + 1.5, EventKind.GANG_STOPPED, attempt=1, cause=failure["detail"], failure="node_lost", signature="")
    put(store, at + 1.5, EventKind.DECISION, attempt=1, action="restart", reason=failure["detail"], delay_s=0.0)


def recovered_run(parent: Path, name: str = "demo") -> RunStore:
    """A whole run: a node is lost at step 13, the run goes on from step 11 and succeeds at step 20."""
    store = make_run(parent, name)
    put(store, 1.0, EventKind.CONTROLLER_STARTED, host="h", pid=1, adopted=False)
    begin_attempt(store, 1, 2.0, nodes=["a", "b", "c", "d"], step=1, reason="start")
    add_steps(store, 1, 1, 12, 4.0)
    put(store, 14.0, EventKind.CHECKPOINT_COMMITTED, attempt=1, step=10, path="x", bytes=1, stall_s=0.2)
    fail(store, 16.5)
    begin_attempt(store, 2, 18.5, nodes=["a", "b", "e", "d"], step=11, reason="restart", **BUILT)
    add_steps(store, 2, 11, 20, 20.5)
    put(store, 31.0, EventKind.RUN_SUCCEEDED, attempt=2, step=20, weights_digest="d" * 16)
    store.paths.sample.write_text("def main():\n    pass\n")
    return store


def failed_run(parent: Path, name: str = "demo") -> RunStore:
    """A run that gave up after its first attempt; its newest checkpoint is of no step."""
    store = make_run(parent, name)
    begin_attempt(store, 1, 2.0, nodes=["a", "b", "c", "d"], step=1, reason="start")
    add_steps(store, 1, 1, 12, 4.0)
    fail(store, 16.5)
    put(store, 18.0, EventKind.RUN_FAILED, attempt=1, reason="all 0 restarts are used")
    return store

"""The command line as a person uses it: real processes, their output, their exit codes, and what they leave behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.account import INCIDENT_CLASSES, PARTS
from launcher.run import EventKind
from launcher.store import RunStore

PHALANX = Path(sys.executable).parent / "phalanx"
PATIENCE_S = 240.0

TINY = (
    "model.layers=2",
    "model.hidden=32",
    "model.heads=2",
    "model.ffn=64",
    "model.vocab=300",
    "model.seq=16",
    "train.steps=12",
    "checkpoint.every=3",
    "checkpoint.memory_share=0",
    "tracking=none",
    "recovery.backoff_s=0.1",
)
"""A model that trains twelve steps in seconds."""

PROCESSES = ("cluster=process", "cluster.nodes=2", "cluster.slots_per_node=2", "cluster.spares=1")
TP2_PP2 = ("strategy.tp=2", "strategy.pp=2", "strategy.zero_stage=1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Stdout as JSON: with ``--json`` there is nothing else on it."""
        return json.loads(self.out)


def start(*words: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        [str(PHALANX), *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], timeout_s: float = PATIENCE_S) -> Result:
    """Wait for a command; one that does not end is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end within {timeout_s} s\n{out}\n{err}") from None
    return Result(code=process.returncode, out=out, err=err)


def phalanx(*words: str, cwd: Path, env: Mapping[str, str] | None = None) -> Result:
    """Run a command to its end."""
    return end(start(*words, cwd=cwd, env=env))


def corpus(folder: Path) -> str:
    """A small text to train on; returns its override."""
    path = folder / "corpus.txt"
    if not path.exists():
        path.write_text("\n".join(f"def f{i}(x):\n    return x * {i} + {i * i % 97}" for i in range(4000)))
    return f"data.path={path}"


def tiny(folder: Path, name: str, *more: str) -> tuple[str, ...]:
    """Words of a submit of the tiny model on plain processes."""
    fixed = (f"run.dir={folder / 'runs'}", f"run.name={name}", "data=text", corpus(folder))
    return ("submit", *PROCESSES, *TINY, *TP2_PP2, *fixed, *more)


def store(folder: Path, name: str) -> RunStore:
    """The run directory of :func:`tiny`."""
    return RunStore.open(folder / "runs" / name)


def wait_for(holds: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def curve(run: RunStore) -> dict[int, tuple[float, float, float]]:
    """Step -> (loss, gradient norm, learning rate) as the newest attempt computed them."""
    return {int(m["step"]): (m["loss"], m["grad_norm"], m["lr"]) for m in run.metrics()}


def processes_of(run_dir: Path) -> list[tuple[int, str]]:
    """Living processes that belong to a run: its directory is in their environment or their command line."""
    word, found = str(run_dir).encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state not in "ZX" and (word in command or word in environment):
            found.append((int(entry.name), command.replace(b"\0", b" ").decode(errors="replace")[:200]))
    return found


def assert_nothing_left(run_dir: Path) -> None:
    """No process of the run is alive (a moment is allowed for the kernel to take them away)."""
    deadline = time.monotonic() + 15
    while processes_of(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(run_dir) == []


def assert_forked(run: RunStore) -> None:
    """No rank of the run was started as a fresh process: the warm pool of its node was safe to fork from."""
    afresh = [event.data for event in run.events() if event.kind is EventKind.POOL_UNSAFE]
    assert afresh == []


@dataclass(frozen=True, kw_only=True, slots=True)
class Noticed:
    """How soon the controller knew of an injected fault.

    Attributes:
        fault: The fault.
        failed_s: From the fault until what is recorded as the time of the failure.
        known_s: From the fault until the controller wrote that it knows.
    """

    fault: str
    failed_s: float
    known_s: float


def noticed(run: RunStore) -> list[Noticed]:
    """Every fault that fired, with the failure that it was in its attempt; in order of attempts."""
    fired = [event.data["record"] for event in run.events() if event.kind is EventKind.FAULT_FIRED]
    at = {int(record["attempt"]): record for record in fired}
    assert len(at) == len(fired), "each in an attempt of its own"
    return [
        Noticed(
            fault=str(at[event.attempt]["fault"]),
            failed_s=float(event.data["failed_at"]) - float(at[event.attempt]["time"]),
            known_s=event.time - float(at[event.attempt]["time"]),
        )
        for event in run.events()
        if event.kind is EventKind.FAILURE_DETECTED and event.attempt in at
    ]


def slow_step_s(run: RunStore) -> float:
    """The 99th percentile of the run's own steps, with what they waited for copies."""
    took = sorted(line["seconds"] + line["stall_s"] for line in run.metrics())
    return float(took[math.ceil(0.99 * len(took)) - 1])


def kinds(run: RunStore) -> Sequence[str]:
    """Kinds of the run's events, in order."""
    return [event.kind.value for event in run.events()]


def assert_parts_named(run: RunStore, document: Mapping[str, Any]) -> None:
    """Of every incident: how long the old ranks took to go, and what the new ones did until they trained.

    Args:
        run: One that has recovered from all that befell it.
        document: What ``status --json`` says of it.
    """
    told = run.paths.exposition.read_text()
    for part, name in PARTS.items():
        assert f'phalanx_incident_part_seconds{{run="{run.name}",class="{name}",part="{part}"}}' in told
    for one in document["incidents"]:
        known = {part: one[f"{part}_s"] for part in PARTS}
        if not document["attempts"][one["attempt"]]["resume_from"]:  # of the attempt that followed
            assert known.pop("state") is None, "there was nothing to read"
        assert all(seconds > 0 for seconds in known.values()), known
        for name in INCIDENT_CLASSES:
            named = [seconds for part, seconds in known.items() if PARTS[part] == name]
            assert not named or sum(named) <= one[f"{name}_s"] + 1e-6, known

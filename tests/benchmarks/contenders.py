"""Whoever keeps the same ranks alive, behind one face: start it, find its ranks, kill one, see when training goes on.

Everything is timed from outside: the kill by the benchmark's clock, the next step by its ``time`` in ``metrics.jsonl``,
which every contender writes because all run the same loop.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import checkpoint
from jobs.paths import RunPaths
from launcher.embedded import descendants
from launcher.host import process
from launcher.run import EventKind
from launcher.store import RunStore, read_lines
from tests.benchmarks.peers import JOB
from tests.support import cli

ROOT = Path(__file__).resolve().parents[2]
RANKS = 4
PATIENCE_S = 240.0
MODEL = ("model=gpt_tiny", "model.vocab=512", "model.seq=64", "strategy.micro_batch=2")
PLAN = ("strategy.tp=2", "strategy.pp=2", "strategy.zero_stage=1")
EVERY_STEP = "checkpoint.memory_share=0"
"""For phalanx: a copy in memory at every step, whatever it costs where steps are so short."""
OURS = "phalanx"
"""Name of phalanx."""
AT_DEFAULTS = "phalanx, defaults"
"""Name of phalanx where it stands beside itself with a copy at every step."""
PEER_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way to keep ranks alive.

    Attributes:
        name: As the table calls it.
        command: Makes the command that trains in a run directory.
        environment: Variables beside the usual ones.
        ours: It is phalanx: the job comes by the command line, and ranks are found in the run directory.
    """

    name: str
    command: Callable[[Path], Sequence[str]]
    environment: Mapping[str, str]
    ours: bool = False


def words(folder: Path, *, steps: int, every: int, more: Sequence[str] = ()) -> tuple[str, ...]:
    """What is trained: the same for everybody."""
    return (
        *MODEL,
        *PLAN,
        f"train.steps={steps}",
        f"checkpoint.every={every}",
        "tracking=none",
        "data=text",
        cli.corpus(folder),
        f"data.cache={folder / 'cache'}",
        *more,
    )


def phalanx(job: Sequence[str], *where: str, name: str = "") -> Contender:
    """phalanx on a cluster that it starts on this machine."""

    def command(run_dir: Path) -> list[str]:
        place = [f"run.dir={run_dir.parent}", f"run.name={run_dir.name}"]
        return [str(cli.PHALANX), "submit", *where, *job, *place]

    label = name or f"phalanx, {where[0].replace('cluster=', '')}"
    return Contender(name=label, command=command, environment={}, ours=True)


def torchrun(ranks: int = RANKS) -> Contender:
    """torchrun on one machine.

    Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE the store of the rendezvous is used again for every restart: gloo finds
    the addresses of dead ranks in it, connects to them, and all restarts are burnt.
    """

    def command(run_dir: Path) -> list[str]:
        own = ["--standalone", f"--nproc-per-node={ranks}", "--max-restarts=8"]
        return [sys.executable, "-m", "torch.distributed.run", *own, "-m", "tests.benchmarks.peers.loop", str(run_dir)]

    return Contender(name="torchrun", command=command, environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


def module(name: str, module: str, ranks: int = RANKS) -> Contender:
    """A peer that is a module of :mod:`tests.benchmarks.peers`."""

    def command(run_dir: Path) -> list[str]:
        return [sys.executable, "-m", f"tests.benchmarks.peers.{module}", str(run_dir), str(ranks)]

    return Contender(name=name, command=command, environment={})


def job_of(job: Sequence[str], folder: Path) -> dict[str, Any]:
    """The job that phalanx would run, for the peers; prepares the data on the way."""
    dry = cli.phalanx("submit", "--dry-run", "cluster=process", "cluster.nodes=2", *job, cwd=folder)
    assert dry.code == 0, dry.err
    found: dict[str, Any] = dry.document["request"]["job"]
    return found


class Running:
    """A contender at work.

    Args:
        contender: Who.
        run_dir: Its run directory; must not exist.
        job: The job, for peers.
    """

    def __init__(self, contender: Contender, run_dir: Path, job: Mapping[str, Any]) -> None:
        self.contender, self.run_dir, self.paths = contender, run_dir, RunPaths(run_dir)
        if not contender.ours:
            run_dir.mkdir(parents=True)
            (run_dir / JOB).write_text(json.dumps(job))
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.log = run_dir.parent / f"{run_dir.name}.log"
        environment = {**os.environ, **PEER_ENVIRONMENT, "PYTHONPATH": str(ROOT), **contender.environment}
        self.started = time.time()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                list(contender.command(run_dir)),
                cwd=run_dir.parent,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def lines(self, attempt: int) -> list[dict[str, Any]]:
        """The steps of an attempt."""
        return [line for line in read_lines(self.paths.metrics) if line["attempt"] == attempt]

    def wait_for_step(self, step: int, *, attempt: int = 1) -> dict[str, Any]:
        """The first line of an attempt at or after a step."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            for line in self.lines(attempt):
                if line["step"] >= step:
                    return line
            assert self.process.poll() is None, f"{self.contender.name} ended early\n{self.tail()}"
            assert time.monotonic() < deadline, f"{self.contender.name}: no step {step} of {attempt}\n{self.tail()}"
            time.sleep(0.005)

    def pid_of(self, rank: int, attempt: int) -> int:
        """Process id of a rank."""
        if self.contender.ours:
            table = json.loads(self.paths.ranks(attempt).read_bytes())
            return int(next(entry["pid"] for entry in table if entry["rank"] == rank))
        return int((self.run_dir / "pids" / f"{attempt}-{rank}").read_text())

    def kill_rank(self, rank: int, attempt: int) -> float:
        """SIGKILL a rank that lives; returns when, by the clock of the metrics."""
        pid = self.pid_of(rank, attempt)
        assert process.is_running(pid), f"rank {rank} of {self.contender.name} is gone already"
        at = time.time()
        os.kill(pid, signal.SIGKILL)
        return at

    def wait_for_checkpoint(self, step: int) -> None:
        """Wait until the checkpoint of a step is committed on disk; there must not be a newer one."""
        deadline = time.monotonic() + PATIENCE_S
        while (newest := self._newest_step()) < step:
            assert time.monotonic() < deadline, f"{self.contender.name}: no checkpoint of step {step}\n{self.tail()}"
            time.sleep(0.005)
        assert newest == step, f"{self.contender.name} is past the checkpoint of step {step} already"

    def _newest_step(self) -> int:
        found = checkpoint.list_checkpoints(self.paths.checkpoints)
        return max((entry.step for entry in found), default=0)

    def steps_lost(self, every: int) -> int:
        """Steps that the second attempt repeats; it must go on from a checkpoint.

        Only phalanx has any between those on disk: in the memory of the nodes.
        """
        last, first = self.lines(1)[-1]["step"], self.lines(2)[0]["step"]
        assert self.contender.ours or first % every == 1, "training did not go on from the checkpoint"
        assert every < first <= last + 1, f"training went on from step {first}, the last one was {last}"
        return int(last + 1 - first)

    def timeline(self, since: float) -> str:
        """What phalanx recorded after a moment up to its next first step, each with its seconds; empty for peers."""
        if not self.contender.ours:
            return ""
        words = []
        for event in RunStore(self.run_dir).events():
            if event.time >= since:
                words.append(f"{event.kind} {event.time - since:.2f}")
            if event.time >= since and event.kind is EventKind.TRAINING_STARTED:
                break
        return f" ({', '.join(words)})"

    def finish(self) -> dict[int, float]:
        """Wait for a good end; returns the losses, each step as it was computed last."""
        code = self.process.wait(PATIENCE_S)
        assert code == 0, f"{self.contender.name} ended with {code}\n{self.tail()}"
        return {int(line["step"]): float(line["loss"]) for line in read_lines(self.paths.metrics)}

    def tail(self) -> str:
        """What it printed last."""
        return self.log.read_text(errors="replace")[-3000:]

    def close(self) -> None:
        """End what is left of it."""
        if self.process.poll() is None:
            below = descendants(self.process.pid)
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20.0)
            for pid in [self.process.pid, *below]:
                process.send(pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def running(contender: Contender, run_dir: Path, job: Mapping[str, Any]) -> Iterator[Running]:
    """A contender for as long as the context lasts."""
    made = Running(contender, run_dir, job)
    try:
        yield made
    finally:
        made.close()

"""The command line with real agents and real ranks, without Ray: signals, cancel, resume, and no orphan processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, pathlib, sys, time
rank, attempt = os.environ["RANK"], os.environ["PHALANX_ATTEMPT"]
import jobs.mine, conf, launcher, strategies  # the user's own, not ours
print("rank", rank, "attempt", attempt, "resume", os.environ["PHALANX_RESUME_FROM"], sys.argv[1:], flush=True)
folder = pathlib.Path(os.environ["PHALANX_CKPT_DIR"]) / attempt
if rank == "0":
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "COMMIT").touch()
if "wait" in sys.argv:
    time.sleep(120)
if "fail" in sys.argv and rank == "1" and attempt == "1":
    while not (folder / "COMMIT").exists():  # of rank 0, which is ended as soon as this one has failed
        time.sleep(0.05)
    sys.exit(7)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that has folders of our names."""
    root = tmp_path / "project"
    for name in ("jobs", "conf", "launcher", "strategies"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text("")
    (root / "jobs" / "mine.py").write_text("")
    (root / "train.py").write_text(SCRIPT)
    return root


class Client:
    """Starts ``phalanx`` as people do; ends what it started."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.running: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A ``phalanx`` in the background."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher.cli", *words],
            cwd=self.project,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        return process

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """A ``phalanx`` from beginning to end: exit code, stdout, stderr."""
        process = self.start(*words)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err

    def status(self) -> dict[str, Any]:
        """The status document of the newest run."""
        code, out, err = self("status", "latest", "--json")
        assert code == 0, err
        document = json.loads(out)
        assert isinstance(document, dict)
        return document

    def events(self) -> str:
        """The log of the only run."""
        return "".join(path.read_text() for path in self.project.glob("runs/*/events.jsonl"))

    def leftovers(self) -> list[str]:
        """Command lines of processes that still work for runs of this project."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command, environ = ((entry / name).read_bytes() for name in ("cmdline", "environ"))
                except OSError:
                    continue
                if str(self.project).encode() in command + environ:
                    found.append(command.replace(b"\0", b" ").decode(errors="replace"))
        return found


@pytest.fixture
def phalanx(project: Path) -> Iterator[Client]:
    client = Client(project)
    yield client
    for process in client.running:
        if process.poll() is None:
            process.kill()
            process.communicate()


def until(condition: Callable[[], bool], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


SUBMIT = ["submit", "job=script", "cluster=process", "tracking=none", "recovery.grace_s=2", "run.name=demo"]


def test_script_fails_once_and_recovers(phalanx: Client) -> None:
    code, out, err = phalanx(*SUBMIT, "job.command=python train.py fail --lr=1e-3")
    assert code == 0, err
    assert "attempt 2" in err
    assert "exited with code 7" in out
    document = phalanx.status()
    assert document["state"] == "succeeded"
    assert len(document["attempts"]) == 2
    assert phalanx("logs", "demo", "--attempt", "1", "--rank", "1")[1].startswith("rank 1 attempt 1 resume  ")
    last = phalanx("logs", "demo")[1]
    assert f"resume {phalanx.project}/runs/demo/checkpoints/1 ['fail', '--lr=1e-3']" in last
    until(lambda: not phalanx.leftovers(), 10.0)
    assert phalanx("resume", "demo", "--yes")[0] == 6


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_at_the_client_cancels_cleanly(phalanx: Client, number: signal.Signals) -> None:
    client = phalanx.start(*SUBMIT, "job.command=python train.py wait")
    until(lambda: "training_started" in phalanx.events())
    client.send_signal(number)
    out, err = client.communicate(timeout=60)
    assert client.returncode == 103, err
    assert "state:      cancelled" in out
    assert phalanx.status()["state"] == "cancelled"
    until(lambda: not phalanx.leftovers(), 10.0)


def test_cancel_from_elsewhere_then_resume(phalanx: Client) -> None:
    client = phalanx.start(*SUBMIT, "job.command=python train.py wait")
    until(lambda: "training_started" in phalanx.events())
    assert phalanx("resume", "demo", "--yes")[0] == 6  # it has a live controller
    live = phalanx("logs", "demo", "--rank", "1")
    assert live[1].startswith("rank 1 attempt 1"), live
    code, _, err = phalanx("cancel", "demo")
    assert code == 0, err
    client.communicate(timeout=60)
    assert client.returncode == 103
    code, _, err = phalanx("resume", "demo", "job.command=python train.py", "--yes")
    assert code == 0, err
    assert "attempt 2" in err
    assert "command" in err
    assert phalanx.status()["state"] == "succeeded"
    until(lambda: not phalanx.leftovers(), 10.0)


@pytest.mark.full
def test_killed_client_leaves_a_gang_that_resume_adopts(phalanx: Client) -> None:
    client = phalanx.start(*SUBMIT, "job.command=python train.py wait", "recovery.lease_s=100")
    until(lambda: "training_started" in phalanx.events())
    client.kill()
    client.communicate(timeout=60)
    document = phalanx.status()
    assert (document["state"], document["orphaned"]) == ("running", True)
    ranks = document["ranks"]
    again = phalanx.start("resume", "demo", "--yes")
    until(lambda: '"adopted": true' in phalanx.events())
    document = phalanx.status()
    assert document["ranks"] == ranks
    assert len(document["attempts"]) == 1
    again.kill()
    again.communicate(timeout=60)
    assert phalanx.leftovers()
    code, _, err = phalanx("cancel", "demo")  # nobody controls it: cancel does it itself
    assert code == 0, err
    assert phalanx.status()["state"] == "cancelled"
    until(lambda: not phalanx.leftovers(), 10.0)

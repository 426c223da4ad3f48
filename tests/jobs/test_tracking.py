"""Tracking with the real wandb, offline: every step once, whatever is killed, and no process is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.paths import RunPaths
from jobs.proctree import descendants, kill_trees, processes
from jobs.tracking import follow, logged_steps, make_tracker, numbers_of
from strategies.errors import StorageError

pytestmark = pytest.mark.timeout(120)
COMMAND = [sys.executable, "-P", "-m", "jobs.tracking"]


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return make_run(tmp_path / "run")


def make_run(root: Path, **tracking: str) -> RunPaths:
    root.mkdir()
    paths = RunPaths(root)
    job = dict.fromkeys(("kind", "model", "plan", "batch", "train", "data", "checkpoint"), "x")
    choice = {"kind": "wandb", "project": "test", "mode": "offline"} | tracking
    paths.request.write_text(json.dumps({"run_name": "run", "tracking": choice, "job": job}))
    return paths


def train(paths: RunPaths, attempt: int, *steps: int) -> None:
    with paths.metrics.open("a") as file:
        for step in steps:
            line = {"step": step, "loss": 1 / step, "lr": 0.1, "grad_norm": 1.0, "attempt": attempt, "time": 0.0}
            file.write(json.dumps(line) + "\n")


def event(paths: RunPaths, kind: str) -> None:
    with paths.events.open("a") as file:
        file.write(json.dumps({"kind": kind}) + "\n")


def state(paths: RunPaths) -> dict[str, Any]:
    return dict(json.loads(paths.tracking.read_text())) if paths.tracking.exists() else {}


def logged(paths: RunPaths) -> list[int]:
    """Steps in all W&B files of the run, oldest file first."""
    files = sorted(paths.root.glob("wandb/*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [step for path in files for step in logged_steps(path)]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Process:
    """A tracker that runs."""

    def __init__(self, paths: RunPaths) -> None:
        self.child = subprocess.Popen([*COMMAND, str(paths.root)], stderr=subprocess.PIPE, text=True)

    def tree(self) -> set[int]:
        """The tracker and what it started."""
        return descendants([self.child.pid])

    def end(self) -> str:
        """Wait for its end; returns what it wrote to stderr."""
        return self.child.communicate(timeout=60)[1]


@pytest.fixture
def start() -> Iterator[Callable[[RunPaths], Process]]:
    started: list[Process] = []

    def run(paths: RunPaths) -> Process:
        started.append(Process(paths))
        return started[-1]

    yield run
    for process in started:
        kill_trees([process.child.pid])
        process.end()


def test_one_run_over_all_attempts(paths: RunPaths, start: Callable[[RunPaths], Process]) -> None:
    tracker = start(paths)
    wait_until(lambda: "id" in state(paths), "an id is made at once")
    train(paths, 1, 1, 2, 3, 4)
    wait_until(lambda: state(paths)["step"] == 4, "steps are logged while the run goes on")
    train(paths, 2, 3, 4, 5, 6)
    wait_until(lambda: state(paths)["step"] == 6, "replayed steps are passed over")
    tree = tracker.tree()
    assert len(tree) > 1, "wandb-core runs"
    event(paths, "run_succeeded")
    assert tracker.end() == ""
    assert tracker.child.returncode == 0
    assert not tree & set(processes()), "nothing is left behind"
    assert logged(paths) == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in paths.root.iterdir()} == {
        "request.json", "metrics.jsonl", "events.jsonl", "tracking.json", "wandb",
    }  # fmt: skip

    identity = state(paths)["id"]
    event(paths, "run_resumed")  # a person resumes the run: another controller, another tracker
    tracker = start(paths)
    train(paths, 3, 6, 7)
    wait_until(lambda: state(paths)["step"] == 7, "a second tracker goes on")
    event(paths, "run_failed")
    tracker.end()
    assert logged(paths) == [1, 2, 3, 4, 5, 6, 7]
    assert state(paths)["id"] == identity
    assert {path.stem for path in paths.root.glob("wandb/*/*.wandb")} == {f"run-{identity}"}


def test_a_killed_tracker_loses_and_repeats_nothing(paths: RunPaths, start: Callable[[RunPaths], Process]) -> None:
    train(paths, 1, 1, 2, 3)
    tracker = start(paths)
    wait_until(lambda: state(paths).get("step") == 3, "logged, but perhaps not yet on disk")
    tree = tracker.tree()
    tracker.child.send_signal(signal.SIGKILL)
    tracker.end()
    wait_until(lambda: not tree & set(processes()), "wandb-core ends when its tracker is gone")
    train(paths, 1, 4)
    event(paths, "run_succeeded")
    start(paths).end()
    assert logged(paths) == [1, 2, 3, 4]


def test_sigterm_writes_out_what_there_is(paths: RunPaths, start: Callable[[RunPaths], Process]) -> None:
    train(paths, 1, 1, 2)
    tracker = start(paths)
    wait_until(lambda: state(paths).get("step") == 2, "it runs")
    tree = tracker.tree()
    tracker.child.terminate()
    assert tracker.end() == ""
    assert tracker.child.returncode == 0
    assert not tree & set(processes())
    assert logged(paths) == [1, 2]


def test_it_ends_with_its_parent(paths: RunPaths) -> None:
    code = f"import subprocess; print(subprocess.Popen({[*COMMAND, str(paths.root)]!r}).pid, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        tracker = int(parent.stdout.readline())
        train(paths, 1, 1)
        wait_until(lambda: state(paths).get("step") == 1, "it runs")
        tree = descendants([tracker])
        parent.kill()
    wait_until(lambda: not tree & set(processes()), "the tracker and wandb-core end")
    assert logged(paths) == [1]


def test_nothing_is_started_for_a_run_without_steps(paths: RunPaths, start: Callable[[RunPaths], Process]) -> None:
    event(paths, "run_failed")
    start(paths).end()
    assert not (paths.root / "wandb").exists()
    assert state(paths)["step"] == 0


def test_no_tracking(tmp_path: Path, start: Callable[[RunPaths], Process]) -> None:
    paths = make_run(tmp_path / "run", kind="none")
    train(paths, 1, 1)
    event(paths, "run_succeeded")
    tracker = start(paths)
    assert (tracker.end(), tracker.child.returncode) == ("", 0)
    assert not paths.tracking.exists()


def test_a_run_without_a_request(tmp_path: Path, start: Callable[[RunPaths], Process]) -> None:
    tracker = start(RunPaths(tmp_path))
    errors = tracker.end()
    assert tracker.child.returncode == StorageError.exit_code
    assert "request.json" in errors
    assert "Traceback" not in errors


def test_a_full_disk_ends_the_tracker_with_a_sentence(paths: RunPaths) -> None:
    train(paths, 1, 1)
    paths.tracking.mkdir()
    with pytest.raises(StorageError, match="position of the tracker"):
        make_tracker(paths)


class Recorder:
    """A tracker that remembers what it was told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.ending: int | None = None

    def log(self, line: Mapping[str, Any]) -> None:
        self.steps.append(line["step"])

    def finish(self, exit_code: int) -> None:
        self.ending = exit_code


class Patience:
    """Stops after so many looks."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    @property
    def over(self) -> bool:
        self._looks -= 1
        return self._looks < 0


@pytest.mark.parametrize(
    ("kinds", "ending"),
    [
        (["run_created", "run_succeeded"], 0),
        (["run_failed"], 1),
        (["run_cancelled"], 255),
        (["run_failed", "run_resumed"], 0),
    ],
)
def test_the_last_event_decides(
    paths: RunPaths, kinds: list[str], ending: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.tracking.POLL_S", 0.0)
    train(paths, 1, 1, 2)
    for kind in kinds:
        event(paths, kind)
    recorder = Recorder()
    follow(paths, recorder, Patience(3))  # type: ignore[arg-type]
    assert (recorder.steps, recorder.ending) == ([1, 2], ending)


def test_tracking_needs_no_torch() -> None:
    code = "import sys, jobs.tracking; print(sorted({'torch', 'wandb', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_what_routers_do_is_logged_under_names_of_its_own() -> None:
    routing = {"aux_loss": 0.1, "load": [3, 5], "imbalance": 1.25, "imbalance_layer": 7, "dropped": 0, "crossed": 4}
    assert numbers_of({"step": 1, "loss": 2.0, "time": 5.0, "moe": routing}) == {
        "loss": 2.0, "moe/aux_loss": 0.1, "moe/imbalance": 1.25, "moe/imbalance_layer": 7, "moe/dropped": 0,
        "moe/crossed": 4, "moe/load/0": 3, "moe/load/1": 5,
    }  # fmt: skip

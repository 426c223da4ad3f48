"""The controller lock survives kill -9, refuses a second holder, and never compares clocks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.paths import RunPaths
from launcher.lock import ControllerLock, controlled, identity
from strategies.errors import ResumeRefused

HOLD = """
import sys, time
from jobs.paths import RunPaths
from launcher.lock import ControllerLock
lock = ControllerLock.acquire(RunPaths(sys.argv[1]))
print(lock.epoch, flush=True)
while True:
    lock.beat()
    time.sleep(0.1)
"""


def test_killed_holder_leaves_no_obstacle(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline().strip() == b"1"
        with pytest.raises(ResumeRefused, match=f"process {holder.pid}"):
            ControllerLock.acquire(RunPaths(tmp_path))
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        lock = ControllerLock.acquire(RunPaths(tmp_path))
        assert lock.epoch == 2
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_holder_on_another_machine_is_watched(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.controllers.mkdir()
    record = identity() | {"machine": "elsewhere"}
    (paths.controllers / "1.json").write_text(json.dumps(record))
    beats = iter(range(100))

    def beat(seconds: float) -> None:
        (paths.controllers / "1.beat").write_text(str(next(beats)))

    with pytest.raises(ResumeRefused):
        ControllerLock.acquire(paths, sleep=beat)
    lock = ControllerLock.acquire(paths, sleep=lambda seconds: None)
    assert lock.epoch == 2


def test_release_lets_the_next_in(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    first = ControllerLock.acquire(paths)
    assert controlled(paths)
    first.release()
    assert not controlled(paths)
    second = ControllerLock.acquire(paths)
    assert (second.epoch, first.lost(), second.lost()) == (2, True, False)

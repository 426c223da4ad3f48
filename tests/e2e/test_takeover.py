"""A controller that falls at the moment when its ranks are ordered: they start without it, and are adopted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.run import EventKind, RunState
from tests.support import cli

FALLS = """
import os, signal, sys
from launcher.cli import main
from launcher.gang import Gang
order = Gang._on_reserved
def order_and_fall(gang, link, event):
    order(gang, link, event)
    os.kill(os.getpid(), signal.SIGKILL)
Gang._on_reserved = order_and_fall
main(sys.argv[1:])
"""


@pytest.mark.full  # half a minute; tests/launcher/test_takeover.py adopts one by hand
@pytest.mark.timeout(240)
def test_ranks_of_which_their_controller_never_heard_are_adopted(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    words = cli.tiny(tmp_path, "ordered", "train.steps=40")
    killed = subprocess.run(
        [sys.executable, "-c", FALLS, *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = cli.store(tmp_path, "ordered")
    assert not run.paths.ranks(1).exists()
    assert EventKind.RANKS_SPAWNED not in [event.kind for event in run.events()]
    resumed = cli.phalanx("resume", "ordered", "--dir", str(tmp_path / "runs"), "--yes", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    begun = [event.data["adopted"] for event in run.events() if event.kind is EventKind.CONTROLLER_STARTED]
    assert begun == [False, True]
    told = run.run()
    assert (told.state, len(told.attempts), told.restarts, told.steps_lost) == (RunState.SUCCEEDED, 1, 0, 0)
    assert [event.kind for event in run.events()].count(EventKind.RANKS_SPAWNED) == 1
    assert sorted(cli.curve(run)) == list(range(1, 41))
    cli.assert_nothing_left(run.paths.root)

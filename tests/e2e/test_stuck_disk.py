"""The disk of the whole run directory is stuck for longer than agents wait for a controller. Needs root."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.run import EventKind, RunState
from launcher.store import RunStore
from tests.support import cli
from tests.support.frozen import freezable_disk

LEASE_S = 6.0
STUCK_S = 3 * LEASE_S  # longer than a hang takes to be found, too
STEPS = 80


@pytest.mark.timeout(400)
def test_a_run_directory_that_is_stuck_costs_time_and_nothing_else(tmp_path: Path) -> None:
    """No controller can beat there, rank 0 tells of no step: none of that is the end of the gang."""
    disk = tmp_path / "disk"
    with freezable_disk(disk, tmp_path / "image") as frozen:
        where = (f"run.dir={disk / 'runs'}", f"data.cache={tmp_path / 'data'}")
        patience = (f"recovery.lease_s={LEASE_S}", "recovery.wait_for_nodes_s=60")
        words = cli.tiny(tmp_path, "stuck", *where, *patience, f"train.steps={STEPS}", "checkpoint.every=40")
        submitted = cli.start(*words, cwd=tmp_path)
        root = disk / "runs" / "stuck"
        cli.wait_for((root / "metrics.jsonl").exists, "training", 120.0)
        run = RunStore.open(root)
        cli.wait_for(lambda: max(cli.curve(run), default=0) >= 10, "step 10", 120.0)
        frozen.freeze()
        reached = max(cli.curve(run))
        time.sleep(STUCK_S)
        assert max(cli.curve(run)) == reached < STEPS, "rank 0 stood still"
        frozen.thaw()
        done = cli.end(submitted)
        assert done.code == 0, done.err
        told = run.run()
        assert (told.state, len(told.attempts), told.restarts, told.steps_lost) == (RunState.SUCCEEDED, 1, 0, 0)
        assert EventKind.FAILURE_DETECTED not in [event.kind for event in run.events()]
        assert [int(line["step"]) for line in run.metrics()] == list(range(1, STEPS + 1)), "each step was made once"

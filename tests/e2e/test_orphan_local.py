"""Cancelling a run on an embedded Ray cluster whose controller was killed: nothing of either is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.embedded import EmbeddedCluster
from launcher.lock import process_started
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from tests.support import cli

pytestmark = pytest.mark.timeout(240)


@pytest.mark.full
def test_an_orphan_on_the_embedded_cluster_is_cancelled(tmp_path: Path) -> None:
    where = (f"run.dir={tmp_path / 'runs'}", "run.name=orphan", "data=text", cli.corpus(tmp_path))
    shape = ("cluster=local", "cluster.nodes=1", "cluster.slots_per_node=2", "cluster.spares=0", "strategy.tp=2")
    long = ("train.steps=100000", "checkpoint.every=100000", "recovery.lease_s=60")
    process = cli.start("submit", *cli.TINY, *shape, *where, *long, cwd=tmp_path)
    root = tmp_path / "runs" / "orphan"
    cli.wait_for(lambda: max(cli.curve(RunStore(root)), default=0) >= 2, "step 2")
    process.kill()
    cli.end(process)
    cluster = EmbeddedCluster(root)
    keeper = int(cluster.record()["keeper"]["pid"])
    assert cluster.alive()
    assert len(cluster.processes()) > 3
    assert len(cli.processes_of(root)) >= 3  # an agent and two ranks, at least

    done = cli.phalanx("cancel", "orphan", "--dir", str(root.parent), cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err.splitlines()[-1] == "orphan: cancelled"
    run = RunStore(root)
    assert run.run().state is RunState.CANCELLED
    started = [event.data["adopted"] for event in run.events() if event.kind is EventKind.CONTROLLER_STARTED]
    assert started == [False, True]  # it ended the gang as its controller, not by forgetting about it
    assert cluster.processes() == set()
    assert not cluster.alive()
    cli.wait_for(lambda: process_started(keeper) == 0, "the keeper's end", 15)  # whoever inherits it may reap it later
    cli.assert_nothing_left(root)

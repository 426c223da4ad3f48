"""Cancelling a run that nobody controls."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import backends
from launcher.cli import main
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from strategies.errors import ClusterError
from tests.support.runs import begin_attempt, make_run, put

WORDS = ["cluster=existing", "cluster.address=h:1", "cluster.nodes=4", "cluster.slots_per_node=2", "tracking=none"]


@pytest.fixture
def orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """A run that trains on a cluster which does not answer."""

    def unreachable(*unused: object, **more: object) -> None:
        raise ClusterError("No Ray cluster can be reached at h:1.", why="no route to host")

    monkeypatch.setattr(backends, "start_controller", unreachable)
    store = make_run(tmp_path, words=WORDS)
    begin_attempt(store, 1, 2.0, nodes=["a", "b", "c", "d"], step=1, reason="start")
    return store


def cancel(store: RunStore) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["cancel", store.name, "--dir", str(store.paths.root.parent)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_gang_that_cannot_be_reached_is_not_called_cancelled(
    orphan: RunStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = orphan.events()
    assert cancel(orphan) == 4
    assert orphan.events() == before
    assert orphan.run().state is RunState.RUNNING
    assert orphan.paths.cancel.exists()
    said = capsys.readouterr().err
    assert "no route to host" in said
    assert f"phalanx cancel {orphan.name}" in said


def test_a_run_without_ranks_is_cancelled_from_here(orphan: RunStore) -> None:
    put(orphan, 9.0, EventKind.FAILURE_DETECTED, attempt=1, failure={"kind": "node_lost"}, last_step=0, failed_at=9.0)
    put(orphan, 9.5, EventKind.GANG_STOPPED, attempt=1, cause="lost", failure="node_lost", signature="")
    assert cancel(orphan) == 0
    assert orphan.run().state is RunState.CANCELLED

"""A gang that was replaced and goes on all the same: the controller's side of it, at every moment of its successor."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.checkpoint import CheckpointConflict, fence, list_checkpoints, manifest
from jobs.checkpoint.layout import Place, Token, manifests
from jobs.checkpoint.slices import whole
from jobs.checkpoint.storage import PosixStorage
from launcher import adoption, lineage, origin
from launcher.logbook import Fenced
from launcher.phase import Phase
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from strategies.errors import StorageError
from tests.launcher.test_origin import a_node_is_lost, a_rank_falls, hold, killed, trained
from tests.launcher.test_takeover import succeed
from tests.support.checkpoints import manifest_of, write_checkpoint, write_shards
from tests.support.stage import Stage


def cut_off(stage: Stage, step: int, attempt: int = 1) -> Callable[[], Path]:
    """All parts of a checkpoint are durable, and the coordinator of its gang is away; what it does when it is back."""
    place = Place(stage.store.paths.checkpoint_dir, step, Token(1, attempt))
    records = write_shards(place, [[whole("w", (30, 10))]])
    return lambda: manifest.commit(place.root, manifest_of(place, records, {"w": (30, 10)}))


def a_rank_falls_in(stage: Stage, attempt: int) -> None:
    stage.gang.say("exit", "b", rank=3, attempt=attempt, code=None, signal=9)
    killed(stage, "a", "b", attempt=attempt)
    stage.turn(4)


def begins(stage: Stage) -> list[str]:
    return [attempt.resume_from for attempt in stage.store.run().attempts]


def test_the_first_gang_needs_no_fence(tmp_path: Path) -> None:
    stage, _ = trained(tmp_path)
    assert fence.highest(stage.store.paths.checkpoints) is None


def test_nothing_is_committed_by_a_gang_whose_successor_was_planned(tmp_path: Path) -> None:
    """None of its ranks has come to life, and none has written anything."""
    stage, (_, newest) = trained(tmp_path)
    late = cut_off(stage, 12)
    a_node_is_lost(stage)
    assert begins(stage)[1:] == [str(newest)]
    with pytest.raises(CheckpointConflict):
        late()
    assert sorted(place.step for place in manifests(stage.store.paths.checkpoint_dir)) == [5, 10]


def test_what_slips_in_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the zombie had looked for a fence before there was one, and its store had taken its time.

    A person has resumed the run with another learning rate; the new gang has come to step 11, in memory only.
    """
    stage, (_, newest) = trained(tmp_path)
    late = cut_off(stage, 100)
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller, resume={"overrides": ["train.lr=0.1"], "changes": []})
    stage.start()
    assert begins(stage)[-1] == str(newest)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "refuse_if_fenced", lambda place: None)
        late()
    root = stage.store.paths.checkpoint_dir
    assert sorted(place.step for place in manifests(root)) == [5, 10, 100]
    assert [one.step for one in list_checkpoints(root)] == [10, 5]
    hold(stage, monkeypatch, step=11, attempt=2, epoch=2)
    a_rank_falls_in(stage, 2)
    assert begins(stage)[-1] == "memory:11:e0002-a0002"


def test_with_its_memory_gone_the_run_falls_back_to_what_it_had_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, (_, newest) = trained(tmp_path)
    late = cut_off(stage, 100)
    a_rank_falls(stage)
    stage.start()
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "refuse_if_fenced", lambda place: None)
        late()
    for attempt in (2, 3):
        a_rank_falls_in(stage, attempt)
        assert begins(stage)[-1] == str(newest)
        stage.start()


def test_what_was_on_its_way_when_a_rank_fell_is_committed_if_the_run_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The persisters have outlived the gang, and its next one begins with the same step in memory."""
    stage, _ = trained(tmp_path)
    late, beyond = cut_off(stage, 12), cut_off(stage, 13)
    hold(stage, monkeypatch, step=12, attempt=1)
    a_rank_falls(stage)
    assert begins(stage)[-1] == "memory:12:e0001-a0001"
    late()
    with pytest.raises(CheckpointConflict):
        beyond()
    assert [one.step for one in list_checkpoints(stage.store.paths.checkpoint_dir)] == [12, 10, 5]


def test_the_same_of_a_gang_that_has_lost_a_node_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, _ = trained(tmp_path)
    late = cut_off(stage, 12)
    hold(stage, monkeypatch, step=12, attempt=1)
    a_node_is_lost(stage)
    assert begins(stage)[-1] == "memory:12:e0001-a0001"
    with pytest.raises(CheckpointConflict):
        late()


def test_a_gang_that_is_adopted_commits_on(tmp_path: Path) -> None:
    stage, _ = trained(tmp_path)
    due = cut_off(stage, 12)
    stage.report("a", "checkpoint", 1, rank=0, step=10, path="", bytes=1, stall_s=0.1)
    stage.store.write_ranks(1, [{"node": "ab"[rank // 2], "rank": rank, "pid": 100 + rank} for rank in range(4)])
    succeed(stage)
    adoption.begin(stage.controller)
    assert stage.controller.phase is Phase.RUN
    stage.turn(2)
    due()
    assert [one.step for one in list_checkpoints(stage.store.paths.checkpoint_dir)] == [12, 10, 5]


def test_a_controller_that_was_stopped_before_it_looked_starts_nothing(tmp_path: Path) -> None:
    """Of two that live, the older one is fenced off where the checkpoints are, too, and not by a lock alone."""
    stage, (_, newest) = trained(tmp_path)
    old = stage.controller
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller)
    stage.start()
    root = stage.store.paths.checkpoint_dir
    before = sorted(path.name for path in (root / fence.FOLDER).iterdir())
    with pytest.raises(Fenced):
        old.outset.find(old.request.job, old.run, 1, old.muster.up)
    assert sorted(path.name for path in (root / fence.FOLDER).iterdir()) == before
    # One that had looked, and is stopped before it can say what it has found, says it to nobody.
    late = lineage.following(old.run, Token(1, 2), "", kept=(), passed=(), finishing=False)
    fence.begin(root, late)
    write_checkpoint(root, 15, (2, 2))
    assert [one.step for one in list_checkpoints(root)] == [15, 10, 5]
    assert begins(stage)[-1] == str(newest)


def test_two_controllers_with_one_number_do_not_both_begin(tmp_path: Path) -> None:
    """A run directory was copied, and both copies keep their checkpoints at one address."""
    stage, _ = trained(tmp_path)
    fence.raise_fence(stage.store.paths.checkpoints, Token(1, 2), owner="somebody else")
    stage.gang.say("exit", "b", rank=3, attempt=1, code=None, signal=9)
    killed(stage, "a", "b")
    with pytest.raises(Fenced):
        stage.turn(4)
    assert len(stage.store.run().attempts) == 1


def test_without_a_fence_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage of the storage is waited for; room does not come by waiting."""
    stage, (_, newest) = trained(tmp_path)

    def refused(number: int) -> Callable[..., int]:
        def create(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        return create

    with monkeypatch.context() as patch:
        patch.setattr(PosixStorage, "create", refused(errno.EIO))
        a_rank_falls(stage)
        assert stage.state() is RunState.RECOVERING
        (wait,) = [e.data["reason"] for e in stage.store.events() if e.data.get("action") == "wait"]
        assert "earlier gangs cannot be fenced off" in wait
        assert "Input/output error" in wait
        patch.setattr(PosixStorage, "create", refused(errno.ENOSPC))
        with pytest.raises(StorageError, match="No space left on device"):
            stage.turn()
    stage.start()
    assert begins(stage)[-1] == str(newest)


def test_the_checkpoints_of_another_run_are_not_fenced(tmp_path: Path) -> None:
    stage, _ = trained(tmp_path)
    shared = tmp_path / "shared"
    shutil.move(stage.store.paths.checkpoint_dir, shared)
    stage.store.paths.pointer.write_text(f"{shared}\n")
    (shared / "run.json").write_text('{"run": "run", "owner": "somebody else"}')
    a_rank_falls(stage)
    assert fence.highest(shared) is None


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """It has no fences; its log says what its gangs began with."""
    stage, _ = trained(tmp_path)
    a_rank_falls(stage)
    stage.start()
    root = stage.store.paths.checkpoint_dir
    last = write_checkpoint(root, 15, (1, 2))
    shutil.rmtree(root / fence.FOLDER)
    assert [one.step for one in list_checkpoints(root)] == [15, 10, 5]
    a_rank_falls_in(stage, 2)
    assert begins(stage)[-1] == str(last)
    assert fence.current(root) == lineage.following(
        stage.store.run(), Token(1, 3), str(last), kept={Token(1, 1), Token(1, 2)}, passed=(), finishing=True
    )
    assert [one.step for one in list_checkpoints(root)] == [15, 10, 5]


def test_a_run_directory_that_was_moved_takes_its_fences_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, _ = trained(tmp_path)
    late = cut_off(stage, 100)
    a_rank_falls(stage)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "refuse_if_fenced", lambda place: None)
        late()
    moved = tmp_path / "elsewhere" / stage.store.name
    shutil.move(stage.store.paths.root, moved)
    store = RunStore.open(moved)
    point, _ = origin.newest(store.paths, rejected=frozenset(), script=False, known=lineage.of(store.run()))
    assert point.step == 10
    assert EventKind.ATTEMPT_PLANNED in [event.kind for event in store.events()]

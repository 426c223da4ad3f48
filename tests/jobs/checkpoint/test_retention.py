"""What is deleted, when, and in which order."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jobs.checkpoint import list_checkpoints, newest, prune, verify
from jobs.checkpoint.fence import Branch, begin, raise_fence
from jobs.checkpoint.layout import Place, Token, manifests, place_of
from jobs.checkpoint.slices import whole
from strategies.errors import StorageError
from tests.support.checkpoints import write_checkpoint, write_shards

HALF = [[whole("w", (30, 10))]]


def listed(root: Path) -> list[tuple[int, tuple[int, int]]]:
    return [(entry.step, entry.token) for entry in list_checkpoints(root)]


def test_the_newest_stay(tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path, step) for step in range(1, 6)]
    assert sorted(prune(tmp_path, 2, token=(1, 1))) == paths[:3]
    assert listed(tmp_path) == [(5, (1, 1)), (4, (1, 1))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    assert all(verify(path, deep=True) == [] for path in paths[3:])
    assert prune(tmp_path, 2, token=(1, 1)) == []


def test_at_least_one_stays(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    prune(tmp_path, 0)
    assert listed(tmp_path) == [(2, (1, 1))]
    assert prune(tmp_path / "none", 3) == []


def test_what_is_protected_stays(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, 1)
    for step in (2, 3):
        write_checkpoint(tmp_path, step)
    prune(tmp_path, 1, token=(1, 1), protect=[str(first)])
    assert listed(tmp_path) == [(3, (1, 1)), (1, (1, 1))]


def test_a_step_that_was_written_again_counts_once(tmp_path: Path) -> None:
    for step, token in [(1, (1, 1)), (2, (1, 1)), (2, (1, 2)), (3, (1, 2))]:
        write_checkpoint(tmp_path, step, token)
    prune(tmp_path, 3, token=(1, 2))
    assert listed(tmp_path) == [(3, (1, 2)), (2, (1, 2)), (1, (1, 1))]
    assert not Place(tmp_path, 2, Token(1, 1)).shard_dir.exists()


def test_an_abandoned_branch_does_not_push_out_ours(tmp_path: Path) -> None:
    """After a fall back from step 30 to 20, ours are at 25 and 26, and a restart would pick ours."""
    for step, token in [(20, (1, 1)), (30, (1, 1)), (25, (1, 2)), (26, (1, 2))]:
        write_checkpoint(tmp_path, step, token)
    prune(tmp_path, 2, token=(1, 2))
    assert sorted((place.step, place.token) for place in manifests(tmp_path)) == [(25, (1, 2)), (26, (1, 2))]


def test_what_does_not_count_takes_no_room(tmp_path: Path) -> None:
    """Of three that are kept, the third is what the gang began with, not what it left behind."""
    for step, token in [(20, (1, 1)), (30, (1, 1)), (25, (1, 2)), (26, (1, 2))]:
        write_checkpoint(tmp_path, step, token)
    begin(tmp_path, Branch(epoch=1, attempt=2, history=((20, 1, 1),)))
    prune(tmp_path, 3, token=(1, 2))
    assert listed(tmp_path) == [(26, (1, 2)), (25, (1, 2)), (20, (1, 1))]
    assert sorted(place.step for place in manifests(tmp_path)) == [20, 25, 26]


def test_a_gang_that_was_fenced_off_deletes_nothing(tmp_path: Path) -> None:
    """Its successor, which has written nothing yet, may have begun with what it would delete."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, (1, 1))
    raise_fence(tmp_path, Token(1, 2), owner="b")
    assert prune(tmp_path, 1, token=(1, 1)) == []
    assert len(list_checkpoints(tmp_path)) == 3


def test_leftovers_of_dead_gangs_go_and_those_of_this_gang_stay(tmp_path: Path) -> None:
    dead, ours = Place(tmp_path, 7, Token(1, 1)), Place(tmp_path, 8, Token(1, 2))
    write_checkpoint(tmp_path, 6, (1, 1))
    write_shards(dead, HALF)
    write_shards(ours, HALF)
    assert prune(tmp_path, 3) == []
    assert prune(tmp_path, 3, token=(1, 2)) == [dead.shard_dir]
    assert not dead.step_dir.exists()
    assert ours.shard(0).exists()
    assert listed(tmp_path) == [(6, (1, 1))]


def test_leftovers_beside_a_commit_of_the_same_step(tmp_path: Path) -> None:
    dead = Place(tmp_path, 7, Token(1, 1))
    write_shards(dead, HALF)
    path = write_checkpoint(tmp_path, 7, (1, 2))
    prune(tmp_path, 1, token=(1, 2))
    assert not dead.shard_dir.exists()
    assert verify(path, deep=True) == []


def test_a_replaced_gang_deletes_nothing(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, (1, 1))
    write_shards(Place(tmp_path, 3, Token(2, 2)), HALF)
    assert prune(tmp_path, 1, token=(1, 1)) == []
    assert len(list_checkpoints(tmp_path)) == 3


def test_nothing_is_deleted_for_an_unreadable_newer_one(tmp_path: Path) -> None:
    """A newer manifest that cannot be read replaces nothing, and is not deleted either: it may be mended."""
    good, bad = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    whole_text = bad.read_text()
    bad.write_text("{")
    assert prune(tmp_path, 1, token=(1, 1)) == []
    assert newest(tmp_path) == good
    assert verify(good, deep=True) == []
    bad.write_text(whole_text)
    assert verify(bad, deep=True) == []


def test_what_cannot_be_read_stays_until_the_run_has_come_as_far_again(tmp_path: Path) -> None:
    """The run goes on from step 1; until two checkpoints of step 4 or later are there, step 4 may be worth mending, and
    step 1, of which it may have files."""
    write_checkpoint(tmp_path, 1)
    bad = write_checkpoint(tmp_path, 4)
    bad.write_text(bad.read_text().replace('"run_id": "test"', '"run_id": "best"'))
    begin(tmp_path, Branch(epoch=1, attempt=2, history=((1, 1, 1),), passed=((4, 1, 1),)))
    for step, left in [(2, [1, 2, 4]), (3, [1, 2, 3, 4]), (4, [1, 3, 4, 4]), (5, [4, 5])]:
        write_checkpoint(tmp_path, step, (1, 2))
        prune(tmp_path, 2, token=(1, 2))
        assert sorted(place.step for place in manifests(tmp_path)) == left
        assert place_of(bad).shard(0).exists() == bad.exists() == (step < 5)


def test_the_manifest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in the middle of deleting leaves no checkpoint that is not whole; the next gang sweeps the rest."""
    old = write_checkpoint(tmp_path, 1, (1, 1))
    write_checkpoint(tmp_path, 2, (1, 1))

    def crash(path: Path, *, ignore_errors: bool) -> None:
        assert not old.exists()
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(StorageError, match="Cannot prune"):
        prune(tmp_path, 1, token=(1, 1))
    assert place_of(old).shard(0).exists()
    assert listed(tmp_path) == [(2, (1, 1))]
    monkeypatch.undo()
    assert prune(tmp_path, 1, token=(1, 2)) == [place_of(old).shard_dir]
    assert not old.parent.exists()

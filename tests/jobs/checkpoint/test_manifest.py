"""What is a checkpoint and what is not: commits, torn and half-written ones, damage, tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from jobs.checkpoint import (
    CheckpointConflict,
    CorruptCheckpoint,
    damaged,
    list_checkpoints,
    newest,
    read_manifest,
    verify,
)
from jobs.checkpoint.errors import OtherVersion
from jobs.checkpoint.layout import Place, Token, place_of
from jobs.checkpoint.manifest import commit
from jobs.checkpoint.shardfile import Slice
from jobs.checkpoint.slices import whole
from strategies.errors import StorageError
from tests.support.checkpoints import flip_bit, manifest_of, values, write_checkpoint, write_shards


def test_what_is_committed_is_listed_youngest_gang_first(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []
    assert newest(tmp_path) is None
    paths = [write_checkpoint(tmp_path, step, token) for step, token in [(20, (1, 1)), (10, (1, 1)), (9, (2, 2))]]
    listed = list_checkpoints(tmp_path)
    assert [(entry.step, entry.token) for entry in listed] == [(9, (2, 2)), (20, (1, 1)), (10, (1, 1))]
    assert listed[0].path == paths[2] == newest(tmp_path)
    assert listed[0].bytes == sum(os.path.getsize(file) for file in place_of(paths[2]).shard_dir.iterdir())
    assert listed[0].plan == read_manifest(paths[2]).plan
    assert newest(tmp_path, exclude=frozenset({str(paths[2])})) == paths[0]


def test_of_one_step_the_highest_token_is_taken(tmp_path: Path) -> None:
    for token in [(1, 9), (2, 3), (2, 10)]:
        write_checkpoint(tmp_path, 5, token)
    assert [entry.token for entry in list_checkpoints(tmp_path)] == [(2, 10), (2, 3), (1, 9)]
    best = newest(tmp_path)
    assert best is not None
    assert read_manifest(best).attempt == 10


def test_shards_without_manifest_are_no_checkpoint(tmp_path: Path) -> None:
    committed = write_checkpoint(tmp_path, 1)
    write_shards(Place(tmp_path, 2, Token(1, 1)), [[whole("w", (30, 10))]])
    assert newest(tmp_path) == committed
    assert len(list_checkpoints(tmp_path)) == 1


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_torn_manifest_is_skipped(tmp_path: Path, size: int) -> None:
    older, torn = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    torn.write_bytes(torn.read_bytes()[:size].rstrip().rstrip(b"}"))
    assert newest(tmp_path) == older
    assert [entry.path for entry in list_checkpoints(tmp_path)] == [older]
    assert len(verify(torn)) == 1
    with pytest.raises(CorruptCheckpoint) as raised:
        read_manifest(torn)
    assert raised.value.path == str(torn)


def test_a_manifest_whose_content_was_changed_is_skipped(tmp_path: Path) -> None:
    older, changed = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    document = json.loads(changed.read_bytes())
    document["extra"]["sample_index"] += 1
    changed.write_text(json.dumps(document))
    assert verify(changed) == ["the manifest does not match its own digest"]
    assert newest(tmp_path) == older


@pytest.mark.parametrize(("version", "told"), [(2, "2"), (None, "None")])
def test_a_manifest_of_another_version_says_so(version: int | None, told: str, tmp_path: Path) -> None:
    """Nothing is wrong with it, and its fields may be others: who can read it must."""
    older, other = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    document = {**json.loads(other.read_bytes()), "version": version, "news": []}
    other.write_text(json.dumps(document))
    with pytest.raises(OtherVersion, match="written by another version of phalanx") as raised:
        read_manifest(other)
    assert raised.value.reason.startswith(
        f"its format has version {told}, and this phalanx reads 1: go on with the one"
    )
    assert "env.json" in raised.value.hint
    assert damaged(tmp_path) == [(other, raised.value.reason)]
    assert newest(tmp_path) == older


def test_what_is_left_out_can_be_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    torn, moved = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 3)
    assert damaged(tmp_path) == []
    torn.write_bytes(torn.read_bytes()[:50])
    moved = moved.rename(moved.with_name("e0001-a0002.manifest.json"))
    assert [path for path, _ in damaged(tmp_path)] == [moved, torn]
    assert ["name says" in damaged(tmp_path)[0][1], "cannot be understood" in damaged(tmp_path)[1][1]] == [True, True]
    assert damaged(tmp_path / "none") == []


def test_a_manifest_that_was_moved_is_skipped(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1)
    path.rename(path.with_name("e0001-a0002.manifest.json"))
    assert newest(tmp_path) is None


def test_the_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    place = Place(tmp_path, 7, Token(3, 4))
    records = write_shards(place, [[whole("w", (30, 10))]])
    manifest = manifest_of(place, records, {"w": (30, 10)})
    manifest = dataclasses.replace(manifest, extra={"loss": 0.1 + 0.2, "nested": [1, None, {"a": "é"}]})
    assert read_manifest(commit(tmp_path, manifest)) == manifest


def test_the_second_committer_of_a_token_loses(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1)
    content = path.read_bytes()
    manifest = dataclasses.replace(read_manifest(path), time=2.5)
    with pytest.raises(CheckpointConflict, match="committed already"):
        commit(tmp_path, manifest)
    assert path.read_bytes() == content
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_replaced_gang_may_not_commit(tmp_path: Path) -> None:
    """A zombie's shards lie there for nothing once a higher token has begun to write anything."""
    zombie = Place(tmp_path, 5, Token(1, 1))
    records = write_shards(zombie, [[whole("w", (30, 10))]])
    write_shards(Place(tmp_path, 4, Token(1, 2)), [[whole("w", (30, 10))]])
    with pytest.raises(CheckpointConflict, match="e0001-a0001 may not commit"):
        commit(tmp_path, manifest_of(zombie, records, {"w": (30, 10)}))
    assert newest(tmp_path) is None


def test_a_shard_that_is_not_there_cannot_be_committed(tmp_path: Path) -> None:
    place = Place(tmp_path, 5, Token(1, 1))
    records = write_shards(place, [[whole("w", (30, 10))]])
    place.shard(0).unlink()
    with pytest.raises(StorageError, match="cannot be committed"):
        commit(tmp_path, manifest_of(place, records, {"w": (30, 10)}))
    assert newest(tmp_path) is None


def test_missing_and_truncated_shards_are_found_by_a_quick_look(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    assert verify(path) == []
    place = place_of(path)
    place.shard(0).unlink()
    data = place.shard(1).read_bytes()
    place.shard(1).write_bytes(data[:-1])
    problems = verify(path)
    assert len(problems) == 2
    assert problems[0] == f"{place.shard(0)} is missing"
    assert f"has {len(data) - 1} bytes instead of {len(data)}" in problems[1]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Anywhere in a shard: length of the header, header, padding, data."""
    path = write_checkpoint(tmp_path)
    shard = place_of(path).shard(1)
    size = shard.stat().st_size
    assert verify(path, deep=True) == []
    for at in [0, 1, 7, *range(8, size, 97), size - 1]:
        flip_bit(shard, at)
        assert verify(path, deep=True), f"byte {at} of {size}"
        flip_bit(shard, at)
    assert verify(path, deep=True) == []


def test_anybody_can_open_a_shard(tmp_path: Path) -> None:
    """The safetensors package reads what we write."""
    box = ((0, 30), (5, 10))
    piece = Slice(name="w", shape=(30, 10), box=box, start=25, stop=75)
    path = write_checkpoint(tmp_path, ranks=[[piece, whole("b", (3,))]])
    tensors = load_file(place_of(path).shard(0))
    expected = values((30, 10), "exp_avg").reshape(30, 10)[:, 5:10].reshape(-1)[25:75]
    assert (tensors["exp_avg/w"] == expected).all()
    assert (tensors["master/b"] == values((3,), "master")).all()
    assert len(tensors) == 6


def test_the_controller_needs_neither_torch_nor_numpy() -> None:
    """It lists, verifies and prunes where they are not installed."""
    blocked = "import sys; [sys.modules.__setitem__(n, None) for n in ('torch', 'numpy', 'safetensors')]"
    code = f"{blocked}; import jobs.checkpoint as c; print(c.newest('/none'), c.verify('/none/x'), c.prune('/none', 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("None [")

"""Shards that have not changed are not written again; nothing that a checkpoint needs is ever deleted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jobs.checkpoint import list_checkpoints, newest, prune, read_manifest, verify
from jobs.checkpoint.digest import weights_digest
from jobs.checkpoint.errors import CorruptCheckpoint
from jobs.checkpoint.layout import Place, Token, place_of
from jobs.checkpoint.manifest import Origin, commit
from jobs.checkpoint.parts import write_part
from jobs.checkpoint.reader import Reader
from jobs.checkpoint.shardfile import KINDS, Slice
from jobs.checkpoint.slices import whole
from tests.support.checkpoints import flip_bit, manifest_of

SHAPE = (40, 50)
HALVES = (whole("w", SHAPE, 0, 1200), whole("w", SHAPE, 1200, 2000))


def save(
    root: Path, step: int, values: tuple[float, float], base: Path | None = None, token: tuple[int, int] = (1, 1)
) -> Path:
    """Two ranks save their halves of one tensor, each filled with a value."""
    place = Place(root, step, Token(*token))
    parts = [
        write_part(
            place,
            rank,
            [(piece, filled(piece, value))],
            {"rng": f"rank {rank} at step {step}"},
            step,
            base=place_of(base) if base else None,
        )
        for rank, (piece, value) in enumerate(zip(HALVES, values, strict=True))
    ]
    return commit(root, manifest_of(place, [part.record for part in parts], {"w": SHAPE}))


def filled(piece: Slice, value: float) -> dict[str, memoryview]:
    return {kind: np.full(piece.elements, value + index, np.float32).data for index, kind in enumerate(KINDS)}


def shard(manifest: Path, rank: int) -> Path:
    return place_of(manifest).shard(rank)


def content(manifest: Path) -> list[float]:
    reader = Reader(manifest)
    return [float(x) for kind in KINDS for x in reader.read_flat("w", kind, 0, 2000)[[0, 1199, 1200, 1999]]]


def test_what_has_not_changed_is_not_written_again(tmp_path: Path) -> None:
    first = save(tmp_path, 1, (1.0, 2.0))
    second = save(tmp_path, 2, (1.0, 3.0), first)
    records = read_manifest(second).shards
    digest = read_manifest(first).shards[0].digest
    size = shard(first, 0).stat().st_size
    assert records[0].origin == Origin(step=1, epoch=1, attempt=1, rank=0, bytes=size, digest=digest)
    assert records[1].origin is None
    assert shard(second, 0).stat().st_size < 1000 < 1200 * 4 * 3 < size
    assert content(second) == [1, 1, 3, 3, 2, 2, 4, 4, 3, 3, 5, 5]
    assert content(first) == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
    assert verify(second, deep=True) == []
    listed = list_checkpoints(tmp_path)
    assert [one.bytes - one.written_bytes for one in listed] == [size, 0]
    assert listed[0].written_bytes == sum(shard(second, rank).stat().st_size for rank in (0, 1))


def test_the_state_of_the_rank_is_of_its_own_step(tmp_path: Path) -> None:
    second = save(tmp_path, 2, (1.0, 2.0), save(tmp_path, 1, (1.0, 2.0)))
    assert Reader(second).rank_state(0) == {"rng": "rank 0 at step 2"}
    assert Reader(second).rank_state(1) == {"rng": "rank 1 at step 2"}


def test_a_chain_refers_to_where_the_bytes_are(tmp_path: Path) -> None:
    last = save(tmp_path, 1, (1.0, 2.0))
    for step in (2, 3, 4):
        last = save(tmp_path, step, (1.0, float(step)), last)
    origin = read_manifest(last).shards[0].origin
    assert origin is not None
    assert origin.step == 1
    assert weights_digest(last) == weights_digest(save(tmp_path / "whole", 4, (1.0, 4.0)))


def test_nothing_that_is_needed_is_deleted(tmp_path: Path) -> None:
    """Retention keeps the file of a deleted checkpoint as long as a later one refers to it, and no longer."""
    first = save(tmp_path, 1, (1.0, 2.0))
    second = save(tmp_path, 2, (1.0, 3.0), first)
    third = save(tmp_path, 3, (1.0, 4.0), second)
    prune(tmp_path, 1, token=(1, 1))
    assert [one.path for one in list_checkpoints(tmp_path)] == [third]
    assert [file.name for file in sorted(tmp_path.rglob("*")) if file.is_file() and "step-00000001" in str(file)] == [
        "shard-00000.safetensors"
    ]
    assert not second.parent.exists()
    assert verify(third, deep=True) == []
    assert content(third)[:4] == [1, 1, 4, 4]
    assert prune(tmp_path, 1, token=(1, 1)) == []
    fourth = save(tmp_path, 4, (5.0, 4.0), third)
    removed = prune(tmp_path, 1, token=(1, 1))
    assert [one.path for one in list_checkpoints(tmp_path)] == [fourth]
    assert place_of(third).shard_dir not in removed
    assert not first.parent.exists()
    assert shard(third, 1).exists()
    assert not shard(third, 0).exists()
    assert content(fourth)[:4] == [5, 5, 4, 4]


def test_a_later_gang_keeps_and_sweeps_what_an_earlier_one_wrote(tmp_path: Path) -> None:
    first = save(tmp_path, 1, (1.0, 2.0))
    second = save(tmp_path, 2, (1.0, 3.0), first, (1, 2))
    assert prune(tmp_path, 1, token=(1, 2)) == [first]
    assert verify(second, deep=True) == []
    assert prune(tmp_path, 1, token=(1, 3)) == []
    assert verify(second, deep=True) == []
    save(tmp_path, 3, (2.0, 3.0), second, (1, 3))
    prune(tmp_path, 1, token=(1, 3))
    assert not first.parent.exists()


def test_what_this_gang_is_writing_stays(tmp_path: Path) -> None:
    first = save(tmp_path, 1, (1.0, 2.0))
    second = save(tmp_path, 2, (1.0, 2.0), first)
    writing = Place(tmp_path, 3, Token(1, 1))
    write_part(writing, 0, [(HALVES[0], filled(HALVES[0], 9.0))], {}, 3, base=place_of(second))
    prune(tmp_path, 1, token=(1, 1))
    assert writing.shard(0).exists()
    assert verify(second, deep=True) == []


@pytest.mark.parametrize("break_it", ["missing", "short", "sidecar missing", "sidecar torn"])
def test_a_base_that_is_not_whole_is_not_relied_on(tmp_path: Path, break_it: str) -> None:
    first = save(tmp_path, 1, (1.0, 2.0))
    place = place_of(first)
    if break_it == "missing":
        place.shard(0).unlink()
    elif break_it == "short":
        place.shard(0).write_bytes(place.shard(0).read_bytes()[:-1])
    elif break_it == "sidecar missing":
        place.sidecar(0).unlink()
    else:
        place.sidecar(0).write_bytes(place.sidecar(0).read_bytes()[:40])
    second = save(tmp_path, 2, (1.0, 2.0), first)
    assert read_manifest(second).shards[0].origin is None
    assert read_manifest(second).shards[1].origin is not None
    assert verify(second, deep=True) == []


def test_damage_is_found_through_the_reference(tmp_path: Path) -> None:
    first = save(tmp_path, 1, (1.0, 2.0))
    second = save(tmp_path, 2, (1.0, 3.0), first)
    flip_bit(shard(first, 0), -1)
    assert "does not match its digest" in verify(second, deep=True)[0]
    with pytest.raises(CorruptCheckpoint) as raised:
        Reader(second).read_flat("w", "exp_avg_sq", 0, 2000)
    assert raised.value.path == str(second)
    shard(first, 0).unlink()
    assert verify(second) == [f"{shard(first, 0)} is missing"]
    assert newest(tmp_path) == second  # as with any shard, it is the restore that finds out


def test_a_commit_checks_what_it_refers_to(tmp_path: Path) -> None:
    first = save(tmp_path, 1, (1.0, 2.0))
    place = Place(tmp_path, 2, Token(1, 1))
    parts = [
        write_part(place, rank, [(piece, filled(piece, 1.0 + rank))], {}, 2, base=place_of(first))
        for rank, piece in enumerate(HALVES)
    ]
    shard(first, 1).unlink()
    manifest = manifest_of(place, [part.record for part in parts], {"w": SHAPE})
    with pytest.raises(Exception, match="cannot be committed"):
        commit(tmp_path, manifest)
    assert dataclasses.replace(manifest).bytes > manifest.written_bytes

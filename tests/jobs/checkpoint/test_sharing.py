"""Who reads which block, and how blocks travel: each is read once, everybody gets what it needs, memory is bounded."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from jobs.checkpoint.catalogue import Catalogue, blocks_of, pack, unpack, within
from jobs.checkpoint.shardfile import BLOCK_ELEMENTS, KINDS, ShardHeader, Slice, StoredSlice
from jobs.checkpoint.sharing import BlockKey, Numbering, assign, rounds
from jobs.checkpoint.slices import overlap, whole
from jobs.checkpoint.source import DiskSource
from tests.support.checkpoints import write_checkpoint


def header(*elements: int) -> ShardHeader:
    slices = [whole(f"t{index}", (count,)) for index, count in enumerate(elements)]
    return ShardHeader(path=Path("x"), slices=tuple(StoredSlice(slice=s, offsets={}, blocks={}) for s in slices))


HEADERS = {0: header(10, 3 * BLOCK_ELEMENTS + 5), 1: header(7), 2: header(BLOCK_ELEMENTS, 1)}


def test_blocks_are_numbered_one_after_the_other() -> None:
    numbering = Numbering(HEADERS)
    total = len(KINDS) * (1 + 4 + 1 + 1 + 1)
    keys = [numbering.key(block) for block in range(total)]
    assert keys == sorted(set(keys))
    assert numbering.ids(keys).tolist() == list(range(total))
    assert sum(map(numbering.elements, range(total))) == len(KINDS) * (
        10 + 3 * BLOCK_ELEMENTS + 5 + 7 + BLOCK_ELEMENTS + 1
    )
    assert numbering.elements(int(numbering.ids([BlockKey(0, 2, 1, 3)])[0])) == 5


@pytest.mark.parametrize("seed", range(20))
def test_every_block_is_read_once_by_one_that_needs_it(seed: int) -> None:
    draw = random.Random(seed)
    numbering = Numbering(HEADERS)
    total, world = len(KINDS) * 8, draw.randint(1, 6)
    needs = [np.array(sorted(draw.sample(range(total), draw.randint(0, total))), np.int64) for _ in range(world)]
    answers = [assign(needs, numbering, rank) for rank in range(world)]
    shared = answers[0][1]
    assert all(answer[1] == shared for answer in answers)
    read = [block for alone, _ in answers for block in alone] + [one.block for one in shared]
    assert sorted(read) == sorted({block for some in needs for block in some.tolist()})
    for rank, (alone, _) in enumerate(answers):
        got = [*alone, *(one.block for one in shared if rank in (one.reader, *one.others))]
        assert sorted(got) == needs[rank].tolist()
    limit = draw.choice([1, 4 * BLOCK_ELEMENTS, 10 * BLOCK_ELEMENTS])
    cut = list(rounds(shared, limit))
    arrived: list[tuple[int, int]] = []
    held: set[int] = set()
    for step in cut:
        held |= {one.block for one in step.blocks if one.first}
        assert {one.block for one in step.blocks} <= held
        held -= {one.block for one in step.blocks if one.last}
        arrived += [(one.block, other) for one in step.blocks for other in one.others]
        for rank in range(world):
            out = [one for one in step.blocks if one.reader == rank]
            into = [one for one in step.blocks if rank in one.others]
            assert sum(one.bytes * len(one.others) for one in out) <= limit or len(out) == len(out[0].others) == 1
            assert sum(one.bytes for one in into) <= limit or len(into) == 1
            assert sorted(b for other in range(world) for b in step.between(other, rank)) == sorted(
                one.block for one in into
            )
    assert not held
    assert sorted(arrived) == sorted((one.block, other) for one in shared for other in one.others)
    assert sum(one.first for step in cut for one in step.blocks) == len(shared)


def test_what_all_need_is_read_by_all_in_equal_shares() -> None:
    """As under ZeRO-0: every replica needs every byte."""
    numbering = Numbering({0: header(*[BLOCK_ELEMENTS] * 40)})
    needs = [np.arange(120, dtype=np.int64)] * 4
    shared = assign(needs, numbering, 0)[1]
    assert [sum(one.reader == rank for one in shared) for rank in range(4)] == [30] * 4
    first = next(rounds(shared, 12 * 4 * BLOCK_ELEMENTS))
    assert {one.reader for one in first.blocks} == {0, 1, 2, 3}, "no reader is idle while the others read"


def test_an_overlap_is_cut_at_the_borders_of_blocks() -> None:
    """Whatever the boxes: all blocks together are the overlap, and no run leaves its block."""
    shape = (900, 3000)
    columns = Slice(name="w", shape=shape, box=((0, 900), (1000, 2500)), start=5, stop=900 * 1500 - 7)
    for wanted in (whole("w", shape), whole("w", shape, 100, 2_300_000), columns):
        shared = overlap(wanted, columns)
        pieces = [within(shared, index) for index in blocks_of(shared)]
        assert all(len(length) for _, _, length in pieces)
        assert all((begin >= 0).all() and (begin + length <= BLOCK_ELEMENTS).all() for _, begin, length in pieces)
        pairs = [
            (at + i, index * BLOCK_ELEMENTS + b + i)
            for index, (ats, begins, lengths) in zip(blocks_of(shared), pieces, strict=True)
            for at, b, n in zip(ats.tolist(), begins.tolist(), lengths.tolist(), strict=True)
            for i in (0, n - 1)
        ]
        starts = dict(zip(shared.a.tolist(), shared.b.tolist(), strict=True))
        assert all(dict(pairs)[a] == b for a, b in starts.items())
        assert sum(int(length.sum()) for _, _, length in pieces) == shared.elements


def test_headers_travel_without_what_their_rank_keeps(tmp_path: Path) -> None:
    catalogue = Catalogue(DiskSource(write_checkpoint(tmp_path)))
    catalogue.read(0)
    catalogue.read(1)
    other = Catalogue(DiskSource(write_checkpoint(tmp_path / "other")))
    for shard, found in unpack(pack(catalogue.headers.items())):
        assert found.slices == catalogue.headers[shard].slices
        assert found.path == catalogue.headers[shard].path
        assert found.rank_state == {}
        for _ in range(2):  # state on disks is filled by turns, and headers travel in each
            other.add(shard, found)
    assert other.covers(whole("w", (30, 10)))
    assert len(other.find(whole("w", (30, 10), 100, 200))) == 2

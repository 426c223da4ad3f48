"""Who reads which block of a checkpoint when several ranks need it, and in which rounds blocks travel. Numpy, no torch.

Every rank computes the same answer from the same needs, so nobody has to be told.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jobs.checkpoint.shardfile import BLOCK_ELEMENTS, ELEMENT_BYTES, KINDS, ShardHeader, block_count

Ids = npt.NDArray[np.int64]
ROUND_BYTES = 64 << 20  # what a rank sends, and what it receives, in one round; a single block may be more


class BlockKey(NamedTuple):
    """One block of a checkpoint; in this order they lie in the files.

    Attributes:
        shard: Position of the shard in the manifest.
        kind: Position in :data:`KINDS`.
        number: Position of the slice in the shard's table.
        block: Position of the block in the slice.
    """

    shard: int
    kind: int
    number: int
    block: int


class Numbering:
    """All blocks of a checkpoint as consecutive numbers, the same on every rank.

    Args:
        headers: The header of every shard, by its position in the manifest.
    """

    def __init__(self, headers: Mapping[int, ShardHeader]) -> None:
        self._starts: list[int] = []
        self._rows: list[tuple[int, int, int, int]] = []  # shard, kind, number, elements
        self._first: dict[tuple[int, int, int], int] = {}
        end = 0
        for shard in sorted(headers):
            for kind in range(len(KINDS)):
                for number, stored in enumerate(headers[shard].slices):
                    self._starts.append(end)
                    self._rows.append((shard, kind, number, stored.slice.elements))
                    self._first[shard, kind, number] = end
                    end += block_count(stored)

    def ids(self, keys: Sequence[BlockKey]) -> Ids:
        """Numbers of blocks."""
        return np.array([self._first[key[:3]] + key.block for key in keys], dtype=np.int64)

    def key(self, block: int) -> BlockKey:
        """The block of a number."""
        row = bisect_right(self._starts, block) - 1
        return BlockKey(*self._rows[row][:3], block - self._starts[row])

    def elements(self, block: int) -> int:
        """Elements of a block."""
        row = bisect_right(self._starts, block) - 1
        return min(BLOCK_ELEMENTS, self._rows[row][3] - (block - self._starts[row]) * BLOCK_ELEMENTS)


class Shared(NamedTuple):
    """A block on its way from the rank that reads it to others that need it.

    Attributes:
        block: Its number.
        bytes: Its size.
        reader: The rank that reads it.
        others: The ranks that it is sent to now.
        first: It has to be read for that.
        last: Nobody waits for it afterwards.
    """

    block: int
    bytes: int
    reader: int
    others: tuple[int, ...]
    first: bool = True
    last: bool = True


@dataclass(frozen=True, slots=True)
class Round:
    """Blocks that travel together.

    Attributes:
        blocks: The blocks, in an order on which all ranks agree.
    """

    blocks: list[Shared] = field(default_factory=list)

    def of(self, reader: int) -> list[Shared]:
        """The blocks that a rank sends."""
        return [one for one in self.blocks if one.reader == reader]

    def between(self, source: int, target: int) -> list[int]:
        """Numbers of the blocks that one rank sends to another."""
        return [one.block for one in self.blocks if one.reader == source and target in one.others]


def assign(needs: Sequence[Ids], numbering: Numbering, rank: int) -> tuple[list[int], list[Shared]]:
    """Choose a reader for every block, among those that need it, so that all read about as much.

    Args:
        needs: Per rank, the numbers of the blocks that it needs, ascending.
        numbering: What the numbers mean.
        rank: This rank.

    Returns:
        The blocks that only this rank needs, and the blocks that several need (the same on every rank): the first one
        of each reader, the second one of each, and so on, so that all of them are busy.
    """
    ids = np.concatenate(needs)
    who = np.repeat(np.arange(len(needs)), [len(some) for some in needs])
    order = np.argsort(ids, kind="stable")
    ids, who = ids[order], who[order]
    blocks, first = np.unique(ids, return_index=True)
    ends = np.append(first[1:], len(ids))
    load = [0] * len(needs)
    alone: list[int] = []
    count = [0] * len(needs)
    shared: list[tuple[int, Shared]] = []
    single = ends - first == 1
    for block, at in zip(blocks[single].tolist(), first[single].tolist(), strict=True):
        load[int(who[at])] += numbering.elements(block) * ELEMENT_BYTES
        if who[at] == rank:
            alone.append(block)
    for block, low, high in zip(*(column[~single].tolist() for column in (blocks, first, ends)), strict=True):
        ranks = who[low:high].tolist()
        size = numbering.elements(block) * ELEMENT_BYTES
        reader = min(ranks, key=lambda one: (load[one], one))
        load[reader] += size
        count[reader] += 1
        others = tuple(one for one in ranks if one != reader)
        shared.append((count[reader], Shared(block, size, reader, others)))
    return alone, [one for _, one in sorted(shared, key=lambda pair: (pair[0], pair[1].block))]


def rounds(shared: Sequence[Shared], limit_bytes: int = ROUND_BYTES) -> Iterator[Round]:
    """Cut the blocks into rounds in which no rank sends or receives more than ``limit_bytes``, or than one block."""
    current, sent, received = Round(), dict[int, int](), dict[int, int]()
    for one in _in_parts(shared, limit_bytes):
        out = sent.get(one.reader, 0) + one.bytes * len(one.others)
        most = max(received.get(other, 0) for other in one.others) + one.bytes
        # A round that is empty takes any block; a rank that has nothing in this round yet may take a large one.
        if (one.reader in sent and out > limit_bytes) or (most > one.bytes and most > limit_bytes):
            yield current
            current, sent, received = Round(), {}, {}
        current.blocks.append(one)
        sent[one.reader] = sent.get(one.reader, 0) + one.bytes * len(one.others)
        for other in one.others:
            received[other] = received.get(other, 0) + one.bytes
    if current.blocks:
        yield current


def _in_parts(shared: Sequence[Shared], limit_bytes: int) -> Iterator[Shared]:
    """What many ranks need is not sent to all of them at once: a copy for each would not fit into memory."""
    wave: list[list[Shared]] = []
    busy: set[int] = set()
    for one in shared:
        if one.reader in busy:
            yield from _by_turns(wave)
            wave, busy = [], set()
        most = max(1, limit_bytes // one.bytes)
        cuts = [one.others[at : at + most] for at in range(0, len(one.others), most)]
        parts = [one._replace(others=cut, first=i == 0, last=i == len(cuts) - 1) for i, cut in enumerate(cuts)]
        wave.append(parts)
        busy.add(one.reader)
    yield from _by_turns(wave)


def _by_turns(wave: Sequence[Sequence[Shared]]) -> Iterator[Shared]:
    """The first part of each block, then the second part of each, and so on."""
    for turn in range(max(map(len, wave), default=0)):
        yield from (parts[turn] for parts in wave if turn < len(parts))

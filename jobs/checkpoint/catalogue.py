"""Which shard of a checkpoint holds which elements, block by block. Numpy, no torch."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jobs.checkpoint.errors import CorruptCheckpoint
from jobs.checkpoint.shardfile import BLOCK_ELEMENTS, ShardHeader, Slice, StoredSlice
from jobs.checkpoint.slices import Index, Overlap, overlap
from jobs.checkpoint.source import ShardSource
from jobs.location import locate


class Found(NamedTuple):
    """A stored slice that shares elements with a wanted one.

    Attributes:
        shard: Position of its shard in the manifest.
        number: Its position in the shard's slice table.
        header: The shard's header.
        stored: The slice.
        shared: What they share; ``a`` counts in the wanted slice, ``b`` in the stored one.
    """

    shard: int
    number: int
    header: ShardHeader
    stored: StoredSlice
    shared: Overlap


class Catalogue:
    """The slice tables of a checkpoint.

    Headers are read when needed, beginning with the one of ``rank``: a reader with the plan of the writers finds
    nearly everything there, and opens few others.

    Args:
        source: The checkpoint.
        rank: Rank whose shard is tried first.
    """

    def __init__(self, source: ShardSource, rank: int = 0) -> None:
        self._source = source
        self._shards = source.manifest.shards
        self.headers: dict[int, ShardHeader] = {}
        self._by_name: dict[str, list[tuple[int, int]]] = {}
        count = len(self._shards)
        self._order = [(rank + offset) % count for offset in range(count - 1, -1, -1)]

    def read(self, shard: int) -> ShardHeader:
        """The header of a shard; raises CorruptCheckpoint, StorageError."""
        if shard not in self.headers:
            self.add(shard, self._source.header(self._shards[shard]))
        return self.headers[shard]

    def add(self, shard: int, header: ShardHeader) -> None:
        """Take in a header that somebody else has read and verified, unless it is known."""
        if shard in self.headers:
            return
        self.headers[shard] = header
        for number, stored in enumerate(header.slices):
            self._by_name.setdefault(stored.slice.name, []).append((shard, number))

    def rank_state(self, rank: int) -> dict[str, Any] | None:
        """What rank ``rank`` of the writers kept of itself; None when there was no such rank."""
        for shard, record in enumerate(self._shards):
            if record.rank == rank:
                return dict(self.read(shard).rank_state)
        return None

    def covers(self, wanted: Slice) -> bool:
        """Whether the headers that are known hold all of a slice; raises CorruptCheckpoint."""
        return self._search(wanted, further=False)[1] == 0

    def find(self, wanted: Slice) -> list[Found]:
        """Stored slices that together are ``wanted``. Reads further headers until they are.

        Raises:
            CorruptCheckpoint: What is stored is damaged, incomplete, or of another shape.
            StorageError: A header cannot be read.
        """
        found, missing = self._search(wanted, further=True)
        if missing > 0:
            raise CorruptCheckpoint(self._source.path, f"{missing} elements of {wanted.name} are in no shard")
        return found

    def _search(self, wanted: Slice, *, further: bool) -> tuple[list[Found], int]:
        """What the headers have of a slice, and how many elements are missing."""
        found: list[Found] = []
        missing, seen = wanted.elements, 0
        while missing > 0:
            known = self._by_name.get(wanted.name, ())
            if seen == len(known):
                if not further or not self._read_next():
                    break
                continue
            shard, number = known[seen]
            seen += 1
            header = self.headers[shard]
            shared = self._match(wanted, header.slices[number])
            if shared.elements:
                found.append(Found(shard, number, header, header.slices[number], shared))
                missing -= shared.elements
        if missing < 0:
            raise CorruptCheckpoint(self._source.path, f"{wanted.name} is stored more than once")
        return found, missing

    def _match(self, wanted: Slice, stored: StoredSlice) -> Overlap:
        try:
            return overlap(wanted, stored.slice)
        except ValueError as error:
            raise CorruptCheckpoint(self._source.path, f"the tensors do not fit the model: {error}") from error

    def _read_next(self) -> bool:
        """Read one more header; whether there was one."""
        while self._order and self._order[-1] in self.headers:
            self._order.pop()
        if not self._order:
            return False
        self.read(self._order.pop())
        return True


def blocks_of(shared: Overlap) -> list[int]:
    """The blocks of the stored slice in which the shared elements lie, ascending."""
    first, last = shared.b // BLOCK_ELEMENTS, (shared.b + shared.length - 1) // BLOCK_ELEMENTS
    touched = [first, last]
    for low, high in zip(first[last - first > 1], last[last - first > 1], strict=True):
        touched.append(np.arange(low, high + 1))
    blocks: list[int] = np.unique(np.concatenate(touched)).tolist()
    return blocks


def within(shared: Overlap, index: int) -> tuple[Index, Index, Index]:
    """The part of an overlap that lies in one block: where in the wanted slice, where in the block, how long."""
    low = index * BLOCK_ELEMENTS
    # b ascends, because runs do: what does not meet the block is before or behind.
    first = int(np.searchsorted(shared.b + shared.length, low, side="right"))
    last = int(np.searchsorted(shared.b, low + BLOCK_ELEMENTS, side="left"))
    a, b, length = (column[first:last] for column in shared)
    begin = np.maximum(b, low)
    end = np.minimum(b + length, low + BLOCK_ELEMENTS)
    return a + begin - b, begin - low, end - begin


def pack(headers: Iterable[tuple[int, ShardHeader]]) -> bytes:
    """Headers for another rank; what their ranks keep of themselves stays behind."""
    rows = [
        [shard, str(header.path), [[_columns(stored.slice), stored.offsets, stored.blocks] for stored in header.slices]]
        for shard, header in headers
    ]
    return zlib.compress(json.dumps(rows).encode(), 1)


def unpack(data: bytes) -> list[tuple[int, ShardHeader]]:
    """The inverse of :func:`pack`."""
    return [
        (shard, ShardHeader(path=locate(path), slices=tuple(_stored(*row) for row in slices)))
        for shard, path, slices in json.loads(zlib.decompress(data))
    ]


def _columns(piece: Slice) -> list[Any]:
    return [piece.name, piece.shape, piece.box, piece.start, piece.stop]


def _stored(columns: list[Any], offsets: dict[str, int], blocks: dict[str, list[str]]) -> StoredSlice:
    name, shape, box, start, stop = columns
    piece = Slice(name=name, shape=tuple(shape), box=tuple((x, y) for x, y in box), start=start, stop=stop)
    return StoredSlice(slice=piece, offsets=offsets, blocks=blocks)

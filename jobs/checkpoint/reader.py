"""Reads any range of any tensor of a committed checkpoint, whatever plan wrote it, and verifies what it reads."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.checkpoint.errors import CorruptCheckpoint
from jobs.checkpoint.manifest import Manifest
from jobs.checkpoint.shardfile import BLOCK_ELEMENTS, ELEMENT_BYTES, ShardHeader, Slice, StoredSlice
from jobs.checkpoint.slices import Overlap, copy_runs, overlap, whole
from jobs.checkpoint.source import DiskSource, ShardSource
from jobs.location import Location, Url

Array = npt.NDArray[np.float32]
_FLOAT = np.dtype("<f4")
_BLOCKS_KEPT = 8  # 4 MiB each; neighbouring ranges meet in one block


class Reader:
    """Random access to a checkpoint.

    Shard headers are read when needed, beginning with the one of ``rank``: a reader with the plan of the writers finds
    nearly everything there, and opens few others.

    Args:
        source: Path of the manifest, or another source of shards.
        rank: Rank whose shard is tried first.

    Raises:
        CorruptCheckpoint: The manifest is damaged.
        StorageError: It cannot be read.
    """

    def __init__(self, source: str | Location | ShardSource, rank: int = 0) -> None:
        self._source: ShardSource = DiskSource(source) if isinstance(source, str | Path | Url) else source
        self.path = self._source.path
        self.manifest: Manifest = self._source.manifest
        self._index: dict[str, list[tuple[ShardHeader, StoredSlice]]] = {}
        self._headers: dict[int, ShardHeader] = {}
        count = len(self.manifest.shards)
        first = rank % count if count else 0
        self._unread = [self.manifest.shards[(first + i) % count] for i in range(count - 1, -1, -1)]
        self._blocks: OrderedDict[tuple[Location, int], Array] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """Names of all tensors, ascending."""
        return sorted(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a tensor; raises ``KeyError``."""
        return self.manifest.tensors[name]

    def rank_state(self, rank: int) -> dict[str, Any] | None:
        """What rank ``rank`` of the writers kept of itself; None when there was no such rank."""
        while rank not in self._headers and self._unread:
            self._read_next_header()
        header = self._headers.get(rank)
        return dict(header.rank_state) if header is not None else None

    def read_flat(self, name: str, kind: str, start: int, stop: int) -> Array:
        """Elements [start, stop) of a tensor in its global flat order.

        Args:
            name: Global name.
            kind: ``master``, ``exp_avg`` or ``exp_avg_sq``.
            start: First element.
            stop: One past the last element.

        Raises:
            CorruptCheckpoint: What is stored is damaged or incomplete.
            StorageError: A file cannot be read.
            KeyError: There is no such tensor.
        """
        out = np.empty(stop - start, dtype=_FLOAT)
        self.read_slice(whole(name, self.shape(name), start, stop), kind, out)
        return out

    def read_slice(self, wanted: Slice, kind: str, out: Array) -> None:
        """Fill ``out`` with a slice of any box; raises as :meth:`read_flat`."""
        for header, stored, shared in self._sources(wanted):
            self._copy(header, stored, kind, shared, out)

    def _sources(self, wanted: Slice) -> list[tuple[ShardHeader, StoredSlice, Overlap]]:
        """Stored slices that together are ``wanted``. Reads further headers until they are."""
        sources: list[tuple[ShardHeader, StoredSlice, Overlap]] = []
        missing = wanted.elements
        seen = 0
        while missing > 0:
            known = self._index.get(wanted.name, [])
            if seen == len(known):
                if not self._unread:
                    raise CorruptCheckpoint(self.path, f"{missing} elements of {wanted.name} are in no shard")
                self._read_next_header()
                continue
            header, stored = known[seen]
            seen += 1
            shared = self._match(wanted, stored)
            if shared.elements:
                sources.append((header, stored, shared))
                missing -= shared.elements
        if missing < 0:
            raise CorruptCheckpoint(self.path, f"{wanted.name} is stored more than once")
        return sources

    def _match(self, wanted: Slice, stored: StoredSlice) -> Overlap:
        try:
            return overlap(wanted, stored.slice)
        except ValueError as error:
            raise CorruptCheckpoint(self.path, f"the tensors do not fit the model: {error}") from error

    def _read_next_header(self) -> None:
        shard = self._unread.pop()
        header = self._source.header(shard)
        self._headers[shard.rank] = header
        for stored in header.slices:
            self._index.setdefault(stored.slice.name, []).append((header, stored))

    def _copy(self, header: ShardHeader, stored: StoredSlice, kind: str, shared: Overlap, out: Array) -> None:
        # Runs that cross the border of a block are cut there; b ascends, because runs do.
        first, last = int(shared.b[0]), int(shared.b[-1] + shared.length[-1] - 1)
        for index in range(first // BLOCK_ELEMENTS, last // BLOCK_ELEMENTS + 1):
            low = index * BLOCK_ELEMENTS
            begin = np.maximum(shared.b, low)
            end = np.minimum(shared.b + shared.length, low + BLOCK_ELEMENTS)
            live = end > begin
            if not live.any():
                continue
            at = (shared.a + begin - shared.b)[live]
            copy_runs(out, at, self._block(header, stored, kind, index), begin[live] - low, (end - begin)[live])

    def _block(self, header: ShardHeader, stored: StoredSlice, kind: str, index: int) -> Array:
        key = (header.path, stored.offsets[kind] + index * BLOCK_ELEMENTS * ELEMENT_BYTES)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        data = self._source.block(header, stored, kind, index)
        block = np.frombuffer(data, dtype=_FLOAT)
        self._blocks[key] = block
        if len(self._blocks) > _BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return block

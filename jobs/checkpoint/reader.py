"""Reads any range of any tensor of a committed checkpoint, whatever plan wrote it, and verifies what it reads."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.checkpoint.catalogue import Catalogue, Found, blocks_of, within
from jobs.checkpoint.manifest import Manifest
from jobs.checkpoint.shardfile import BLOCK_ELEMENTS, ELEMENT_BYTES, ShardHeader, Slice, StoredSlice
from jobs.checkpoint.slices import copy_runs, whole
from jobs.checkpoint.source import ShardSource, source_of
from jobs.location import Location

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
        self._source = source_of(source)
        self.path = self._source.path
        self.manifest: Manifest = self._source.manifest
        self._catalogue = Catalogue(self._source, rank)
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
        return self._catalogue.rank_state(rank)

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
        for found in self._catalogue.find(wanted):
            self._copy(found, kind, out)

    def _copy(self, found: Found, kind: str, out: Array) -> None:
        for index in blocks_of(found.shared):
            block = self._block(found.header, found.stored, kind, index)
            at, begin, length = within(found.shared, index)
            copy_runs(out, at, block, begin, length)

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

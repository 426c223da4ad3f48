"""Filling the live optimizer state from a checkpoint, on disk each byte read once by the whole gang.

Ranks say which blocks they need; a block that several need is read by one of them and sent to the others, in rounds
that bound the memory. A gang with the plan of the writers finds everything in its own shards: then nothing is sent, nor
are the slice tables exchanged.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from jobs.checkpoint.catalogue import Catalogue, Found, blocks_of, pack, unpack, within
from jobs.checkpoint.gang import agree, device, gather_bytes, rank_and_world
from jobs.checkpoint.shardfile import KINDS, Slice
from jobs.checkpoint.sharing import BlockKey, Numbering, Round, assign, rounds
from jobs.checkpoint.slices import Index, copy_runs
from jobs.checkpoint.source import ShardSource
from strategies.errors import ResumeRefused, StorageError

Array = npt.NDArray[np.float32]
_FLOAT = np.dtype("<f4")
_OVERLAPS_KEPT = 32
_FEW_RUNS = 16  # on a device: below, one copy each; above, one scatter


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A slice that this rank needs, and where it goes.

    Attributes:
        slice: The slice.
        views: Per kind, the flat tensor to fill; its first ``slice.elements`` are the slice.
    """

    slice: Slice
    views: Mapping[str, torch.Tensor]


@dataclass(kw_only=True, slots=True)
class Traffic:
    """What a restore has moved on this rank, in bytes of tensors.

    Attributes:
        read_bytes: Read from the checkpoint.
        received_bytes: Received from other ranks.
    """

    read_bytes: int = 0
    received_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            read_bytes=self.read_bytes + other.read_bytes, received_bytes=self.received_bytes + other.received_bytes
        )


def fill(source: ShardSource, catalogue: Catalogue, targets: Sequence[Target]) -> Traffic:
    """Fill the targets of this rank. Collective.

    Args:
        source: The checkpoint.
        catalogue: Its slice tables, as far as this rank knows them.
        targets: What this rank needs.

    Raises:
        CorruptCheckpoint: The checkpoint is damaged, or lacks something; on every rank.
        StorageError: It cannot be read; on every rank.
    """
    rank, world = rank_and_world()
    filling = _Filling(source, catalogue, targets)
    if world == 1 or not source.shared_reads or _all_at_home(source, catalogue, targets, rank, world):
        filling.find_needs()
        filling.read_alone(sorted(filling.needs))
    else:
        _exchange_headers(catalogue, rank, world)
        _fill_together(filling, Numbering(catalogue.headers), rank)
    return filling.traffic


def _all_at_home(source: ShardSource, catalogue: Catalogue, targets: Sequence[Target], rank: int, world: int) -> bool:
    """Whether every rank finds all that it needs, and only that, in the shards that are its to open. Collective."""
    error: Exception | None = None
    home = False
    try:
        own = range(rank, len(source.manifest.shards), world)
        for shard in own:
            catalogue.read(shard)
        # Knowing others' headers, from an earlier turn of state on disks, is not having their shards.
        home = catalogue.headers.keys() <= set(own) and all(catalogue.covers(target.slice) for target in targets)
    except StorageError as caught:
        error = caught
    return all(agree(error, home))


def _exchange_headers(catalogue: Catalogue, rank: int, world: int) -> None:
    mine = pack(catalogue.headers.items())
    for other, data in enumerate(gather_bytes(mine)):
        for shard, header in unpack(data) if other != rank else ():
            catalogue.add(shard, header)


def _fill_together(filling: _Filling, numbering: Numbering, rank: int) -> None:
    error: Exception | None = None
    try:
        filling.find_needs()
    except (StorageError, ResumeRefused) as caught:
        error = caught
    agree(error)
    mine = np.sort(numbering.ids(list(filling.needs)))
    packed = gather_bytes(zlib.compress(mine.tobytes(), 1))
    needs = [np.frombuffer(zlib.decompress(data), dtype=np.int64) for data in packed]
    alone, shared = assign(needs, numbering, rank)
    held: dict[int, Array] = {}
    for step in rounds(shared):
        _one_round(filling, step, numbering, rank, len(needs), held)
    filling.read_alone(sorted(map(numbering.key, alone)))


def _one_round(
    filling: _Filling, step: Round, numbering: Numbering, rank: int, world: int, held: dict[int, Array]
) -> None:
    """Read what is this rank's to read, and send it to whom needs it. Collective.

    Args:
        filling: The targets.
        step: What travels.
        numbering: What its numbers mean.
        rank: This rank.
        world: Number of ranks.
        held: Blocks that were read in an earlier round and go to further ranks in this one.
    """
    error: Exception | None = None
    mine = step.of(rank)
    try:
        held |= {one.block: filling.read(numbering.key(one.block)) for one in mine if one.first}
    except StorageError as caught:
        error = caught
    agree(error)  # before the exchange, in which a failed rank would be waited for
    sent = [[held[block] for block in step.between(rank, other)] for other in range(world)]
    got = [step.between(other, rank) for other in range(world)]
    sizes = [sum(numbering.elements(block) for block in some) for some in got]
    outgoing = [array for some in sent for array in some]
    send = torch.from_numpy(np.concatenate(outgoing) if outgoing else np.empty(0, _FLOAT)).to(device())
    receive = torch.empty(sum(sizes), dtype=torch.float32, device=device())
    dist.all_to_all_single(receive, send, sizes, [sum(array.size for array in some) for some in sent])
    data, at = receive.cpu().numpy(), 0
    for block in [block for some in got for block in some]:
        count = numbering.elements(block)
        filling.put(numbering.key(block), data[at : at + count])
        at += count
    filling.traffic.received_bytes += data.nbytes
    for one in mine:
        if one.last:
            filling.put(numbering.key(one.block), held.pop(one.block))


class _Filling:
    """The targets of this rank, and which of them wait for which block."""

    def __init__(self, source: ShardSource, catalogue: Catalogue, targets: Sequence[Target]) -> None:
        self._source = source
        self._catalogue = catalogue
        self._targets = targets
        self.needs: dict[BlockKey, list[int]] = {}
        self.traffic = Traffic()
        self._overlaps: OrderedDict[tuple[int, int, int], Found] = OrderedDict()

    def find_needs(self) -> None:
        """Find out which blocks are needed; raises CorruptCheckpoint, StorageError."""
        for number, target in enumerate(self._targets):
            for found in self._catalogue.find(target.slice):
                for index in blocks_of(found.shared):
                    for kind in range(len(KINDS)):
                        key = BlockKey(found.shard, kind, found.number, index)
                        self.needs.setdefault(key, []).append(number)

    def read_alone(self, keys: Sequence[BlockKey]) -> None:
        """Read blocks and put them where they belong, in the order of the files."""
        for key in keys:
            self.put(key, self.read(key))

    def read(self, key: BlockKey) -> Array:
        """One block from the source, verified; raises CorruptCheckpoint, StorageError."""
        header = self._catalogue.headers[key.shard]
        data = self._source.block(header, header.slices[key.number], KINDS[key.kind], key.block)
        self.traffic.read_bytes += len(data)
        return np.frombuffer(data, dtype=_FLOAT)

    def put(self, key: BlockKey, block: Array) -> None:
        """Copy what is needed of a block to its targets."""
        for number in self.needs.get(key, ()):
            at, begin, length = within(self._overlap(number, key).shared, key.block)
            _scatter(self._targets[number].views[KINDS[key.kind]], at, block, begin, length)

    def _overlap(self, number: int, key: BlockKey) -> Found:
        """Found again rather than kept: the runs of all slices at once would take much memory."""
        wanted = (number, key.shard, key.number)
        if wanted not in self._overlaps:
            for found in self._catalogue.find(self._targets[number].slice):
                self._overlaps[number, found.shard, found.number] = found
            while len(self._overlaps) > _OVERLAPS_KEPT and next(iter(self._overlaps)) != wanted:
                self._overlaps.popitem(last=False)
        return self._overlaps[wanted]


def _scatter(view: torch.Tensor, at: Index, block: Array, begin: Index, length: Index) -> None:
    """Copy runs of a block in host memory into a tensor on any device."""
    if view.device.type == "cpu":
        copy_runs(view.numpy(), at, block, begin, length)
        return
    if len(length) <= _FEW_RUNS:
        for to, start, count in zip(at.tolist(), begin.tolist(), length.tolist(), strict=True):
            view[to : to + count].copy_(torch.from_numpy(np.ascontiguousarray(block[start : start + count])))
        return
    total = int(length.sum())
    inside = np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(length) - length, length)
    values = torch.from_numpy(block[np.repeat(begin, length) + inside]).to(view.device)
    view.index_copy_(0, torch.from_numpy(np.repeat(at, length) + inside).to(view.device), values)

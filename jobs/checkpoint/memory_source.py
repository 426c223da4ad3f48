"""The memory tier as a source of shards: parts on this node from shared memory, others through its persister."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

from jobs.checkpoint.errors import CorruptCheckpoint, OutOfReach, storage_error
from jobs.checkpoint.image import image_of
from jobs.checkpoint.manifest import Manifest, ShardRecord, TrainerState
from jobs.checkpoint.memory import Address, Located, MemoryPoint, StreamInfo
from jobs.checkpoint.persister import PersisterLink
from jobs.checkpoint.shardfile import BLOCK_ELEMENTS, ELEMENT_BYTES, ShardHeader, StoredSlice
from jobs.frames import FrameError, Garbled, Message
from jobs.location import Location
from strategies.codec import from_json, to_json
from strategies.plan import ParallelPlan
from strategies.specs import ModelSpec


class MemorySource:
    """One complete generation; see :class:`jobs.checkpoint.source.ShardSource`.

    Only sealed parts are given out, and what comes over the network is checked on its way: there are no digests. A node
    that does not answer proves nothing against what it holds: others that hold the same part are asked, and those that
    have answered come first.

    Args:
        point: The generation and where its parts are.
        link: The persister of this node.

    Raises:
        OutOfReach: Nobody who holds a part can be reached.
        CorruptCheckpoint: What comes is not what was promised.
    """

    shared_reads = False  # what is here is read at no cost, and the persisters send just what is asked of them

    def __init__(self, point: MemoryPoint, link: PersisterLink) -> None:
        self.path = Path(str(point.generation))
        self._point = point
        self._link = link
        self._where: dict[Location, Located] = {}
        self._maps: dict[Location, mmap.mmap] = {}
        self._records: dict[int, Message] = {}
        self._silent: set[Address] = set()
        self.manifest = self._manifest()

    def _manifest(self) -> Manifest:
        first = self._part(self._point.parts[0])
        record, about = first["record"], first["info"]["about"]
        elements = (located.bytes // ELEMENT_BYTES // 3 for located in self._point.parts)
        return Manifest(
            run_id=about["run_id"],
            step=self._point.step,
            epoch=self._point.epoch,
            attempt=self._point.attempt,
            time=record["time"],
            plan=from_json(ParallelPlan, about["plan"]),
            model=from_json(ModelSpec, about["model"]),
            tensors={name: tuple(shape) for name, shape in about["tensors"].items()},
            shards=tuple(
                ShardRecord(rank=located.rank, bytes=located.bytes, digest="", elements=count)
                for located, count in zip(self._point.parts, elements, strict=True)
            ),
            trainer=from_json(TrainerState, record["trainer"]),
            extra=record["extra"],
        )

    def _ask(self, op: str, located: Located, **fields: Any) -> tuple[Message, bytes, list[int]]:
        point, garbled, told = self._point, False, list[str]()
        question = {"step": point.step, "token": [point.epoch, point.attempt], "rank": located.rank}
        for node, address in sorted(located.holders, key=lambda holder: holder[1] in self._silent):
            try:
                return self._link.ask(op, **question, where=to_json(address), **fields)
            except FrameError as error:
                garbled = garbled or isinstance(error, Garbled)
                self._silent.add(address)
                told.append(f"the part of rank {located.rank} on {node} cannot be had: {error}")
        raise (CorruptCheckpoint if garbled else OutOfReach)(self.path, "; ".join(told))

    def _part(self, located: Located) -> Message:
        if located.rank in self._records:
            return self._records[located.rank]
        answer, _, fds = self._ask("part", located)
        path = self._shard(located.rank)
        self._where[path] = located
        for fd in fds:
            if answer["bytes"]:
                self._maps[path] = mmap.mmap(fd, answer["bytes"], prot=mmap.PROT_READ)
            os.close(fd)
        if answer["bytes"] != located.bytes:
            raise CorruptCheckpoint(self.path, f"the part of rank {located.rank} has another size than was told")
        self._records[located.rank] = answer
        return answer

    def _shard(self, rank: int) -> Path:
        return self.path / f"shard-{rank:05d}"

    def header(self, shard: ShardRecord) -> ShardHeader:
        """See :class:`jobs.checkpoint.source.ShardSource`."""
        part = self._part(self._point.parts[shard.rank])
        image = image_of(from_json(StreamInfo, part["info"]).image)
        if image.bytes != shard.bytes:
            raise CorruptCheckpoint(self.path, f"the part of rank {shard.rank} is laid out for {image.bytes} bytes")
        return image.header(self._shard(shard.rank), part["record"]["rank_state"])

    def block(self, header: ShardHeader, stored: StoredSlice, kind: str, index: int) -> bytes:
        """See :class:`jobs.checkpoint.source.ShardSource`."""
        first = index * BLOCK_ELEMENTS
        count = min(BLOCK_ELEMENTS, stored.slice.elements - first) * ELEMENT_BYTES
        low = stored.offsets[kind] + first * ELEMENT_BYTES
        if header.path in self._maps:
            return self._maps[header.path][low : low + count]
        _, data, _ = self._ask("read", self._where[header.path], offset=low, count=count)
        return data


def read_point(path: Path) -> MemoryPoint:
    """What the controller found for this attempt; raises StorageError."""
    try:
        return MemoryPoint.read(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise storage_error("read where the memory tier is", path, error) from error

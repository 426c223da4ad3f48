"""Where the shards of a checkpoint are read from: the one seam between a reader and a tier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from jobs.checkpoint.errors import AbsentFile, CorruptCheckpoint, storage_error
from jobs.checkpoint.layout import place_of
from jobs.checkpoint.manifest import Manifest, ShardRecord, read_manifest
from jobs.checkpoint.shardfile import (
    DamagedShard,
    MissingShard,
    ShardHeader,
    StoredSlice,
    read_block,
    read_header,
)
from jobs.location import Location, Url, locate


class ShardSource(Protocol):
    """One checkpoint, shard by shard. Everything that it gives out has been verified.

    Attributes:
        path: Names the checkpoint in errors.
        manifest: What the checkpoint consists of.
        shared_reads: Every rank reaches every shard, at a cost: each block is then read by one rank and sent to the
            others that need it. Without, each rank reads what it needs.
    """

    shared_reads: bool

    @property
    def path(self) -> Location:
        """Names the checkpoint in errors."""

    @property
    def manifest(self) -> Manifest:
        """What the checkpoint consists of."""

    def header(self, shard: ShardRecord) -> ShardHeader:
        """The header of a shard. Raises CorruptCheckpoint, StorageError."""

    def block(self, header: ShardHeader, stored: StoredSlice, kind: str, index: int) -> bytes:
        """One block of one kind of a slice. Raises CorruptCheckpoint, StorageError."""


class DiskSource:
    """A checkpoint of the disk tier.

    Args:
        manifest: Path of the manifest.

    Raises:
        CorruptCheckpoint: The manifest is damaged.
        StorageError: It cannot be read.
    """

    shared_reads = True

    def __init__(self, manifest: str | Location) -> None:
        self.path = locate(manifest)
        self.manifest = read_manifest(self.path)
        self._place = place_of(self.path)

    def header(self, shard: ShardRecord) -> ShardHeader:
        """See :class:`ShardSource`."""
        own = self._header(self._place.shard(shard.rank), shard.bytes, shard.digest)
        if shard.origin is None:
            return own
        home = shard.origin.place(self._place.root)
        held = self._header(home.shard(shard.origin.rank), shard.origin.bytes, shard.origin.digest)
        return replace(held, rank_state=own.rank_state)

    def _header(self, path: Location, size: int, digest: str) -> ShardHeader:
        try:
            return read_header(path, size=size, digest=digest)
        except MissingShard as error:
            raise AbsentFile(self.path, str(error)) from error
        except DamagedShard as error:
            raise CorruptCheckpoint(self.path, str(error)) from error
        except OSError as error:
            raise storage_error("read the checkpoint shard", path, error) from error

    def block(self, header: ShardHeader, stored: StoredSlice, kind: str, index: int) -> bytes:
        """See :class:`ShardSource`."""
        try:
            return read_block(header, stored, kind, index)
        except DamagedShard as error:
            raise CorruptCheckpoint(self.path, str(error)) from error
        except OSError as error:
            raise storage_error("read the checkpoint shard", header.path, error) from error


def source_of(checkpoint: str | Location | ShardSource) -> ShardSource:
    """The source of a checkpoint that is named by its manifest, or that source itself."""
    return DiskSource(checkpoint) if isinstance(checkpoint, str | Path | Url) else checkpoint

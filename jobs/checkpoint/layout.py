"""Names of the files of a checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple

from jobs.checkpoint.storage import Storage, storage_of, sync_dir, write_all
from jobs.location import L, Location

__all__ = ["Place", "Token", "manifests", "place_of", "sync_dir", "write_durably", "writers"]

_STEP = re.compile(r"step-(\d{8,})")
_TOKEN = re.compile(r"e(\d{4,})-a(\d{4,})")
_MANIFEST = re.compile(r"e(\d{4,})-a(\d{4,})\.manifest\.json")


class Token(NamedTuple):
    """The fencing token; a higher one wins."""

    epoch: int
    attempt: int

    def __str__(self) -> str:
        return f"e{self.epoch:04d}-a{self.attempt:04d}"


@dataclass(frozen=True, slots=True)
class Place(Generic[L]):
    """Where one step written by one token lives.

    Attributes:
        root: Folder or address of all checkpoints of the run.
        step: Optimizer steps that the state contains.
        token: Who writes.
    """

    root: L
    step: int
    token: Token

    @property
    def storage(self) -> Storage:
        """What holds it; raises StorageError."""
        return storage_of(self.root)

    @property
    def step_dir(self) -> L:
        """Folder of all tokens of this step."""
        return self.root / f"step-{self.step:08d}"

    @property
    def shard_dir(self) -> L:
        """Folder of the shards."""
        return self.step_dir / str(self.token)

    @property
    def manifest(self) -> L:
        """The commit."""
        return self.step_dir / f"{self.token}.manifest.json"

    def shard(self, rank: int) -> L:
        """Tensors of one rank."""
        return self.shard_dir / f"shard-{rank:05d}.safetensors"

    def sidecar(self, rank: int) -> L:
        """Size and digest of the shard of one rank."""
        return self.shard_dir / f"shard-{rank:05d}.json"


def place_of(manifest: L) -> Place[L]:
    """The place that a manifest's path names.

    Raises:
        ValueError: The path is not that of a manifest.
    """
    step = _STEP.fullmatch(manifest.parent.name)
    token = _MANIFEST.fullmatch(manifest.name)
    if step is None or token is None:
        raise ValueError(f"{manifest} is not the path of a checkpoint manifest")
    return Place(manifest.parent.parent, int(step[1]), Token(int(token[1]), int(token[2])))


def manifests(root: L) -> list[Place[L]]:
    """Places of which a manifest exists: committed, not necessarily intact. In no particular order."""
    return [Place(root, step, token) for step, token, committed in _scan(root) if committed]


def writers(root: L) -> list[Place[L]]:
    """Places of which a shard folder exists, committed or not. In no particular order."""
    return [Place(root, step, token) for step, token, committed in _scan(root) if not committed]


def _scan(root: Location) -> Iterator[tuple[int, Token, bool]]:
    storage = storage_of(root)
    for step_name in storage.names(root):
        step = _STEP.fullmatch(step_name)
        if step is None:
            continue
        for name in storage.names(root / step_name):
            committed = _MANIFEST.fullmatch(name)
            match = committed or _TOKEN.fullmatch(name)
            if match is not None:
                yield int(step[1]), Token(int(match[1]), int(match[2])), committed is not None


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and fsync it; the folder's entry is the caller's to sync. Raises ``OSError``."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(fd, memoryview(data))
        os.fsync(fd)
    finally:
        os.close(fd)

"""The digest of the weights: a number for "the same model", whatever plan and whatever process wrote it.

It is the SHA-256 over the names, shapes and block digests of all tensors in the order of their names, where a block is
:data:`BLOCK_ELEMENTS` elements of a global fp32 master in flat order. Ranks compute the blocks in shares, from the
committed files; nobody holds the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import chain

from jobs.checkpoint.manifest import Manifest
from jobs.checkpoint.reader import Reader
from jobs.checkpoint.shardfile import BLOCK_ELEMENTS
from jobs.location import Location


def partial_digest(manifest: str | Location, rank: int, world: int) -> list[str]:
    """The block digests of one share of the blocks, in order.

    Args:
        manifest: Path of a manifest.
        rank: Which share.
        world: Number of shares.

    Raises:
        CorruptCheckpoint: What is stored is damaged.
        StorageError: It cannot be read.
    """
    reader = Reader(manifest, rank)
    blocks = _blocks(reader.manifest)
    low, high = rank * len(blocks) // world, (rank + 1) * len(blocks) // world
    return [
        hashlib.sha256(reader.read_flat(name, "master", start, stop).tobytes()).hexdigest()
        for name, start, stop in blocks[low:high]
    ]


def combine_digests(manifest: Manifest, partials: Sequence[Sequence[str]]) -> str:
    """The digest of the weights from the shares of all ranks, in the order of ranks.

    Raises:
        ValueError: The shares are not complete.
    """
    digests = list(chain.from_iterable(partials))
    blocks = _blocks(manifest)
    if len(digests) != len(blocks):
        raise ValueError(f"{len(digests)} block digests for {len(blocks)} blocks")
    total = hashlib.sha256(b"phalanx weights 1\n")
    for (name, start, stop), digest in zip(blocks, digests, strict=True):
        total.update(f"{name} {list(manifest.tensors[name])} {start} {stop} {digest}\n".encode())
    return total.hexdigest()


def weights_digest(manifest: str | Location) -> str:
    """The digest of the weights, computed by this process alone; raises as :func:`partial_digest`."""
    return combine_digests(Reader(manifest).manifest, [partial_digest(manifest, 0, 1)])


def _blocks(manifest: Manifest) -> list[tuple[str, int, int]]:
    return [
        (name, start, min(start + BLOCK_ELEMENTS, math.prod(manifest.tensors[name])))
        for name in sorted(manifest.tensors)
        for start in range(0, math.prod(manifest.tensors[name]), BLOCK_ELEMENTS)
    ]

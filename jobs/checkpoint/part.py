"""One rank's part of a checkpoint on disk: its shard and, once that is durable, its sidecar. No torch, no numpy.

A shard whose slices and data are those of the same rank in an earlier checkpoint is not written again: the new file
holds the rank's state alone, and its record says where the tensors are (:class:`~jobs.checkpoint.manifest.Origin`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.checkpoint.errors import CheckpointConflict, storage_error
from jobs.checkpoint.layout import Place
from jobs.checkpoint.manifest import Origin, ShardRecord
from jobs.checkpoint.shardfile import Slice, content_digest, slice_table, write_shard
from jobs.location import Location
from strategies.codec import from_json, to_json
from strategies.errors import ConfigError

Pieces = Sequence[tuple[Slice, Mapping[str, memoryview]]]


def write_part(
    place: Place[Any],
    rank: int,
    pieces: Pieces,
    rank_state: Mapping[str, Any],
    *,
    optimizer_steps: int,
    base: Place[Any] | None = None,
) -> dict[str, Any]:
    """Write the shard of a rank and its sidecar, durably.

    Args:
        place: The checkpoint.
        rank: Whose part it is.
        pieces: Each slice with the bytes of every kind.
        rank_state: JSON values to keep beside the slices.
        optimizer_steps: Updates that the optimizer has made.
        base: A committed checkpoint of this run, whose files are not written again where nothing has changed. It must
            not be deleted before this one is committed.

    Returns:
        The sidecar's content.

    Raises:
        CheckpointConflict: Something has written it under the same token before.
        StorageError: It cannot be written; nothing of it is left.
    """
    shard, sidecar = place.shard(rank), place.sidecar(rank)
    try:
        table = slice_table(pieces)
        content = content_digest(table)
        origin = _unchanged(base, rank, content) if base is not None else None
        size, digest = write_shard(shard, () if origin else pieces, rank_state, table=() if origin else table)
        part = {
            "rank": rank,
            "bytes": size,
            "digest": digest,
            "elements": sum(piece.elements for piece, _ in pieces),
            "tensors": {piece.name: piece.shape for piece, _ in pieces},
            "optimizer_steps": optimizer_steps,
            "content": content,
            "origin": to_json(origin),
        }
        place.storage.create(sidecar, [json.dumps(part).encode()])
        place.storage.settle(place.shard_dir)
    except FileExistsError:
        raise CheckpointConflict(
            f"The shard {shard} exists already.",
            why=f"something has written it under the same token {place.token} before",
            hint="Nothing is lost; start one controller only for this run.",
        ) from None
    except OSError as error:
        withdraw(place, rank)
        raise storage_error("write the checkpoint shard", shard, error) from error
    return part


def withdraw(place: Place[Location], rank: int) -> None:
    """Delete what a rank wrote and nobody will commit: a full disk gets room, another try of ours is not refused."""
    with contextlib.suppress(OSError):
        place.storage.delete(place.sidecar(rank))
        place.storage.delete(place.shard(rank))


def read_part(place: Place[Location], rank: int) -> dict[str, Any]:
    """The sidecar of a rank; raises StorageError."""
    path = place.sidecar(rank)
    try:
        part: dict[str, Any] = json.loads(place.storage.read(path))
    except OSError as error:
        raise storage_error("read what another rank wrote", path, error) from error
    return part


def record_of(part: Mapping[str, Any]) -> ShardRecord:
    """What the manifest says of a part."""
    origin = part.get("origin")
    return ShardRecord(
        rank=part["rank"],
        bytes=part["bytes"],
        digest=part["digest"],
        elements=part["elements"],
        origin=from_json(Origin, origin, where="sidecar") if origin else None,
    )


def _unchanged(base: Place[Location], rank: int, content: str) -> Origin | None:
    """Where the same slices with the same data lie already, intact in size; None when they have to be written."""
    try:
        part: dict[str, Any] = json.loads(base.storage.read(base.sidecar(rank)))
        if part.get("content") != content or not part["elements"]:
            return None
        origin = record_of(part).origin or Origin(
            step=base.step,
            epoch=base.token.epoch,
            attempt=base.token.attempt,
            rank=rank,
            bytes=part["bytes"],
            digest=part["digest"],
        )
        there = base.storage.size(origin.place(base.root).shard(rank))
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None  # an earlier checkpoint that cannot be read saves nothing
    return origin if there == origin.bytes else None

"""The part of one rank on the disk tier, and the commit of all of them. No torch, no numpy.

A shard whose slices and data are those of the same rank in an earlier checkpoint is not written again: the new file
holds the rank's state alone, and its record says where the tensors are (:class:`~jobs.checkpoint.manifest.Origin`).

Whoever holds the bytes calls this: the rank itself, or the persister of its node behind it. A part is durable when its
sidecar exists; the checkpoint exists once its manifest does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.checkpoint.errors import CheckpointConflict, storage_error
from jobs.checkpoint.fence import refuse_if_fenced
from jobs.checkpoint.layout import Place
from jobs.checkpoint.manifest import Manifest, Origin, ShardRecord, TrainerState, commit, read_manifest
from jobs.checkpoint.shardfile import Slice, content_digest, slice_table, write_shard
from strategies.codec import from_json, to_json
from strategies.errors import ConfigError, PhalanxError
from strategies.plan import ParallelPlan
from strategies.specs import ModelSpec

Pieces = Sequence[tuple[Slice, Mapping[str, memoryview]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a sidecar says of the part of one rank.

    Attributes:
        rank: Rank of the writers.
        bytes: Size of its shard.
        digest: Digest of its shard.
        elements: Elements per kind.
        tensors: Global name -> global shape of every tensor that it holds a piece of.
        optimizer_steps: Updates that Adam has made, as this rank counts.
        content: Digest of slices and data, without what else the shard holds.
        origin: The earlier shard that holds the data, if they have not changed.
    """

    rank: int
    bytes: int
    digest: str
    elements: int
    tensors: Mapping[str, tuple[int, ...]]
    optimizer_steps: int
    content: str = ""
    origin: Origin | None = None

    @property
    def record(self) -> ShardRecord:
        """What the manifest says of it."""
        return ShardRecord(
            rank=self.rank, bytes=self.bytes, digest=self.digest, elements=self.elements, origin=self.origin
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """What a manifest says beside its parts; the same on every rank.

    Attributes:
        run_id: The run.
        plan: The plan of the writers.
        model: The model.
        trainer: Optimizer and engine state beside the tensors.
        extra: What the caller wants back.
    """

    run_id: str
    plan: ParallelPlan
    model: ModelSpec
    trainer: TrainerState
    extra: Mapping[str, Any]


def write_part(
    place: Place[Any],
    rank: int,
    pieces: Pieces,
    rank_state: Mapping[str, Any],
    optimizer_steps: int,
    *,
    base: Place[Any] | None = None,
) -> Part:
    """Write the shard of one rank and, once that is durable, its sidecar.

    Args:
        place: The checkpoint.
        rank: Whose part it is.
        pieces: Each slice with the bytes of every kind.
        rank_state: JSON values to keep beside the slices.
        optimizer_steps: Updates that the optimizer has made.
        base: A committed checkpoint of this run, whose data are not written again where nothing has changed. It must
            not be pruned before this one is committed.

    Raises:
        CheckpointConflict: Something of the same token has written it before.
        StorageError: It cannot be written; nothing of it is left then, unless the store does not answer at all.
    """
    shard = place.shard(rank)
    try:
        table = slice_table(pieces)
        content = content_digest(table)
        origin = _unchanged(base, rank, content) if base is not None else None
        size, digest = write_shard(shard, () if origin else pieces, rank_state, table=() if origin else table)
        part = Part(
            rank=rank,
            bytes=size,
            digest=digest,
            elements=sum(piece.elements for piece, _ in pieces),
            tensors={piece.name: piece.shape for piece, _ in pieces},
            optimizer_steps=optimizer_steps,
            content=content,
            origin=origin,
        )
        place.storage.create(place.sidecar(rank), [json.dumps(to_json(part)).encode()])
        place.storage.settle(place.shard_dir)
    except FileExistsError:
        raise CheckpointConflict(
            f"The shard {shard} exists already.",
            why=f"something has written it under the same token {place.token} before",
            hint="Nothing is lost; start one controller only for this run.",
        ) from None
    except OSError as error:
        if error.errno != errno.ETIMEDOUT:  # who has not answered will not delete anything either
            withdraw_part(place, rank)
        raise storage_error("write the checkpoint shard", shard, error) from error
    return part


def withdraw_part(place: Place[Any], rank: int) -> None:
    """Delete what was written and nobody will commit: a full disk gets room, another try of ours is not refused."""
    with contextlib.suppress(OSError):
        place.storage.delete(place.sidecar(rank))
        place.storage.delete(place.shard(rank))


def read_part(place: Place[Any], rank: int) -> Part:
    """What another rank has written; raises StorageError."""
    path = place.sidecar(rank)
    try:
        return from_json(Part, json.loads(place.storage.read(path)), where="sidecar")
    except OSError as error:
        raise storage_error("read what another rank wrote", path, error) from error


def _unchanged(base: Place[Any], rank: int, content: str) -> Origin | None:
    """Where the same slices with the same data lie already, whole in size; None when they have to be written."""
    try:
        part = from_json(Part, json.loads(base.storage.read(base.sidecar(rank))), where="sidecar")
        if part.content != content or not part.elements:
            return None
        epoch, attempt = base.token
        origin = part.origin or Origin(
            step=base.step, epoch=epoch, attempt=attempt, rank=rank, bytes=part.bytes, digest=part.digest
        )
        there = base.storage.size(origin.place(base.root).shard(rank))
    except (OSError, ValueError, ConfigError):
        return None  # an earlier checkpoint that cannot be read saves nothing
    return origin if there == origin.bytes else None


def commit_parts(place: Place[Any], parts: Sequence[Part], whole: Whole) -> Manifest:
    """Make the checkpoint exist, of the parts of all ranks in their order.

    Raises:
        CheckpointConflict: Another gang has taken over.
        StorageError: The manifest cannot be written, or a shard is not there.
        PhalanxError: The parts do not make up the model.
    """
    if len({part.optimizer_steps for part in parts}) > 1:
        raise PhalanxError(f"The ranks have made different numbers of optimizer steps at step {place.step}.")
    manifest = Manifest(
        run_id=whole.run_id,
        step=place.step,
        epoch=place.token.epoch,
        attempt=place.token.attempt,
        time=time.time(),
        plan=whole.plan,
        model=whole.model,
        tensors=all_tensors(parts),
        shards=tuple(part.record for part in parts),
        trainer=whole.trainer,
        extra=whole.extra,
    )
    commit(place.root, manifest)
    return manifest


def retaken(place: Place[Any], rank: int) -> Part | None:
    """What an earlier try that seemed to fail has left of a part.

    Returns:
        The part, where the checkpoint exists: nothing of it may be touched. Else None, and nothing of it is left.

    Raises:
        CheckpointConflict: Another gang has taken over.
        StorageError: That cannot be seen.
    """
    if arrived_before(place) is not None:
        return read_part(place, rank)
    withdraw_part(place, rank)
    return None


def arrived_before(place: Place[Any]) -> Manifest | None:
    """The manifest, if an earlier try that seemed to fail has written it; raises CheckpointConflict, StorageError."""
    try:
        place.storage.size(place.manifest)
        refuse_if_fenced(place)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error("look for the checkpoint manifest", place.manifest, error) from error
    return read_manifest(place.manifest)


def all_tensors(parts: Sequence[Part]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the parts; raises PhalanxError when the parts do not cover them."""
    tensors = {name: tuple(shape) for part in parts for name, shape in part.tensors.items()}
    stored = sum(part.elements for part in parts)
    wanted = sum(math.prod(shape) for shape in tensors.values())
    if stored != wanted:
        raise PhalanxError(f"The shards hold {stored} elements, and the model has {wanted}.")
    return dict(sorted(tensors.items()))

"""The part of one rank on the disk tier, and the commit of all of them. Standard library only.

Whoever holds the bytes calls this: the rank itself, or the persister of its node behind it. A part is durable when its
sidecar exists; the checkpoint exists once its manifest does.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.checkpoint.errors import CheckpointConflict, storage_error
from jobs.checkpoint.layout import Place, sync_dir, write_durably
from jobs.checkpoint.manifest import Manifest, ShardRecord, TrainerState, commit
from jobs.checkpoint.shardfile import Slice, write_shard
from strategies.errors import PhalanxError
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
    """

    rank: int
    bytes: int
    digest: str
    elements: int
    tensors: Mapping[str, tuple[int, ...]]
    optimizer_steps: int


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


def write_part(place: Place, rank: int, pieces: Pieces, rank_state: Mapping[str, Any], optimizer_steps: int) -> Part:
    """Write the shard of one rank and, once that is durable, its sidecar.

    Raises:
        CheckpointConflict: Something of the same token has written it before.
        StorageError: It cannot be written; nothing of it is left then.
    """
    shard, sidecar = place.shard(rank), place.sidecar(rank)
    try:
        os.makedirs(place.shard_dir, exist_ok=True)
        size, digest = write_shard(shard, pieces, rank_state)
        part = Part(
            rank=rank,
            bytes=size,
            digest=digest,
            elements=sum(piece.elements for piece, _ in pieces),
            tensors={piece.name: piece.shape for piece, _ in pieces},
            optimizer_steps=optimizer_steps,
        )
        text = {"rank": rank, "bytes": size, "digest": digest, "elements": part.elements}
        more = {"tensors": part.tensors, "optimizer_steps": optimizer_steps}
        write_durably(sidecar, json.dumps(text | more).encode())
        sync_dir(place.shard_dir)
    except FileExistsError:
        raise CheckpointConflict(
            f"The shard {shard} exists already.",
            why=f"something has written it under the same token {place.token} before",
            hint="Nothing is lost; start one controller only for this run.",
        ) from None
    except OSError as error:
        withdraw_part(place, rank)
        raise storage_error("write the checkpoint shard", shard, error) from error
    return part


def withdraw_part(place: Place, rank: int) -> None:
    """Delete what was written and nobody will commit: a full disk gets room, another try of ours is not refused."""
    with contextlib.suppress(OSError):
        place.sidecar(rank).unlink(missing_ok=True)
        place.shard(rank).unlink(missing_ok=True)


def read_part(place: Place, rank: int) -> Part:
    """What another rank has written; raises StorageError."""
    path = place.sidecar(rank)
    try:
        part: dict[str, Any] = json.loads(path.read_bytes())
    except OSError as error:
        raise storage_error("read what another rank wrote", path, error) from error
    tensors = {name: tuple(shape) for name, shape in part.pop("tensors").items()}
    return Part(tensors=tensors, **part)


def commit_parts(place: Place, parts: Sequence[Part], whole: Whole) -> Manifest:
    """Make the checkpoint exist, of the parts of all ranks in their order.

    Raises:
        CheckpointConflict: Another gang has taken over.
        StorageError: The manifest cannot be written, or a shard is not there.
        PhalanxError: The parts do not make up the model.
    """
    if len({part.optimizer_steps for part in parts}) > 1:
        raise PhalanxError(f"The ranks have made different numbers of optimizer steps at step {place.step}.")
    shards = (ShardRecord(rank=p.rank, bytes=p.bytes, digest=p.digest, elements=p.elements) for p in parts)
    manifest = Manifest(
        run_id=whole.run_id,
        step=place.step,
        epoch=place.token.epoch,
        attempt=place.token.attempt,
        time=time.time(),
        plan=whole.plan,
        model=whole.model,
        tensors=all_tensors(parts),
        shards=tuple(shards),
        trainer=whole.trainer,
        extra=whole.extra,
    )
    commit(place.root, manifest)
    return manifest


def all_tensors(parts: Sequence[Part]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the parts; raises PhalanxError when the parts do not cover them."""
    tensors = {name: tuple(shape) for part in parts for name, shape in part.tensors.items()}
    stored = sum(part.elements for part in parts)
    wanted = sum(math.prod(shape) for shape in tensors.values())
    if stored != wanted:
        raise PhalanxError(f"The shards hold {stored} elements, and the model has {wanted}.")
    return dict(sorted(tensors.items()))

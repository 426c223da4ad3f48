"""Save: copy the state out of the engine, write it behind, and commit when every rank's part is durable."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jobs.checkpoint.fragments import MOMENTS, Fragment, OptimizerAccess, access
from jobs.checkpoint.gang import agree, rank_and_world
from jobs.checkpoint.layout import Place, Token, place_of
from jobs.checkpoint.manifest import Manifest, TrainerState, commit
from jobs.checkpoint.part import read_part, record_of, withdraw, write_part
from jobs.checkpoint.shardfile import Slice
from jobs.checkpoint.state import rng_state, trainer_state
from jobs.hooks import Hooks, NoHooks
from jobs.location import Location, locate
from jobs.paths import RunPaths
from jobs.spec import JobSpec
from strategies.errors import PhalanxError, StorageError

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """This rank's part of a checkpoint, in host memory, independent of the engine.

    Attributes:
        step: Optimizer steps that the state contains.
        pieces: Each slice with its data per kind.
        trainer: State that is the same on every rank.
        rank_state: State of this rank beside the tensors.
        stall_s: Seconds that the copy took.
    """

    step: int
    pieces: tuple[tuple[Slice, Mapping[str, Array]], ...]
    trainer: TrainerState
    rank_state: Mapping[str, Any]
    stall_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A committed checkpoint.

    Attributes:
        path: Its manifest.
        bytes: Size of all shards, those of earlier checkpoints included.
        written_bytes: Size of the files that were written.
        stall_s: Seconds for which training stood still: the copy, and the writing where the caller waited for it.
    """

    path: Location
    bytes: int
    written_bytes: int
    stall_s: float


def save(
    engine: Any,
    *,
    run_paths: RunPaths,
    job: JobSpec,
    step: int,
    token: tuple[int, int],
    extra: Mapping[str, Any],
    hooks: Hooks | None = None,
    base: str | Location | None = None,
) -> Saved:
    """Save the state after ``step`` optimizer steps and commit it. Collective.

    Args:
        engine: A :class:`jobs.engine.Engine`, or a DeepSpeed engine.
        run_paths: The run directory.
        job: The job; run id, plan and model are recorded.
        step: Optimizer steps that the state contains.
        token: (epoch, attempt) of this gang.
        extra: JSON values that :func:`jobs.checkpoint.restore.restore` gives back; those of rank 0 are kept.
        hooks: Whom to tell.
        base: The manifest of the run's last committed checkpoint; shards that have not changed since are not written
            again. It must not be pruned before this one is committed.

    Raises:
        CheckpointConflict: Another gang has taken over; on every rank.
        StorageError: A rank cannot write; on every rank. No manifest exists then.
    """
    begin = time.perf_counter()
    snap = snapshot(engine, step)
    saved = persist(snap, run_paths=run_paths, job=job, token=token, extra=extra, hooks=hooks, base=base)
    return dataclasses.replace(saved, stall_s=time.perf_counter() - begin)


def snapshot(engine: Any, step: int) -> Snapshot:
    """Copy this rank's part of the state to host memory. Not collective; training may go on afterwards."""
    begin = time.perf_counter()
    optimizer = access(getattr(engine, "ds", engine))
    with torch.no_grad():
        pieces = tuple(
            _copy(optimizer, fragment) for fragment in optimizer.fragments() if fragment.save[0] < fragment.save[1]
        )
    return Snapshot(
        step=step,
        pieces=pieces,
        trainer=trainer_state(optimizer),
        rank_state={"rng": rng_state()},
        stall_s=time.perf_counter() - begin,
    )


def _copy(optimizer: OptimizerAccess, fragment: Fragment) -> tuple[Slice, dict[str, Array]]:
    low, high = fragment.save
    whole = fragment.slice
    piece = Slice(name=whole.name, shape=whole.shape, box=whole.box, start=whole.start + low, stop=whole.start + high)
    data = {"master": _to_host(fragment.master[low:high])}
    for kind in MOMENTS:
        moment = optimizer.moment(fragment, kind)
        data[kind] = np.zeros(high - low, np.float32) if moment is None else _to_host(moment[low:high])
    return piece, data


def _to_host(view: torch.Tensor) -> Array:
    if view.dtype != torch.float32:
        raise PhalanxError(f"Optimizer state is {view.dtype}, and checkpoints hold float32.")
    copy: Array = view.detach().to("cpu", copy=True).numpy()
    return copy


def persist(
    snap: Snapshot,
    *,
    run_paths: RunPaths,
    job: JobSpec,
    token: tuple[int, int],
    extra: Mapping[str, Any],
    hooks: Hooks | None = None,
    base: str | Location | None = None,
) -> Saved:
    """Write a snapshot and commit it. Collective; arguments and errors as in :func:`save`."""
    hooks = hooks or NoHooks()
    rank, world = rank_and_world()
    place = Place(run_paths.checkpoints, snap.step, Token(*token))
    hooks.checkpoint_begin(snap.step)
    error: Exception | None = None
    try:
        _write_part(place, rank, snap, place_of(locate(base)) if base else None)
        hooks.checkpoint_shards_written(snap.step)
    except StorageError as caught:
        error = caught
    try:
        agree(error)
    except PhalanxError:
        if error is None:
            withdraw(place, rank)
        raise
    total: list[int] | None = None
    try:
        if rank == 0:
            total = _commit(place, world, job, snap, extra)
    except (PhalanxError, TypeError, ValueError) as caught:  # also what is no JSON in extra
        error = caught
    total = agree(error, total)[0]
    whole, written = total or (0, 0)
    return Saved(path=place.manifest, bytes=whole, written_bytes=written, stall_s=snap.stall_s)


def _write_part(place: Place[Location], rank: int, snap: Snapshot, base: Place[Location] | None) -> None:
    """This rank's shard and, once that is durable, its sidecar."""
    views = [(piece, {kind: array.data for kind, array in data.items()}) for piece, data in snap.pieces]
    steps = snap.trainer.optimizer_steps
    write_part(place, rank, views, snap.rank_state, optimizer_steps=steps, base=base)


def _commit(place: Place[Location], world: int, job: JobSpec, snap: Snapshot, extra: Mapping[str, Any]) -> list[int]:
    parts = [read_part(place, rank) for rank in range(world)]
    tensors = _tensors(parts)
    if len({part["optimizer_steps"] for part in parts}) > 1:
        raise PhalanxError(f"The ranks have made different numbers of optimizer steps at step {snap.step}.")
    manifest = Manifest(
        run_id=job.run_id,
        step=snap.step,
        epoch=place.token.epoch,
        attempt=place.token.attempt,
        time=time.time(),
        plan=job.plan,
        model=job.model,
        tensors=tensors,
        shards=tuple(record_of(part) for part in parts),
        trainer=snap.trainer,
        extra=extra,
    )
    commit(place.root, manifest)
    return [manifest.bytes, manifest.written_bytes]


def _tensors(parts: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    tensors = {name: tuple(shape) for part in parts for name, shape in part["tensors"].items()}
    stored = sum(part["elements"] for part in parts)
    wanted = sum(math.prod(shape) for shape in tensors.values())
    if stored != wanted:
        raise PhalanxError(f"The shards hold {stored} elements, and the model has {wanted}.")
    return dict(sorted(tensors.items()))

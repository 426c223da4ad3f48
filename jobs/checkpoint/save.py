"""Save: copy the state out of the engine, write it behind, and commit when every rank's part is durable.

:func:`snapshot` is the first phase; the second is :func:`persist` here, for a gang that writes for itself, and the
persister of the node otherwise (:mod:`jobs.checkpoint.saver`).
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jobs.checkpoint.copying import Copy, copy_all
from jobs.checkpoint.fragments import Fragment, OptimizerAccess, access, of_owners
from jobs.checkpoint.gang import agree, rank_and_world
from jobs.checkpoint.image import Image
from jobs.checkpoint.layout import Place, Token, place_of
from jobs.checkpoint.manifest import TrainerState
from jobs.checkpoint.parts import Whole, commit_parts, read_part, withdraw_part, write_part
from jobs.checkpoint.shardfile import KINDS, Slice
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
        pieces: Each slice with its data per kind: arrays or bytes.
        trainer: State that is the same on every rank.
        rank_state: State of this rank beside the tensors.
        stall_s: Seconds that the copy took.
    """

    step: int
    pieces: tuple[tuple[Slice, Mapping[str, Any]], ...]
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
    image = image_of_state(optimizer)
    buffer = np.empty(image.bytes, np.uint8)
    for copies in copies_of(optimizer, runs_of(optimizer, image), image, buffer.view(np.float32)):
        copy_all(copies)
    return Snapshot(
        step=step,
        pieces=tuple(image.pieces(buffer.data)),
        trainer=trainer_state(optimizer),
        rank_state={"rng": rng_state()},
        stall_s=time.perf_counter() - begin,
    )


def image_of_state(optimizer: OptimizerAccess) -> Image:
    """What this rank saves, and how it lies in a buffer; the same as long as the engine lives."""
    return Image(slices=tuple(_piece(fragment) for fragment in _saved(optimizer)))


def copies_of(optimizer: OptimizerAccess, runs: Sequence[Run], image: Image, buffer: Array) -> Iterator[list[Copy]]:
    """What to copy into a buffer of ``image.bytes``, by the turns of :meth:`OptimizerAccess.resident`.

    Where that is one turn it is valid until the optimizer changes the state.

    Raises:
        PhalanxError: The optimizer keeps its state elsewhere by now.
    """
    left = len(runs)
    for owners in optimizer.resident(write=False):
        here = of_owners(runs, owners)
        copies, left = [], left - len(here)
        for run, (place, kind) in itertools.product(here, enumerate(KINDS)):
            at = place * image.elements + run.at
            whole = optimizer.whole(run.owner, kind)  # a moment does not exist before the first step
            source = None if whole is None else _checked(whole[run.start : run.stop])
            copies.append(Copy(source, buffer[at : at + run.stop - run.start]))
        yield copies
    if left:
        raise PhalanxError(f"The optimizer has replaced {left} of {len(runs)} parts of its state since training began.")


@dataclass(slots=True)
class Run:
    """Elements [start, stop) of an owner that go to ``at`` in every kind."""

    owner: torch.Tensor
    start: int
    stop: int
    at: int


def runs_of(optimizer: OptimizerAccess, image: Image) -> list[Run]:
    """What is copied, neighbours at once: one large copy goes past the cache, many of a few MB take twice as long.

    The same as long as the engine lives.
    """
    runs: list[Run] = []
    for fragment, at in zip(_saved(optimizer), image.starts, strict=True):
        start, stop = (fragment.offset + end for end in fragment.save)
        last = runs[-1] if runs else None
        if (
            last is not None
            and last.owner is fragment.owner
            and last.stop == start
            and last.at + start - last.start == at
        ):
            last.stop = stop
        else:
            runs.append(Run(fragment.owner, start, stop, at))
    return runs


def _saved(optimizer: OptimizerAccess) -> list[Fragment]:
    return [fragment for fragment in optimizer.fragments() if fragment.save[0] < fragment.save[1]]


def _piece(fragment: Fragment) -> Slice:
    (low, high), whole = fragment.save, fragment.slice
    return Slice(name=whole.name, shape=whole.shape, box=whole.box, start=whole.start + low, stop=whole.start + high)


def _checked(view: torch.Tensor) -> torch.Tensor:
    if view.dtype != torch.float32:
        raise PhalanxError(f"Optimizer state is {view.dtype}, and checkpoints hold float32.")
    return view.detach()


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
        pieces = [(piece, {kind: memoryview(data[kind]) for kind in KINDS}) for piece, data in snap.pieces]
        earlier = place_of(locate(base)) if base else None
        write_part(place, rank, pieces, snap.rank_state, snap.trainer.optimizer_steps, base=earlier)
        hooks.checkpoint_shards_written(snap.step)
    except StorageError as caught:
        error = caught
    try:
        agree(error)
    except PhalanxError:
        if error is None:
            withdraw_part(place, rank)
        raise
    total: list[int] | None = None
    try:
        if rank == 0:
            parts = [read_part(place, other) for other in range(world)]
            whole = Whole(run_id=job.run_id, plan=job.plan, model=job.model, trainer=snap.trainer, extra=extra)
            manifest = commit_parts(place, parts, whole)
            total = [manifest.bytes, manifest.written_bytes]
    except (PhalanxError, TypeError, ValueError) as caught:  # also what is no JSON in extra
        error = caught
    total = agree(error, total)[0]
    size, written = total or (0, 0)
    return Saved(path=place.manifest, bytes=size, written_bytes=written, stall_s=snap.stall_s)

"""Restore: each rank reads the slices it needs, verified, into the live optimizer state. Any plan reads any plan's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.checkpoint.fragments import MOMENTS, Fragment, OptimizerAccess, access
from jobs.checkpoint.gang import agree, rank_and_world
from jobs.checkpoint.manifest import Manifest
from jobs.checkpoint.reader import Reader
from jobs.checkpoint.source import ShardSource
from jobs.checkpoint.state import set_rng_state, set_trainer_state
from jobs.hooks import Hooks, NoHooks
from strategies.errors import ResumeRefused, StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoredState:
    """What was restored.

    Attributes:
        step: Optimizer steps that the state contains; the next one to run is ``step + 1``.
        extra: What the saver gave.
        manifest: The whole record.
    """

    step: int
    extra: Mapping[str, Any]
    manifest: Manifest


Source = str | Path | ShardSource


def restore(engine: Any, source: Source | Callable[[], Source], *, hooks: Hooks | None = None) -> RestoredState:
    """Bring a fresh engine to the state of a checkpoint. Collective.

    Under the plan that wrote it, training goes on bit-identically. After an error the engine's state is undefined, and
    another checkpoint may be restored into it.

    Args:
        engine: A :class:`jobs.engine.Engine`, or a DeepSpeed engine.
        source: Path of the manifest, another source of shards, or what opens one (so that its errors, too, are raised
            on every rank).
        hooks: Whom to tell.

    Raises:
        CorruptCheckpoint: The checkpoint is damaged; on every rank.
        ResumeRefused: It is of another model; on every rank.
        StorageError: It cannot be read; on every rank.
    """
    (hooks or NoHooks()).restore_begin()
    ds = getattr(engine, "ds", engine)
    optimizer = access(ds)
    rank, world = rank_and_world()
    error: Exception | None = None
    manifest: Manifest | None = None
    try:
        reader = Reader(source() if callable(source) else source, rank)
        manifest = reader.manifest
        with torch.no_grad():
            optimizer.create_moments()
            _fill(optimizer, reader)
        set_trainer_state(optimizer, manifest.trainer)
        if len(manifest.shards) == world:
            _restore_rank_state(reader, rank)
    except (StorageError, ResumeRefused) as caught:
        error = caught
    agree(error)  # before the collectives below, in which a failed rank would be waited for
    assert manifest is not None
    with torch.no_grad():
        optimizer.publish()
    if hasattr(engine, "set_position"):
        engine.set_position(manifest.step)
    return RestoredState(step=manifest.step, extra=manifest.extra, manifest=manifest)


def _fill(optimizer: OptimizerAccess, reader: Reader) -> None:
    for fragment in optimizer.fragments():
        _require_same_tensor(fragment, reader)
        if not fragment.slice.elements:
            continue
        _fill_view(fragment.master, fragment, "master", reader)
        for kind in MOMENTS:
            moment = optimizer.moment(fragment, kind)
            assert moment is not None, "create_moments came first"
            _fill_view(moment, fragment, kind, reader)


def _fill_view(view: torch.Tensor, fragment: Fragment, kind: str, reader: Reader) -> None:
    count = fragment.slice.elements
    buffer = np.empty(count, dtype=np.float32)
    reader.read_slice(fragment.slice, kind, buffer)
    view[:count].copy_(torch.from_numpy(buffer))


def _require_same_tensor(fragment: Fragment, reader: Reader) -> None:
    piece = fragment.slice
    stored = reader.manifest.tensors.get(piece.name)
    if stored != piece.shape:
        raise ResumeRefused(
            f"The checkpoint {reader.path} is of another model.",
            why=f"{piece.name} has shape {list(piece.shape)} here and {list(stored) if stored else 'is missing'} there",
            hint="Resume with the model of the run, or start a new run.",
        )


def _restore_rank_state(reader: Reader, rank: int) -> None:
    # Under another number of ranks there is nothing to restore: nothing that trains draws from these generators.
    state = reader.rank_state(rank)
    if state is not None:
        set_rng_state(state["rng"])

"""Restore: what each rank needs comes, verified, into the live optimizer state. Any plan reads any plan's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jobs.checkpoint.catalogue import Catalogue
from jobs.checkpoint.exchange import Target, Traffic, fill
from jobs.checkpoint.fragments import Fragment, OptimizerAccess, access, of_owners
from jobs.checkpoint.gang import agree, rank_and_world
from jobs.checkpoint.manifest import Manifest
from jobs.checkpoint.shardfile import KINDS
from jobs.checkpoint.source import ShardSource, source_of
from jobs.checkpoint.state import set_rng_state, set_trainer_state
from jobs.hooks import Hooks, NoHooks
from jobs.location import Location
from strategies.errors import ResumeRefused, StorageError

_NAMED = 5  # of the tensors that do not fit, the others are counted


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoredState:
    """What was restored.

    Attributes:
        step: Optimizer steps that the state contains; the next one to run is ``step + 1``.
        extra: What the saver gave.
        manifest: The whole record.
        traffic: What this rank has read and received.
    """

    step: int
    extra: Mapping[str, Any]
    manifest: Manifest
    traffic: Traffic


Source = str | Location | ShardSource


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
    error: Exception | None = None
    shards: ShardSource | None = None
    try:
        shards = source_of(source() if callable(source) else source)
        _require_same_tensors(optimizer, shards)
    except (StorageError, ResumeRefused) as caught:
        error = caught
    agree(error)  # before the collectives below, in which a failed rank would be waited for
    assert shards is not None
    manifest, traffic = shards.manifest, Traffic()
    try:
        with torch.no_grad():
            optimizer.create_moments()
            catalogue = Catalogue(shards, rank_and_world()[0])
            for fragments in _resident(optimizer):
                traffic += fill(shards, catalogue, _targets(optimizer, fragments))
        set_trainer_state(optimizer, manifest.trainer)
        _restore_rank_state(shards, catalogue)
    except (StorageError, ResumeRefused) as caught:
        error = caught
    agree(error)
    with torch.no_grad():
        optimizer.publish()
    if hasattr(engine, "set_position"):
        engine.set_position(manifest.step)
    return RestoredState(step=manifest.step, extra=manifest.extra, manifest=manifest, traffic=traffic)


def _resident(optimizer: OptimizerAccess) -> Iterator[list[Fragment]]:
    """All that there is to fill, as it is in memory."""
    fragments = [fragment for fragment in optimizer.fragments() if fragment.slice.elements]
    for owners in optimizer.resident(write=True):
        yield of_owners(fragments, owners)


def _targets(optimizer: OptimizerAccess, fragments: Iterable[Fragment]) -> list[Target]:
    """Where masters and moments are, which must exist."""
    return [
        Target(slice=fragment.slice, views={kind: _view(optimizer, fragment, kind) for kind in KINDS})
        for fragment in fragments
    ]


def _view(optimizer: OptimizerAccess, fragment: Fragment, kind: str) -> torch.Tensor:
    view = optimizer.view(fragment, kind)
    assert view is not None, "create_moments came first"
    return view


def _require_same_tensors(optimizer: OptimizerAccess, source: ShardSource) -> None:
    stored = source.manifest.tensors
    wrong = {
        piece.name: f"{piece.name} has shape {list(piece.shape)} here and {_shape(stored.get(piece.name))} there"
        for piece in (fragment.slice for fragment in optimizer.fragments())
        if stored.get(piece.name) != piece.shape
    }
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise ResumeRefused(
            f"The checkpoint {source.path} is of another model.",
            why="; ".join(list(wrong.values())[:_NAMED]) + more,
            hint="Resume with the model of the run, or start a new run.",
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "is missing" if shape is None else str(list(shape))


def _restore_rank_state(source: ShardSource, catalogue: Catalogue) -> None:
    # Under another number of ranks there is nothing to restore: nothing that trains draws from these generators.
    rank, world = rank_and_world()
    if len(source.manifest.shards) != world:
        return
    state = catalogue.rank_state(rank)
    if state:
        set_rng_state(state["rng"])

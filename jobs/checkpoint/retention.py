"""Which checkpoints stay. Deletes only what a newer committed checkpoint replaces. Standard library only."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from jobs.checkpoint.errors import CorruptCheckpoint, storage_error
from jobs.checkpoint.layout import Place, Token, manifests, sync_dir, writers
from jobs.checkpoint.manifest import newest, read_manifest


def prune(
    root: str | Path,
    keep: int,
    *,
    token: tuple[int, int] | None = None,
    protect: Collection[str | Path] = frozenset(),
) -> list[Path]:
    """Delete old checkpoints and what dead gangs left unfinished.

    The newest ``keep`` steps of the youngest gangs stay, and always the one that a restart would pick. Folders without
    a manifest go only when their token is lower than ``token``: those of this gang may be in the middle of being
    written, and a higher one means that this gang has been replaced and must not touch anything.

    Args:
        root: Folder of all checkpoints of the run.
        keep: Number of checkpoints to keep; at least 1 is kept.
        token: (epoch, attempt) of the calling gang; None leaves unfinished folders alone.
        protect: Manifests that must stay, such as the one that was restored.

    Returns:
        Manifests and folders that were deleted.

    Raises:
        StorageError: Something cannot be deleted.
    """
    root = Path(root)
    me = Token(*token) if token is not None else None
    try:
        committed = manifests(root)
        if me is not None and any(place.token > me for place in [*committed, *writers(root)]):
            return []
        kept = _kept(committed, max(keep, 1))
        if not kept:
            return []
        protected = {Path(path).absolute() for path in protect}
        kept |= {place for place in committed if place.manifest.absolute() in protected}
        best = newest(root)
        doomed = [place for place in committed if place not in kept and place.manifest != best]
        removed = [place.manifest for place in doomed]
        _remove(doomed)
        # Listed again: a folder whose manifest has just gone is unfinished business too.
        left_over = [p for p in writers(root) if me is not None and p.token < me and not p.manifest.exists()]
        removed += [place.shard_dir for place in left_over if place not in doomed]
        _remove(left_over)
    except OSError as error:
        raise storage_error("prune the checkpoints", root, error) from error
    return removed


def _kept(committed: Iterable[Place], keep: int) -> set[Place]:
    kept: dict[int, Place] = {}
    # By token first: after a fall back to an older step, the steps of the abandoned branch must not push out ours.
    for place in sorted(committed, key=lambda place: (place.token, place.step), reverse=True):
        if len(kept) == keep:
            break
        if place.step not in kept and _readable(place):
            kept[place.step] = place
    return set(kept.values())


def _readable(place: Place) -> bool:
    try:
        read_manifest(place.manifest)
    except CorruptCheckpoint:
        return False
    return True


def _remove(places: Iterable[Place]) -> None:
    for place in places:
        # The manifest first, and durably: a checkpoint must stop existing before it stops being whole.
        place.manifest.unlink(missing_ok=True)
        sync_dir(place.step_dir)
        shutil.rmtree(place.shard_dir, ignore_errors=True)
        with contextlib.suppress(OSError):  # another token's files are in it
            place.step_dir.rmdir()

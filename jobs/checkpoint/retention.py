"""Which checkpoints stay. Deletes only what a newer committed checkpoint replaces. No torch, no numpy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from jobs.checkpoint.errors import CorruptCheckpoint, storage_error
from jobs.checkpoint.fence import forget_older, highest
from jobs.checkpoint.layout import Place, Token, manifests, writers
from jobs.checkpoint.manifest import best_first, read_manifest
from jobs.location import Location, locate
from strategies.errors import StorageError


def prune(
    root: str | Location,
    keep: int,
    *,
    token: tuple[int, int] | None = None,
    protect: Collection[str | Location] = frozenset(),
) -> list[Location]:
    """Delete old checkpoints and what dead gangs left unfinished.

    Of the checkpoints that count, the best ``keep`` stay, by the order in which a restart would pick them
    (:mod:`jobs.checkpoint.fence`). One whose manifest cannot be read is none of them, and replaced by nothing as long
    as one of them is of an earlier step: somebody may mend it, and it holds more. Nor are those before it deleted, as
    it may need files of theirs. Folders without a manifest go only when their token is lower than ``token``: those of
    this gang may be in the middle of being written, and a higher one, or a higher fence, means that this gang has been
    replaced and must not touch anything.

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
    root, keep = locate(root), max(keep, 1)
    me = Token(*token) if token is not None else None
    try:
        committed = manifests(root)
        if me is not None and _replaced(root, me, committed):
            return []
        best = _kept(best_first(root), keep)
        if not best:
            return []
        replaced = min(place.step for place in best) if len(best) >= keep else 0
        protected = {locate(path).absolute() for path in protect}
        kept = best | {place for place in committed if place.manifest.absolute() in protected}
        unread = {one for one in committed if one not in kept and one.step > replaced and not _readable(one)}
        kept |= unread | {one for one in committed if any(_may_need(bad, one) for bad in unread)}
        doomed = [place for place in committed if place not in kept]
        needed = _needed(place for place in committed if place not in doomed)
        removed = [place.manifest for place in doomed]
        for place in doomed:
            _remove(place, needed)
        removed += [place.shard_dir for place in _left_over(root, me, doomed) if _remove(place, needed)]
        forget_older(root)
    except OSError as error:
        raise storage_error("prune the checkpoints", root, error) from error
    return removed


def tidied(root: str | Location, keep: int, *, token: tuple[int, int]) -> str:
    """As :func:`prune` after a commit; what cannot be deleted costs room, not the run.

    Returns:
        What people should know; empty when all is well.
    """
    try:
        prune(root, keep, token=token)
    except StorageError as error:
        return f"old checkpoints stay, more than checkpoint.keep: {error.what} {error.why}"
    return ""


def _replaced(root: Location, me: Token, committed: Iterable[Place[Location]]) -> bool:
    fence = highest(root)
    if fence is not None and fence > me:
        return True
    return any(place.token > me for place in [*committed, *writers(root)])


def _left_over(root: Location, me: Token | None, doomed: Collection[Place[Location]]) -> list[Place[Location]]:
    """Folders without a manifest that nobody is writing: of lower tokens, and of this gang's earlier steps.

    (Of those, files may have been needed by a later checkpoint when their own was deleted.)
    """
    if me is None:
        return []
    committed = manifests(root)  # again: a folder whose manifest has just gone is unfinished business too
    done = max((place.step for place in committed if place.token == me), default=-1)
    idle = [p for p in writers(root) if p.token < me or (p.token == me and p.step < done)]
    return [place for place in idle if place not in committed and place not in doomed]


def _needed(places: Iterable[Place[Location]]) -> dict[Place[Location], set[str]]:
    """The files of other checkpoints that these ones refer to: names by checkpoint."""
    needed: dict[Place[Location], set[str]] = {}
    for place in places:
        try:
            files = read_manifest(place.manifest).files(place.root)
        except CorruptCheckpoint:
            continue
        for home, rank, _, _ in files:
            if home != place:
                needed.setdefault(home, set()).add(home.shard(rank).name)
    return needed


def _kept(ordered: Iterable[Place[Location]], keep: int) -> set[Place[Location]]:
    kept: dict[int, Place[Location]] = {}
    for place in ordered:
        if len(kept) == keep:
            break
        if place.step not in kept and _readable(place):
            kept[place.step] = place
    return set(kept.values())


def _may_need(place: Place[Location], other: Place[Location]) -> bool:
    """Files of the other may be part of this one, whose manifest cannot be read: they were written before it."""
    return other.step < place.step and other.token <= place.token


def _readable(place: Place[Location]) -> bool:
    try:
        read_manifest(place.manifest)
    except CorruptCheckpoint:
        return False
    return True


def _remove(place: Place[Location], needed: Mapping[Place[Location], set[str]]) -> bool:
    """Delete a checkpoint but for the files that others need; returns whether there was anything to delete."""
    storage, spared = place.storage, needed.get(place, set())
    # The manifest first, and durably: a checkpoint must stop existing before it stops being whole.
    storage.delete(place.manifest)
    storage.settle(place.step_dir)
    if not spared:
        storage.delete_tree(place.shard_dir)
        storage.drop(place.step_dir)
        return True
    doomed = [name for name in storage.names(place.shard_dir) if name not in spared]
    for name in doomed:
        storage.delete(place.shard_dir / name)
    return bool(doomed)

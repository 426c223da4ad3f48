"""Where the next attempt may begin: in memory, on disk, or at the start. What cannot be used is put on record first.

A run that has committed a checkpoint never begins again at step 1 by itself. Where none of its checkpoints can be used
it waits for them, then ends with the reason, and nothing is put on record against them: what was not there may be there
again when a person resumes it.

Before anybody looks, the gangs before are fenced off, and what is found is laid down as what the next one goes on from
(:mod:`jobs.checkpoint.fence`): what an older gang commits after that look counts for nothing. Who looks, and what
happens when nobody answers, is :mod:`launcher.outset`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from jobs.checkpoint import CheckpointConflict, fence
from jobs.checkpoint.errors import is_full
from jobs.checkpoint.fence import Branch
from jobs.checkpoint.layout import Token
from jobs.checkpoint.memory import generation_of
from jobs.paths import RunPaths
from launcher import lineage, progress
from launcher.ending import in_a_line
from launcher.lock import identity
from launcher.logbook import Fenced
from launcher.progress import OnDisk, ResumePoint
from launcher.run import Run
from launcher.store import RunStore
from strategies.errors import ResumeRefused, StorageError

_TOLD = 3  # so many checkpoints say what is wrong with them


class NothingLeft(Exception):
    """There was a checkpoint, and none can be used; the message is one sentence for the log."""


class NothingOlder(NothingLeft):
    """The run has to go back further than to any checkpoint: waiting does not help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a look at the checkpoints has shown.

    Attributes:
        point: The newest state that can be had, as far as that can be seen without reading all of it.
        passed: The checkpoints that are passed over for it, and why.
        writers: The gangs that have made those that can be used.
        fenced: Earlier gangs were fenced off before.
    """

    point: ResumePoint
    passed: Mapping[str, str]
    writers: frozenset[Token] = frozenset()
    fenced: bool = False


def look(store: RunStore, run: Run, token: Token, *, script: bool, better: Callable[[OnDisk], ResumePoint]) -> Look:
    """Fence off the gangs before, and look for where the next one begins. Reads the storage, and may take its time.

    Args:
        store: The run.
        run: The run as its log tells it.
        token: The next gang.
        script: What is done lies in folders with a mark, not in manifests.
        better: What to go on from instead of what is on disk.

    Raises:
        NothingLeft: Beginning at step 1 would throw away what was committed; or the storage takes no fence.
        NothingOlder: So it would after a blow-up, and all checkpoints are too new.
        Fenced: Another controller has taken over.
        StorageError: The checkpoints cannot be looked at; or there is no room for a fence.
    """
    known = None if script else lineage.of(run)
    seen = OnDisk(point=ResumePoint())

    def noting(disk: OnDisk) -> ResumePoint:
        nonlocal seen
        seen = replace(disk, branch=disk.branch or known)
        return better(seen)

    fenced = not script and _fence_off(store, token, first=known is None)
    before = run.rollback.before
    point, passed = newest(store.paths, rejected=run.rejected, script=script, known=known, better=noting, before=before)
    why = "" if script or point.memory is not None else _obstacle(store, run, point, passed)
    if why and before and seen.writers and not passed and not point.path:
        cause = run.attempt.cause if run.attempt else ""
        raise NothingOlder(f"{cause}, again with other samples, and no checkpoint is older than that of step {before}")
    if why:
        step = promised(run)
        what = f"step {step} was committed, and no checkpoint can be used" if step else "no checkpoint can be used"
        raise NothingLeft(f"{what}: {why}. When they are back, phalanx resume {store.name} goes on from the newest")
    return Look(point=point, passed=passed, writers=seen.writers, fenced=fenced)


def _fence_off(store: RunStore, token: Token, *, first: bool) -> bool:
    """Nobody older than the next gang commits anything from here on; whether that can be said of these checkpoints."""
    try:
        store.require_checkpoints()
    except (ResumeRefused, StorageError):
        return False  # they are not the run's, or away: whatever it goes on from, it is not from there
    if first:  # there is nobody to be fenced off
        fence.take_ballast(store.paths.checkpoints)
        return False
    try:
        fence.raise_fence(store.paths.checkpoints, token, owner=owner())
    except CheckpointConflict as error:
        raise Fenced from error
    except StorageError as error:
        if is_full(error):
            raise
        raise NothingLeft(f"earlier gangs cannot be fenced off: {in_a_line(error)}") from error
    return True


def lay_down(store: RunStore, branch: Branch) -> None:
    """Put on record beside the checkpoints what the next gang goes on from. Raises Fenced and StorageError."""
    try:
        fence.begin(store.paths.checkpoints, branch)
    except CheckpointConflict as error:
        raise Fenced from error


def owner() -> str:
    """What identifies this controller among all that ever were."""
    return json.dumps(identity())


def newest(
    paths: RunPaths,
    *,
    rejected: frozenset[str],
    script: bool,
    known: Branch | None = None,
    better: Callable[[OnDisk], ResumePoint] = lambda disk: disk.point,
    before: int = 0,
) -> tuple[ResumePoint, dict[str, str]]:
    """The newest checkpoint that is whole at a quick look, and those that are passed over for it, with the reason.

    Args:
        paths: The run's files.
        rejected: Checkpoints that are not looked at, wherever the run directory was when that was recorded.
        script: What is done lies in folders with a mark.
        known: What the event log tells of the newest attempt.
        better: What to go on from instead of what is on disk.
        before: Of an earlier step only; 0 for any.

    Raises:
        StorageError: The checkpoints cannot be looked at.
    """
    passed: dict[str, str] = {}
    rejected = frozenset(map(paths.at_home, rejected))
    while True:
        tried = rejected | passed.keys()
        disk = progress.on_disk(paths, script=script, rejected=tried, known=known, before=before)
        passed |= {path: reason for path, reason in disk.damaged if path not in rejected}
        point = better(disk)
        flaw = progress.missing(point, script=script)
        if not flaw:
            return point, passed
        passed[point.path] = flaw


def promised(run: Run) -> int:
    """The newest step of which a checkpoint on disk is known to have been: committed, or gone on from; 0 for none."""
    used = [one.first_step - 1 for one in run.attempts if one.resume_from and generation_of(one.resume_from) is None]
    return max(run.committed_step, *used, 0)


def damaged_before(run: Run) -> list[str]:
    """Checkpoints on disk that ranks have read and found damaged, for people."""
    return [f"{path}: found damaged before" for path in sorted(run.found_damaged) if generation_of(path) is None]


def _obstacle(store: RunStore, run: Run, point: ResumePoint, passed: Mapping[str, str]) -> str:
    """Why the run must not go on from there; "" if it may."""
    try:
        store.require_checkpoints()
    except (ResumeRefused, StorageError) as error:
        return in_a_line(error)
    if point.path or not promised(run):
        return ""
    told = [f"{path}: {reason}" for path, reason in passed.items()]
    return "; ".join([*told, *damaged_before(run)][:_TOLD]) or f"there is none in {store.paths.checkpoints}"

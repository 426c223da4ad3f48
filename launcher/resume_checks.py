"""What must be right before a run is resumed: its checkpoints are its own and some are whole, and clocks agree.

The ranks would find out too, but only after a gang was started for it. Here nothing has been written yet.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.checkpoint import read_manifest
from jobs.checkpoint.identity import differences
from jobs.paths import RunPaths
from launcher import lineage, origin
from launcher.lock import secret_of
from launcher.request import LaunchRequest
from launcher.run import EventKind, Run, RunEvent
from launcher.store import RunStore
from strategies.errors import ResumeRefused, StorageError

SKEW_S = 300.0  # clocks of healthy machines agree far better; S3 refuses requests from 900 s on


def check(
    store: RunStore,
    run: Run,
    request: LaunchRequest,
    *,
    moved: bool = False,
    clock_was_ahead: bool = False,
    clock: Callable[[], float] = time.time,
) -> list[str]:
    """Look at what a resume would start from.

    Args:
        store: The run.
        run: What its log says.
        request: What the run was; a resume may change it later.
        moved: A person says that the directory was moved on purpose.
        clock_was_ahead: A person says that the clock here is right, and the one of the log was ahead.
        clock: UTC seconds.

    Returns:
        Checkpoints that will be passed over, each with the reason.

    Raises:
        ResumeRefused: The directory was renamed, or moved without a word; or the checkpoints are another run's, or the
            clock is wrong.
        StorageError: There was a checkpoint, and none can be used; or the store cannot be reached.
    """
    if request.run_name != store.name:
        raise ResumeRefused(
            f"The run directory is called '{store.name}', and the run in it '{request.run_name}'.",
            why="the name is the run's identity",
            hint=_name_again(store.paths.root, request.run_name),
        )
    _require_place(store.paths.root, Path(request.run_dir), moved=moved)
    late = [] if clock_was_ahead else _late(store.events(), clock)
    if request.job.kind != "pretrain":
        _refuse(store, [], late)
        return []
    store.require_checkpoints()
    root = store.paths.checkpoints
    point, passed = origin.newest(store.paths, rejected=run.found_damaged, script=False, known=lineage.of(run))
    broken = [f"{path}: {reason}" for path, reason in passed.items()]
    manifest = read_manifest(point.path) if point.path else None
    problems = differences(manifest, request.job) if manifest else []
    _refuse(store, problems, late)
    if not manifest and (step := origin.promised(run)):
        raise StorageError(
            f"'{store.name}' has committed step {step}, and no checkpoint of it can be used.",
            why="; ".join([*broken, *origin.damaged_before(run)]) or f"there is none in {root}",
            hint="Bring one back, or phalanx submit a new run: this one would begin again at step 1.",
        )
    return broken


def _name_again(here: Path, name: str) -> str:
    there = here.with_name(name)
    if there.exists():
        return f"The run of that name is in {there}: {_resume(there)}"
    return f"Give it back its name: mv {shlex.quote(str(here))} {shlex.quote(str(there))}"


def _resume(root: Path) -> str:
    return f"phalanx resume {root.name} --dir {shlex.quote(str(root.parent))}"


def _require_place(here: Path, before: Path, *, moved: bool) -> None:
    """It lies where it was last begun or resumed, under whatever name of that place.

    Raises:
        ResumeRefused: It was moved, and nobody has said that this is meant; or it is a copy.
    """
    if here == before:
        return
    with contextlib.suppress(OSError):
        if here.samefile(before):
            return
    if secret_of(RunPaths(before)) == secret_of(RunPaths(here)) != b"" and (not moved or os.access(before, os.W_OK)):
        raise ResumeRefused(
            f"The run directory {here} is a copy: the run itself is in {before}.",
            why="two runs of one identity would write to the same checkpoints, metrics and W&B run",
            hint=f"{_resume(before)}. To go on here, give that one another name first, then add --moved.",
        )
    if not moved:
        raise ResumeRefused(
            f"The run directory was {before}, and is {here}: it was moved, copied, or mounted elsewhere.",
            why="what still goes by the old path (ranks on a node that was cut off, scripts) would write there",
            hint=f"Bring it back, or say that it is meant: {_resume(here)} --moved",
        )


def _late(events: Sequence[RunEvent], clock: Callable[[], float]) -> list[str]:
    """Whether what is written from now on would be older than what the last controller has written.

    By the clock of the log alone: those of the nodes, which date steps and checkpoints, may be off as they like. What
    is older than the last controller may be dated later: a person has said that it is, or nobody was asked.
    """
    newest, host = 0.0, ""
    for event in events:
        if event.kind is EventKind.CONTROLLER_STARTED:
            newest, host = 0.0, str(event.data.get("host", ""))
        newest = max(newest, event.time)
    behind_s = newest - clock()
    if behind_s <= SKEW_S:
        return []
    whose = f"that of {host}" if host else "that of its controller"
    return [f"the clock here is {behind_s:.0f} s behind the newest record of the log: it is late, or {whose} was ahead"]


def _refuse(store: RunStore, foreign: list[str], late: list[str]) -> None:
    """Checkpoints that are another run's, and a clock that is wrong; each is mended in its own way."""
    cures = ["bring the run's own checkpoints back"] * bool(foreign) + ["set the clock"] * bool(late)
    way_on = f" If the clock here is right: {_resume(store.paths.root)} --clock-was-ahead" if late else ""
    if cures:
        raise ResumeRefused(
            f"'{store.name}' cannot go on from what is in {store.paths.checkpoints if foreign else store.paths.root}.",
            why="; ".join([*foreign, *late]),
            hint=f"First {' and '.join(cures)}, or phalanx submit a new run.{way_on}",
        )

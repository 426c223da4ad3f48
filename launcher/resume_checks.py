"""What must be right before a run is resumed: its checkpoints are its own and some are whole, and clocks agree.

The ranks would find out too, but only after a gang was started for it. Here nothing has been written yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from jobs.checkpoint import read_manifest
from jobs.checkpoint.identity import differences
from launcher import lineage, origin
from launcher.request import LaunchRequest
from launcher.run import Run
from launcher.store import RunStore
from strategies.errors import ResumeRefused, StorageError

SKEW_S = 300.0  # clocks of healthy machines agree far better; S3 refuses requests from 900 s on


def check(store: RunStore, run: Run, request: LaunchRequest, *, clock: Callable[[], float] = time.time) -> list[str]:
    """Look at what a resume would start from.

    Args:
        store: The run.
        run: What its log says.
        request: What the run was; a resume may change it later.
        clock: UTC seconds.

    Returns:
        Checkpoints that will be passed over, each with the reason.

    Raises:
        ResumeRefused: The directory was renamed; or the checkpoints are another run's, or the clock is wrong.
        StorageError: There was a checkpoint, and none can be used; or the store cannot be reached.
    """
    if request.run_name != store.name:
        raise ResumeRefused(
            f"The run directory is called '{store.name}', and the run in it '{request.run_name}'.",
            why="the name is the run's identity",
            hint=f"Give it back its name; it may lie anywhere: mv {store.paths.root} .../{request.run_name}",
        )
    events = [event.time for event in store.events()]
    if request.job.kind != "pretrain":
        _refuse(store, [], _clock(events, clock))
        return []
    store.require_checkpoints()
    root = store.paths.checkpoints
    point, passed = origin.newest(store.paths, rejected=run.found_damaged, script=False, known=lineage.of(run))
    broken = [f"{path}: {reason}" for path, reason in passed.items()]
    manifest = read_manifest(point.path) if point.path else None
    problems = differences(manifest, request.job) if manifest else []
    _refuse(store, problems, _clock([*events, *([manifest.time] if manifest else [])], clock))
    if not manifest and (step := origin.promised(run)):
        raise StorageError(
            f"'{store.name}' has committed step {step}, and no checkpoint of it can be used.",
            why="; ".join([*broken, *origin.damaged_before(run)]) or f"there is none in {root}",
            hint="Bring one back, or phalanx submit a new run: this one would begin again at step 1.",
        )
    return broken


def _clock(times: list[float], clock: Callable[[], float]) -> list[str]:
    """Whether what is written from now on would be older than what is there (UTC seconds)."""
    ahead_s = max(times, default=0.0) - clock()
    if ahead_s <= SKEW_S:
        return []
    return [f"the clock here is {ahead_s:.0f} s behind the one that wrote the run's newest record"]


def _refuse(store: RunStore, foreign: list[str], late: list[str]) -> None:
    """Checkpoints that are another run's, and a clock that is wrong; each is mended in its own way."""
    cures = ["bring the run's own checkpoints back"] * bool(foreign) + ["set the clock"] * bool(late)
    if cures:
        raise ResumeRefused(
            f"'{store.name}' cannot go on from what is in {store.paths.checkpoints if foreign else store.paths.root}.",
            why="; ".join([*foreign, *late]),
            hint=f"First {' and '.join(cures)}, or phalanx submit a new run.",
        )

"""What a run is told about its checkpoints, and the failure process that comes of it. Pure arithmetic."""

from __future__ import annotations

from typing import NamedTuple

from strategies.failures import REPLICA_SHARE, Process

ENDLESS_S = 1e10
"""Interval of a tier that saves at the end only: longer than any run."""


class Saving(NamedTuple):
    """How often a run saves, in steps.

    Attributes:
        disk_steps: Between two saves to disk; 0: only after the last step; None: as often as is best.
        memory_steps: Between two saves to the memory of the nodes; 0: never; None: as often as is best.
    """

    disk_steps: int | None = None
    memory_steps: int | None = None


BEST = Saving()


def saved(what: Process, saving: Saving, step_s: float) -> Process:
    """The process of a run that saves as it is told, and not as often as is best.

    A save that is due waits for the one before: for its replica, and on disk until it is committed. What a run waits so
    is a part of its stall, shared out over all saves.

    Args:
        what: The process with the best intervals; without a memory tier there is none whatever is asked for.
        saving: What the run is told.
        step_s: Seconds of one step.
    """
    tier = what.correlated < 1
    memory_s = saving.memory_steps * step_s if tier and saving.memory_steps else what.memory_s
    disk_s = what.disk_s
    if saving.disk_steps is not None:
        disk_s = saving.disk_steps * step_s or ENDLESS_S
    often_s = min(memory_s, disk_s)
    waits_s = max(0.0, what.write_s - disk_s) * often_s / disk_s
    if tier:
        waits_s += max(0.0, REPLICA_SHARE * what.replica_s - memory_s) * often_s / memory_s
    return what._replace(memory_s=memory_s, disk_s=disk_s, copy_s=what.copy_s + waits_s)

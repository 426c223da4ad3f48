"""What a run is told about its checkpoints, and the failure process that comes of it. Pure arithmetic."""

from __future__ import annotations

import math
from typing import NamedTuple

from strategies.failures import REPLICA_SHARE, Process

ENDLESS_S = 1e10
"""Interval of a tier that saves at the end only: longer than any run."""


class Saving(NamedTuple):
    """How often a run saves, in steps.

    Attributes:
        disk_steps: Between two saves to disk; 0: only after the last step; None: as often as is best.
        memory_steps: Between two saves to the memory of the nodes, at least; 0: never; None: as often as is best.
        memory_share: Largest share of the time that those may take, told in steps; 0: whatever they take.
    """

    disk_steps: int | None = None
    memory_steps: int | None = None
    memory_share: float = 0.0


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
    memory_s = affordable(what, saving, step_s) * step_s if tier and saving.memory_steps else what.memory_s
    disk_s = what.disk_s
    if saving.disk_steps is not None:
        disk_s = saving.disk_steps * step_s or ENDLESS_S
    often_s = min(memory_s, disk_s)
    waits_s = max(0.0, what.write_s - disk_s) * often_s / disk_s
    if tier:
        waits_s += _replica_waits_s(what, memory_s) * often_s / memory_s
    return what._replace(memory_s=memory_s, disk_s=disk_s, copy_s=what.copy_s + waits_s)


def affordable(what: Process, saving: Saving, step_s: float) -> int:
    """Steps between two saves to memory that take no more than their share of the time.

    A power of two times what was asked for, at most the steps between two saves to disk, as the run itself does it
    (:mod:`jobs.checkpoint.frequency`).

    Args:
        what: The process.
        saving: What the run is told, with steps between two saves to memory.
        step_s: Seconds of one step.
    """
    steps = saving.memory_steps or 1
    while saving.memory_share and step_s:
        taken_s = what.copy_s + _replica_waits_s(what, steps * step_s)
        if taken_s <= saving.memory_share * steps * step_s or 2 * steps > (saving.disk_steps or math.inf):
            break
        steps *= 2
    return steps


def _replica_waits_s(what: Process, memory_s: float) -> float:
    """Seconds that a save to memory waits for the replica of the one before."""
    return max(0.0, REPLICA_SHARE * what.replica_s - memory_s)

"""What a fault of the catalogue is made of. Values only: :mod:`launcher.drill.rehearsal` carries them out."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.faults import parse
from launcher.drill.acts import Act
from launcher.drill.disks import Kind as DiskKind
from launcher.drill.needs import Need
from launcher.drill.promises import Facts
from launcher.drill.toy import EVERY, NUMERIC_STEP, STEPS
from launcher.recovery import Action
from strategies.plan import ParallelPlan

LATER = 3  # steps


class Outcome(enum.StrEnum):
    """How a rehearsal must end, compared with the undisturbed run."""

    SAME = "bit-identical"
    CLOSE = "within rounding"  # the plan has changed


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One fault of the catalogue.

    Attributes:
        name: Its name on the command line.
        what: What it does, in a sentence.
        faults: What ranks do to themselves, in the grammar of :mod:`jobs.faults`, with ``{rank}``, ``{node}``,
            ``{other}`` (another node), ``{step}``, ``{later}`` (a few steps on) and ``{phase}`` in place of values.
        acts: What the drill does from outside, in this order.
        ambush: Phase in which the controller kills itself (:class:`launcher.drill.ambush.Ambush`); "" for none.
        ambush_late: Only once the ranks have come to the aim's step.
        changes: Configuration keys that are other than in the toy.
        needs: What must be there.
        failures: Kinds of failure as which it may be noticed, or decisions; without any such kind it must not be taken
            for a failure.
        events: Kinds of event that must be in the log because of it.
        promises: What else it must have come to: each says what is wrong, "" for nothing.
        steps: Steps of the run, where it needs more than the others.
        outcome: How it must end.
        adopted: The next controller must take over the live ranks.
        numeric: The undisturbed run to compare with leaves out the samples of the aim's step.
        resumes: How often a person must resume; the table says so.
        disk: The file system of the checkpoints.
        network: Nodes are machines of their own, in network namespaces.
        saving: Its step must be one after which a checkpoint is made.
        least_step: First step at which it can happen.
        last_step: Last step at which it is drawn, where what follows takes more than one; 0 for the last but one.
        drawn: May be drawn by ``--faults random``.
    """

    name: str
    what: str
    faults: tuple[str, ...] = ()
    acts: tuple[Act, ...] = ()
    ambush: str = ""
    ambush_late: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    failures: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    promises: tuple[Callable[[Facts], str], ...] = ()
    steps: int = STEPS
    outcome: Outcome = Outcome.SAME
    adopted: bool = False
    numeric: bool = False
    resumes: int = 0
    disk: DiskKind = ""
    network: bool = False
    saving: bool = False
    least_step: int = EVERY + 2
    last_step: int = 0
    drawn: bool = False

    @property
    def fails(self) -> bool:
        """Something must be taken for a failure; else nothing may be."""
        return bool(set(self.failures) - set(Action))

    @property
    def held(self) -> bool:
        """A rank is stopped at the exact place until the drill has acted."""
        return any(act.held for act in self.acts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Aim:
    """Where a fault strikes.

    Attributes:
        rank: The rank, or the rank at whose step the drill acts.
        node: Index of the node in the gang.
        other: Index of another node; the same where there is only one.
        step: The step.
        phase: Where in the step.
    """

    rank: int
    node: int
    other: int
    step: int
    phase: str = "step_begin"


def usual_aim(case: Case, plan: ParallelPlan, nodes: int) -> Aim:
    """Where a fault strikes when nothing is drawn: so late that going back to the disk costs more than to memory."""
    step = NUMERIC_STEP if case.numeric else max(3 * EVERY, case.least_step)
    if case.saving:
        step = -(-step // EVERY) * EVERY
    assert step < case.steps
    return Aim(rank=plan.world_size - 1, node=nodes - 1, other=0, step=step)


def faults_of(case: Case, aim: Aim) -> tuple[str, ...]:
    """What the ranks of a rehearsal do to themselves, in canonical form.

    Raises:
        ConfigError: This version does not know one of them.
    """
    place: dict[str, object] = {"rank": aim.rank, "node": aim.node, "other": aim.other, "phase": aim.phase}
    place |= {"step": aim.step, "later": aim.step + LATER}
    texts = (*((hold(aim),) if case.held else ()), *(text.format(**place) for text in case.faults))
    return tuple(str(fault) for fault in parse(texts))


def hold(aim: Aim) -> str:
    """The fault that stops a rank until the drill has acted."""
    phase = "" if aim.phase == "step_begin" else f",phase={aim.phase}"
    return f"rank_stop@rank={aim.rank},step={aim.step}{phase}"

"""Training that blows up again where its samples were left out: how far back the run goes then. Pure.

The loss of a step is computed with the weights that the update before has made. That update may be what was bad, with
numbers as finite as ever: then so is the state that the run has gone on from, and other samples do not help. So the
second time it goes back to a state older than that one, and leaves out all samples from there up to and including those
of the step, once. Where it does not get past the step then either, it is given up (:mod:`launcher.policy`).

Which state that is shows only when the next attempt is planned; the skip is decided with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.spec import JobSpec
from strategies.schedule import Skip

if TYPE_CHECKING:
    from launcher.run import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollback:
    """What a run that has blown up twice must get past, and what it may go on from.

    Attributes:
        step: The step; 0 for none.
        before: Only states of earlier steps may be gone on from; 0 for any. So it is once an attempt is planned: what
            is newer than the state that it begins with is none of the run's history from then on.
    """

    step: int = 0
    before: int = 0

    def skip(self, job: JobSpec, point: int) -> Skip | None:
        """What is left out by an attempt that begins with the state of step ``point``; None where it is no rollback.

        Args:
            job: With what was left out so far.
            point: A step before :attr:`before`.
        """
        if not self.before:
            return None
        schedule = job.schedule()
        return Skip(step=point + 1, samples=schedule.step_range(self.step).stop - schedule.first_index(point + 1))

    def skips(self, before: tuple[Skip, ...], skip: Skip | None) -> tuple[Skip, ...]:
        """All that recovery leaves out, with what is decided now: it has in it what was left out on the way."""
        if skip is None:
            return before
        return (*(one for one in before if not skip.step < one.step <= self.step), skip)


Answer = tuple[Skip | None, Rollback | None]


def answer(run: Run, step: int, samples: int) -> Answer:
    """What is tried after a blow-up: to leave out its samples, then to go back further, then nothing.

    Args:
        run: The run, the blow-up already folded in.
        step: Where it was.
        samples: What the step was made of.
    """
    if 0 < step <= run.rollback.step:
        return None, None
    point = run.attempt.first_step - 1 if run.attempt else 0
    at_once = step == point + 1
    if any(skip.step == step or (at_once and skip.step > step) for skip in run.skips):
        return None, Rollback(step=step, before=point) if point else None
    return Skip(step=step, samples=samples), None

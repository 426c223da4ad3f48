"""How large the next gang is: as large as asked for, smaller because nodes are missing, or not yet. Pure.

::

    enough nodes for the plan that is asked for  -> that plan
    too few, waiting is cheaper                  -> wait
    too few, it is not, or no other can come     -> shrink: the next plan that is legal and runs on what is there
    no such plan for wait_for_nodes_s            -> give up, with the reason
    smaller than it could be, grow               -> leave at the next checkpoint, start the larger plan

How long waiting is cheaper follows from what restarts have taken (:func:`strategies.shrink.worth_waiting_s`); while
that is not known, it is :data:`UNKNOWN_S`. It is never less than an agent takes to be lost and up again. A person's
``shrink_after_s`` takes the place of all that. It counts from when a smaller plan could run.

The first attempt is never smaller: a person who asks for four nodes and has three wants to know. Who has waited for a
node once does not wait for it again at the next failure.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from jobs.spec import JobSpec
from launcher.attempts import Attempt
from launcher.recovery import Action, Decision
from launcher.request import LaunchRequest
from launcher.run import Run
from launcher.shortage import Lapse
from strategies.codec import from_json
from strategies.errors import ConfigError
from strategies.plan import ParallelPlan
from strategies.shrink import plan_on, step_work, throughput, worth_waiting_s
from strategies.topology import nodes_needed

UNKNOWN_S = 60.0
"""How long to wait for a node where no attempt has trained yet, so that nobody knows what a restart takes; and at least
after a person's resume, when nodes only begin to come."""

COMES_UP_S = 5.0
"""An agent that has died is up again within so long after ``recovery.detect_s``: for that no run shrinks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What to do with the nodes that are there.

    Attributes:
        plan: Start this one now; None means not yet, or never.
        decision: What to put on record: without a plan, why it is waited, or the end of the run.
    """

    plan: ParallelPlan | None = None
    decision: Decision | None = None


class Sizing:
    """Answers for one request.

    Args:
        request: Its plan is the one that is wanted.

    Attributes:
        need: Nodes that the wanted plan takes.
    """

    def __init__(self, request: LaunchRequest) -> None:
        self._job: JobSpec = request.job
        self._cluster = request.cluster
        self._spec = request.recovery
        self._largest: dict[int, ParallelPlan | None] = {}
        self.need = nodes_needed(request.job.plan, request.cluster.slots_per_node)

    def possible(self, run: Run, up: int) -> bool:
        """Whether so many nodes are enough for a plan that may be used while no gang runs."""
        found = self.largest(up)
        return found is not None and (found == self._job.plan or run.attempt is not None)

    def choose(
        self, run: Run, *, up: int, lapse: Lapse, resumed: bool, why: Callable[[], str], hopeless: bool = False
    ) -> Answer:
        """What to start on the nodes that are up while no gang runs.

        Args:
            run: The run.
            up: Nodes that can be used now.
            lapse: How long it has been waited for more.
            resumed: A person has asked for the wanted plan anew, so that all its nodes are waited for.
            why: Says why nodes are missing.
            hopeless: They are left out by the run itself, and there are no others: none can come.
        """
        wanted, found = self._job.plan, self.largest(up)
        if found == wanted:
            return Answer(plan=wanted)
        if found is not None and run.attempt is not None:
            before = None if resumed else self._shrunk(run.attempt)
            if before is not None and (found == before or step_work(found) < step_work(before)):
                return Answer(plan=found, decision=None if found == before else self._growth(found, up))
            patience_s, words = (
                (0.0, "there is no other node to wait for") if hopeless else self._patience(run, found, resumed)
            )
            if lapse.idle_s >= patience_s:
                return Answer(plan=found, decision=self._shrinking(found, up, lapse.waited_s, why(), words))
            return Answer(decision=self._waiting(run, up, patience_s, words))
        if lapse.barren_s > self._spec.wait_for_nodes_s:
            return Answer(decision=self._ending(run, up, lapse.barren_s, why()))
        return Answer(decision=self._waiting(run, up, self._spec.wait_for_nodes_s, ""))

    def growth(self, plan: ParallelPlan, up: int) -> Decision | None:
        """Why the running gang should leave at its next checkpoint; None if it is as large as it can be."""
        wanted = self._job.plan
        if plan == wanted or not self._spec.grow:
            return None
        found = self.largest(up)
        if found is None or (found != wanted and step_work(found) >= step_work(plan)):
            return None
        return self._growth(found, up)

    def largest(self, up: int) -> ParallelPlan | None:
        """The plan for so many nodes: the wanted one, a smaller one where that is allowed, or None."""
        if up >= self.need:
            return self._job.plan
        if self._obstacle(up):
            return None
        if up not in self._largest:
            self._largest[up] = plan_on(
                model=self._job.model,
                plan=self._job.plan,
                batch=self._job.batch,
                cluster=replace(self._cluster, nodes=up, spares=0),
                precision=self._job.train.precision,
            )
        return self._largest[up]

    def _obstacle(self, up: int) -> str:
        if self._job.kind == "script":
            return "a script decides on its ranks by itself"
        if not self._spec.shrink:
            return "recovery.shrink=false"
        if up < (self._spec.min_nodes or 1):
            return f"recovery.min_nodes={self._spec.min_nodes}" if self._spec.min_nodes else "none is left"
        return ""

    def _shrunk(self, attempt: Attempt) -> ParallelPlan | None:
        """The plan of an attempt that was smaller than what is wanted now as well."""
        plan = plan_of(attempt)
        return None if plan == self._job.plan or wanted_of(attempt) != self._job.plan else plan

    def _patience(self, run: Run, found: ParallelPlan, resumed: bool) -> tuple[float, str]:
        """How long to wait before ``found`` (s), and what speaks for that, in numbers, with what has decided."""
        speed, restart_s, spec, by = throughput(found, self._job.plan), _restart_s(run), self._spec, ""
        words, patience_s = f"{found.describe()} would make {speed:.0%} of the steps per second", UNKNOWN_S
        if restart_s is None:
            words += "; what a restart takes is not known yet"
        else:
            patience_s = worth_waiting_s(found, self._job.plan, restart_s)
            words += f" and one more restart of {restart_s:.1f} s later, to grow back: waiting is cheaper up to "
            words += f"{restart_s:.1f} s / {speed:.2f} = {patience_s:.1f} s"
        least_s = spec.detect_s + COMES_UP_S
        if spec.shrink_after_s is not None:
            patience_s, by = spec.shrink_after_s, f"recovery.shrink_after_s={spec.shrink_after_s:g}"
        elif resumed and patience_s < UNKNOWN_S:
            patience_s, by = UNKNOWN_S, "the resume: nodes have only begun to come"
        elif patience_s < least_s:
            patience_s, by = least_s, f"recovery.detect_s + {COMES_UP_S:g} s: its agent may come up again"
        if patience_s > spec.wait_for_nodes_s:
            patience_s, by = spec.wait_for_nodes_s, f"recovery.wait_for_nodes_s={spec.wait_for_nodes_s:g}"
        return patience_s, f"{words} (decided by {by})" if by else words

    def _waiting(self, run: Run, up: int, patience_s: float, words: str) -> Decision:
        reason = f"waiting at most {patience_s:.0f} s for {self.need - up} of {self.need} nodes"
        if not words and run.attempts:
            words = f"no smaller plan is used: {self._obstacle(up) or 'none is legal there'}"
        return Decision(action=Action.WAIT, reason=f"{reason}; {words}" if words else reason)

    def _shrinking(self, plan: ParallelPlan, up: int, waited_s: float, why: str, words: str) -> Decision:
        reason = f"{up} of {self.need} nodes are there after {waited_s:.0f} s: {why}; going on as {self._words(plan)}"
        return Decision(action=Action.SHRINK, reason=f"{reason}; {words}")

    def _growth(self, plan: ParallelPlan, up: int) -> Decision:
        reason = f"{min(up, self.need)} of {self.need} nodes are there again: going on as {self._words(plan)}"
        return Decision(action=Action.GROW, reason=reason)

    def _ending(self, run: Run, up: int, waited_s: float, why: str) -> Decision:
        reason = f"only {up} of {self.need} nodes came within {waited_s:.0f} s: {why}"
        if run.attempts:
            obstacle = self._obstacle(up) or "none is legal there"
            reason += f"; no smaller plan is used: {obstacle}"
        return Decision(action=Action.GIVE_UP, reason=reason)

    def _words(self, plan: ParallelPlan) -> str:
        nodes = nodes_needed(plan, self._cluster.slots_per_node)
        return f"{plan.describe()} on {nodes} node{'' if nodes == 1 else 's'}"


def _restart_s(run: Run) -> float | None:
    """Seconds that a restart takes, the median so far; what is known of first starts, where there was none."""
    took = [(one.reason, one.trained - one.started) for one in run.attempts[:1] if one.trained is not None]
    took += [(one.reason, _took_s(before, one)) for before, one in pairwise(run.attempts) if one.trained is not None]
    warm = [seconds for reason, seconds in took if reason not in ("start", "resume")]  # by a person, on nodes just met
    starts = warm or [seconds for _, seconds in took]
    return statistics.median(starts) if starts else None


def _took_s(before: Attempt, one: Attempt) -> float:
    """From the end of the ranks before to the first step, without waits; from its plan, if a controller fell there."""
    assert one.trained is not None
    seconds = one.trained - one.started
    if before.ended is None or before.epoch != one.epoch or one.reason == "resume":
        return seconds
    idle_from = one.started if before.idle_from is None else min(before.idle_from, one.started)
    return seconds + max(0.0, idle_from - before.ended)


def plan_of(attempt: Attempt) -> ParallelPlan | None:
    """The plan of an attempt; None if another version wrote it."""
    return _read(attempt.plan)


def wanted_of(attempt: Attempt) -> ParallelPlan | None:
    """The plan that was asked for when the attempt was planned; None if another version wrote it."""
    return _read(attempt.plan if attempt.wanted is None else attempt.wanted)


def _read(plan: Mapping[str, Any]) -> ParallelPlan | None:
    try:
        return from_json(ParallelPlan, plan)
    except ConfigError:
        return None

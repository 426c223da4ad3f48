"""Ranks that leave in good order while all is well, because there is a better place for them.

=========  ==============================================  =========================================================
decision   why                                             when they leave
=========  ==============================================  =========================================================
leave      a node of theirs will be taken away             after a step that all ranks are told beforehand
replace    a rank is slow, and a spare stands by           at the next checkpoint
grow       they are fewer than they could be               at the next checkpoint
=========  ==============================================  =========================================================

Nothing is lost in any of them, and none counts as a restart.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, Protocol

from jobs.paths import RunPaths
from launcher.clock import Clock
from launcher.exclusion import Exclusion
from launcher.gang_state import GangState
from launcher.muster import Muster
from launcher.recovery import Action, Decision, Failure
from launcher.request import LaunchRequest
from launcher.run import EventKind
from launcher.sizing import Sizing
from launcher.store import dump, write_atomic
from launcher.straggler import StragglerWatch

FOR_MORE = "it left at a checkpoint, for a larger plan"
ELSEWHERE = "it left in good order, to go on on other nodes"
CAUSE = {"grow": FOR_MORE, "move": ELSEWHERE}
"""Why an attempt has ended, by the reason of the next one."""

DELIVERY_S = 1.0  # in which an order comes to every rank; a rank that it comes to too late is found by the deadline
STEPS_AHEAD = 2  # what the controller knows of the gang is at most one step old, and one is under way


class Gang(Protocol):
    """What is needed of :class:`launcher.gang.Gang`."""

    def leave(self, attempt: int, after: int) -> None:
        """Ask every rank to save and leave when it has completed step ``after``."""


class Departure:
    """Decides whether the ranks of a running gang should leave, and asks them to.

    Args:
        request: What runs.
        paths: The run's files.
        sizing: Says whether a larger plan fits.
        muster: Knows the nodes.
        clock: Source of time.
        record: Writes an event.
    """

    def __init__(
        self,
        request: LaunchRequest,
        paths: RunPaths,
        *,
        sizing: Sizing,
        muster: Muster,
        clock: Clock,
        record: Callable[..., None],
    ) -> None:
        self._plan, self._steps = request.job.plan, request.job.train.steps
        self._spec = request.recovery
        self._paths = paths
        self._sizing, self._muster, self._clock, self._record = sizing, muster, clock, record
        self.stragglers = StragglerWatch()

    def look(self, gang: Gang, state: GangState, step_s: float) -> None:
        """Once per turn while a gang trains.

        Args:
            gang: Its agents.
            state: What is known of it.
            step_s: Seconds of a step; 0 while that is not known.
        """
        for failure, ratio in self.stragglers.take():
            self._record(EventKind.STRAGGLER_FOUND, failure=failure, ratio=round(ratio, 3))
            if self._spec.replace_stragglers and not state.leaving and not state.script:
                self._replace(state, failure)
        if state.notices and state.training and not state.script:
            self._before_a_node_goes(gang, state, step_s)
        elif state.leaving != "move":
            self._for_more(state)

    def _before_a_node_goes(self, gang: Gang, state: GangState, step_s: float) -> None:
        """All ranks must leave after the same step: one that none of them has come to when the word comes."""
        if state.leave_after >= max(1, state.last_step):
            return
        ahead = STEPS_AHEAD + (math.ceil(DELIVERY_S / step_s) if step_s > 0 else 0)
        after = state.last_step + ahead
        if after >= self._steps:
            return  # it will be done by then
        if not state.leave_after:
            why = "; ".join(state.notices.values())
            about = f", in about {ahead * step_s:.1f} s" if step_s > 0 else ""
            self._decide(Action.LEAVE, f"{why}: all ranks save and leave after step {after}{about}; nothing is lost")
        state.leaving, state.leave_after = "move", after
        gang.leave(state.attempt, after)

    def _replace(self, state: GangState, failure: Failure) -> None:
        """Only if nobody has to wait: a node stands by, and the present plan goes on."""
        if self._muster.warm(state.placement) <= len(state.placement):
            return
        self._decide(Action.REPLACE, f"{failure.detail}: the ranks leave at their next checkpoint, a spare takes over")
        until = self._clock.time() + self._spec.exclude_for_s
        self._record(EventKind.NODE_EXCLUDED, **Exclusion(node=failure.node, until=until, reason=failure.detail).fields)
        self._ask(state, "move", failure.detail)

    def _for_more(self, state: GangState) -> None:
        """A larger plan fits: ask the ranks to leave at their next checkpoint; not any more: let them stay."""
        if state.plan == self._plan and not state.leaving:
            return  # as large as was asked for: nothing to count in every turn
        growth = self._sizing.growth(state.plan, self._muster.warm(state.placement)) if state.training else None
        if (growth is not None) is bool(state.leaving):
            return
        if growth is None:
            with contextlib.suppress(OSError):  # they may leave all the same, and go on as they were
                self._paths.leave(state.attempt).unlink()
            state.leaving = ""
        else:
            self._record(EventKind.DECISION, **growth.fields)
            self._ask(state, "grow", growth.reason)

    def _ask(self, state: GangState, next_reason: str, why: str) -> None:
        write_atomic(self._paths.leave(state.attempt), dump({"reason": why}))
        state.leaving = next_reason

    def _decide(self, action: Action, reason: str) -> None:
        fields: dict[str, Any] = Decision(action=action, reason=reason).fields
        self._record(EventKind.DECISION, **fields)

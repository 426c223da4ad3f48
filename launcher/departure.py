"""Ranks that leave in good order while all is well, because there is a better place for them.

=========  ==============================================  =========================================================
decision   why                                             when they leave
=========  ==============================================  =========================================================
leave      a node of theirs will be taken away             after a step that all ranks are told beforehand
replace    a rank is slow, and a spare stands by           at the next checkpoint, on disk or in memory
grow       they are fewer than they could be               at the next checkpoint, on disk or in memory
=========  ==============================================  =========================================================

Nothing is lost in any of them, and none counts as a restart. Where a node goes before that is possible,
:mod:`launcher.notice` says what is done instead, and what it costs. Ranks that keep copies in memory can leave after
any step: they make one on purpose. So they are told one that nobody can have come to when the word of it comes, and
leave there or at a checkpoint that is due on disk, whichever is first. Where nothing urges, they do not wait for a disk
at which nothing is due: all nodes stay, and the next gang goes on from the copies. Ranks that come to no checkpoint
before the last step are not asked.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from jobs.paths import RunPaths
from launcher.clock import Clock
from launcher.exclusion import Exclusion
from launcher.gang_state import GangState
from launcher.hang_watch import HangWatch
from launcher.muster import Muster
from launcher.notice import Course, Kept, choose, unhurried
from launcher.observation import Observation
from launcher.recovery import Action, Decision, Failure, FailureKind
from launcher.request import LaunchRequest
from launcher.run import EventKind
from launcher.sizing import Sizing
from launcher.store import dump, write_atomic
from launcher.straggler import StragglerWatch

FOR_MORE = "it left at a checkpoint, for a larger plan"
ELSEWHERE = "it left in good order, to go on on other nodes"
IN_VAIN = "it left at a checkpoint, for a larger plan whose nodes had gone again by then"
REASON = {FOR_MORE: "grow", ELSEWHERE: "move", IN_VAIN: "grow"}
"""Why there is another attempt, by the cause of the end of one."""
CAUSE = {"grow": FOR_MORE, "move": ELSEWHERE, "": IN_VAIN}
"""Why an attempt has ended, by what its ranks were to leave for at the end."""
NEWEST_SAVES = 5  # that say how long the next one takes


class Gang(Protocol):
    """What is needed of :class:`launcher.gang.Gang`."""

    def leave(self, attempt: int, after: int, *, in_memory: bool = False) -> None:
        """Ask every rank to save, or only to copy, and leave when it has completed step ``after``."""


class SaveClock:
    """How long it takes from the end of a step until its checkpoint is committed."""

    def __init__(self) -> None:
        self._took: deque[float] = deque(maxlen=NEWEST_SAVES)  # seconds
        self._began: tuple[int, float] = (0, 0.0)  # step, UTC seconds by the clock of the node of rank 0

    @property
    def longest_s(self) -> float:
        """Seconds, the longest of the newest few: a store that was slow once is not slow for ever. 0 while none was."""
        return max(self._took, default=0.0)

    def note(self, seen: Observation) -> None:
        """Take in what an agent says."""
        data = seen.data
        if seen.kind != "report" or data.get("rank") != 0:
            return
        if data.get("kind") == "step" and data.get("next") == "save":
            self._began = int(data["step"]), seen.time
        elif data.get("kind") == "checkpoint" and int(data["step"]) == self._began[0]:
            committed = float(data.get("committed", seen.time))
            self._took.append(committed - self._began[1])
            self._began = (0, 0.0)


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
        self._job, self._plan = request.job, request.job.plan
        self._spec = request.recovery
        self._paths = paths
        self._sizing, self._muster, self._clock, self._record = sizing, muster, clock, record
        self.stragglers = StragglerWatch()
        self.saves = SaveClock()
        self._gone_at: dict[str, float] = {}  # node that will be taken away: when (monotonic)
        self._said = ""

    def note(self, seen: Observation) -> None:
        """Take in what an agent says."""
        self.stragglers.note(seen)
        self.saves.note(seen)

    def look(self, gang: Gang, state: GangState, hangs: HangWatch) -> Failure | None:
        """Once per turn while a gang trains.

        Args:
            gang: Its agents.
            state: What is known of it.
            hangs: Knows how long steps take.

        Returns:
            Why the ranks are to end at once; None if they are not.
        """
        for failure, ratio in self.stragglers.take():
            self._record(EventKind.STRAGGLER_FOUND, failure=failure, ratio=round(ratio, 3))
            if self._spec.replace_stragglers and not state.leaving and not state.script:
                self._replace(state, failure, hangs)
        if state.notices and state.training and not state.script:
            return self._before_a_node_goes(gang, state, hangs)
        if state.leaving != "move":
            self._for_more(state, hangs)
        if state.leaving:
            self._order(gang, state, hangs)
        return None

    def _before_a_node_goes(self, gang: Gang, state: GangState, hangs: HangWatch) -> Failure | None:
        """All ranks must leave after the same step: one that none of them has come to when the word comes."""
        now = self._clock.monotonic()
        known = self._gone_at
        self._gone_at = {node: known.get(node, now + told.within_s) for node, told in state.notices.items()}
        agreed, moving = _agreed(state), state.leaving == "move"
        if agreed and (moving or agreed == state.last_step):
            return None
        first = min(state.notices, key=lambda node: self._gone_at[node])
        at = hangs.present(state.last_step, now, save_s=self.saves.longest_s)
        answer = choose(at, self._kept(state), max(0.0, self._gone_at[first] - now), agreed)
        told = f"{'; '.join(notice.detail for notice in state.notices.values())}: {answer.words}"
        if answer.course is Course.SWAP:
            detail, when = told, self._clock.time()
            return Failure(kind=FailureKind.PREEMPTED, time=when, node=first, step=state.last_step + 1, detail=detail)
        said = f"{answer.course} {state.attempt}"
        if answer.words and self._said != said and not (moving and state.leave_after):
            self._said = said
            self._decide(Action.LEAVE, told)
        if answer.course is Course.LEAVE:
            state.leaving, state.leave_after, state.asked = "move", answer.step, True
            gang.leave(state.attempt, answer.step)
        return None

    def _kept(self, state: GangState) -> Kept:
        job = self._job
        return Kept(
            steps=job.train.steps,
            newest=max(state.commits, default=state.first_step - 1),
            disk_every=job.checkpoint.every,
            memory_every=job.checkpoint.memory_every if state.copies_every is None else state.copies_every,
        )

    def _may_leave(self, state: GangState, hangs: HangWatch) -> bool:
        """They come to a checkpoint, on disk or as far as is known in memory, before they are done anyway."""
        kept = replace(self._kept(state), memory_every=0)
        on_disk = kept.next_after(state.last_step) < kept.steps
        return self._job.kind == "pretrain" and (on_disk or self._unhurried(state, hangs) > 0)

    def _unhurried(self, state: GangState, hangs: HangWatch) -> int:
        """A step after which ranks that keep copies can leave, and before the last; 0 for none.

        Nothing urges: a node to which the word has not come within ``recovery.detect_s`` is lost.
        """
        if not state.copies_every:
            return 0
        at = hangs.present(state.last_step, self._clock.monotonic(), save_s=self.saves.longest_s)
        after = unhurried(at, self._spec.detect_s)
        return after if after < self._job.train.steps else 0

    def _order(self, gang: Gang, state: GangState, hangs: HangWatch) -> None:
        """Where copies are kept, the next checkpoint on disk need not be waited for."""
        if not _agreed(state) and (after := self._unhurried(state, hangs)):
            state.leave_after = after
            gang.leave(state.attempt, after, in_memory=True)

    def _replace(self, state: GangState, failure: Failure, hangs: HangWatch) -> None:
        """Only if nobody has to wait: a node stands by, and the present plan goes on."""
        if self._muster.warm(state.placement) <= len(state.placement) or not self._may_leave(state, hangs):
            return
        self._decide(Action.REPLACE, f"{failure.detail}: the ranks leave at their next checkpoint, a spare takes over")
        until = self._clock.time() + self._spec.exclude_for_s
        self._record(EventKind.NODE_EXCLUDED, **Exclusion(node=failure.node, until=until, reason=failure.detail).fields)
        self._ask(state, "move", failure.detail)

    def _for_more(self, state: GangState, hangs: HangWatch) -> None:
        """A larger plan fits: ask the ranks to leave at their next checkpoint; not any more: let them stay."""
        if state.plan == self._plan and not state.leaving:
            return  # as large as was asked for: nothing to count in every turn
        possible = state.training and (bool(state.leaving) or self._may_leave(state, hangs))
        growth = self._sizing.growth(state.plan, self._muster.warm(state.placement)) if possible else None
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
        state.leaving, state.asked = next_reason, True

    def _decide(self, action: Action, reason: str) -> None:
        fields: dict[str, Any] = Decision(action=action, reason=reason).fields
        self._record(EventKind.DECISION, **fields)


def _agreed(state: GangState) -> int:
    """The step after which ranks have been told to leave, while all of them may still obey; 0 for none."""
    return state.leave_after if state.leave_after >= max(1, state.last_step) else 0

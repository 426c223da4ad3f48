"""When has a gang stopped making progress? Learns how long steps take, asks where ranks stand, names the culprit.

A step may take three times as long as the 99th percentile of those of its size, and :data:`MARGIN_S`. For a size of the
batch that was not seen yet, :mod:`launcher.pace` says what it may take. The first steps of an attempt have the patience
of the start, or what earlier ones of the plan took and :data:`EARLY_MARGIN_S` for what is new on a node.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from jobs.course import Progress
from launcher.clock import Clock
from launcher.hang import Standing, culprit, late_at_the_start
from launcher.notice import Present
from launcher.observation import Observation
from launcher.pace import Pace, Past
from launcher.recovery import Failure, FailureKind
from strategies.plan import ParallelPlan
from strategies.shrink import work
from strategies.topology import Topology

FACTOR = 3.0  # a hang is a step that takes so many times the 99th percentile ...
MARGIN_S = 5.0  # ... and so much longer
TURN_S = 0.25  # it is judged so much before that is over: a controller looks five times a second
ASK_S = 1.25  # and so much before it ranks are asked where they stand, so that their answers are there
EARLY_MARGIN_S = 30.0  # for the first steps of an attempt
ANSWERS_S = 3.0  # ranks that have not said by then where they stand will not
AFTER_S = 60.0  # so much later than a controller ranks may get a share back: clients try again less and less often


class StepClock:
    """How long steps take, and how long nothing has happened.

    Args:
        world_size: Number of ranks.
        start: When the first step began (monotonic seconds).
        first: The work of the first step (:mod:`launcher.pace`).
    """

    def __init__(self, world_size: int, start: float, first: float = 0.0) -> None:
        self._world = world_size
        self._last = self._since = start
        self._reached: Counter[int] = Counter()
        self._next: dict[int, str] = {}
        self._ahead: dict[int, float] = {}  # the work of steps that are not complete
        self._work = first
        self.steps: dict[int, int] = {}
        self.pace = Pace()

    def note(self, rank: int, step: int, doing: str, now: float, ahead: float = 0.0) -> None:
        """A rank has completed ``step`` and goes on with ``doing``: ``step``, ``evaluate``, ``save`` or ``finish``.

        ``ahead`` is the work of the step after it.
        """
        before = self._next.get(rank)
        beside = (before == "save" and doing == "step") or (before == "evaluate" and doing != "evaluate")
        now = max(now, self._last)  # it may have been heard shortly before we began to watch
        self._last, self._next[rank] = now, doing
        if beside:
            self._since = now  # what saving or evaluating took is not the time of a step
        if step <= self.steps.get(rank, 0):
            return
        self.steps[rank] = step
        self._reached[step] += 1
        if ahead:
            self._ahead[step + 1] = ahead
        if self._reached[step] == self._world:
            del self._reached[step]
            self.pace.note(self._work, now - self._since)
            self._since, self._work = now, self._ahead.pop(step + 1, 0.0)

    def excuse(self, now: float) -> None:
        """Nothing could be heard up to now: that is no silence of ranks, and no time of a step."""
        self._last = self._since = now

    @property
    def busy(self) -> str:
        """What some rank does beside training: ``save``, ``finish``, ``evaluate`` or "" for nothing."""
        doings = set(self._next.values())
        return next((word for word in ("save", "finish", "evaluate") if word in doings), "")

    @property
    def work(self) -> float:
        """Of the step that is under way."""
        return self._work

    def limit_s(self, first_s: float) -> float:
        """How long nothing may happen before it is asked why; ``first_s`` while too few steps were seen."""
        return FACTOR * self.pace.most_s(self._work) + MARGIN_S if self.pace.learned else first_s

    def elapsed_s(self, step: int, now: float) -> float:
        """Seconds since every rank had completed ``step``; 0 while not all have, and beside training."""
        complete = len(self.steps) == self._world and min(self.steps.values()) >= step
        began = complete or not self.steps
        return now - self._since if began and not self.busy else 0.0

    def leave_out(self, seconds: float, now: float) -> None:
        """Of the step that is under way: they are not its own."""
        self._since = min(now, self._since + seconds)

    def silent_s(self, now: float) -> float:
        """Seconds since anything was heard."""
        return now - self._last


class Gang(Protocol):
    """What is needed of :class:`launcher.gang.Gang`."""

    @property
    def in_doubt(self) -> bool:
        """That nothing is heard says nothing about the ranks."""

    def dump(self, attempt: int) -> None:
        """Ask every node where its ranks stand."""


class HangWatch:
    """Watches one attempt after the other.

    Args:
        first_s: Patience with the first steps of a plan, if nothing speaks for more; later attempts have such as theirs
            took before.
        save_s: Patience with a checkpoint.
    """

    def __init__(self, *, first_s: float, save_s: float) -> None:
        self._topology: Topology | None = None
        self._start_s = first_s
        self._past: dict[ParallelPlan, Past] = {}
        self._told_s = 0.0
        self._plan: ParallelPlan | None = None
        self._micro_batches = 0  # of the first step of the attempt that begins
        self._works: dict[int, float] = {}
        self._save_s = save_s
        self._clock: StepClock | None = None
        self.starting = False
        """Ranks were ordered, and the first step has not begun."""
        self._asked: float | None = None
        self._excused = -math.inf
        self._looked, self._again = -math.inf, False
        self._answers: dict[int, Mapping[str, Any]] = {}
        self._nodes: dict[int, str] = {}

    def present(self, last: int, now: float, *, save_s: float) -> Present:
        """Where the gang is in the step after ``last``, and how long steps take."""
        clock = self._clock
        if clock is None or self.starting:
            return Present(last=last, elapsed_s=0.0, typical_s=0.0, most_s=self._told_s, save_s=save_s)
        return Present(
            last=last,
            elapsed_s=clock.elapsed_s(last, now),
            typical_s=clock.pace.typical_s,
            most_s=clock.pace.most_s(clock.work) or self._told_s,
            save_s=save_s,
        )

    def start(self, plan: ParallelPlan, now: float, nodes: Mapping[int, str]) -> None:
        """The ranks of an attempt are ordered, or taken over before their first step (rank to node); see begin."""
        self.begin(plan, now)
        self._nodes, self.starting = dict(nodes), True

    def begin(self, plan: ParallelPlan, now: float, *, told_s: float = 0.0) -> None:
        """The first step of an attempt begins.

        Args:
            plan: Its plan, which names the coordinates of a culprit.
            now: Monotonic seconds.
            told_s: How long the newest step took that the run has on record, whoever watched it; 0 for none.
        """
        self.end()
        self._plan, self._topology, self._told_s, self._works = plan, Topology(plan), told_s, {}
        self._clock = StepClock(plan.world_size, now, self._work_of(self._micro_batches))
        self._micro_batches = 0
        self._asked, self._excused, self._answers, self._nodes = None, -math.inf, {}, {}

    def end(self) -> None:
        """The attempt ends."""
        if self._clock is not None and self._plan is not None and not self.starting:
            self._past.setdefault(self._plan, Past()).learn(self._clock.pace)
        self._clock, self.starting = None, False

    def _work_of(self, micro_batches: int) -> float:
        if micro_batches and micro_batches not in self._works and self._plan is not None:
            self._works[micro_batches] = work(self._plan, micro_batches)
        return self._works.get(micro_batches, 0.0)

    def _first_s(self, clock: StepClock) -> float:
        """Patience while too few steps of the attempt were seen."""
        if self.starting:
            return self._start_s
        here_s, past = clock.pace.most_s(clock.work), self._past.get(self._plan) if self._plan else None
        if past is not None and past.learned:
            most_s = max(here_s, past.most_s(clock.work))
            return max(FACTOR * most_s + MARGIN_S, min(self._start_s, FACTOR * most_s + EARLY_MARGIN_S))
        elsewhere = (one.most_s(clock.work) for one in self._past.values())
        return max(self._start_s, FACTOR * max(here_s, self._told_s, *elsewhere) + MARGIN_S)

    def note(self, seen: Observation, now: float) -> None:
        """Take in what an agent says."""
        data = seen.data
        if seen.kind == "report" and data.get("kind") == "training":
            self._micro_batches = int(data.get("micro_batches", 0))
        if self._clock is None:
            return
        if seen.kind == "report" and data.get("kind") == "step" and not self.starting:
            self._nodes[int(data["rank"])] = seen.node
            ahead = self._work_of(int(data.get("micro_batches", 0)))
            self._clock.note(int(data["rank"]), int(data["step"]), str(data.get("next", "step")), now, ahead)
            self._asked = None  # it goes on
        elif seen.kind == "stack":
            self._nodes[int(data["rank"])] = seen.node
            self._answers[int(data["rank"])] = data

    @contextlib.contextmanager
    def held_up(self, clock: Clock) -> Iterator[None]:
        """Around what may wait for the run directory: ranks that wait for it, too, do not hang and go on soon after."""
        began = clock.monotonic()
        yield
        now = clock.monotonic()
        held_s, steps = now - began, self._clock
        if steps is not None and held_s > MARGIN_S and steps.silent_s(now) <= self._save_s:
            self._asked, self._excused = None, now + min(held_s, AFTER_S)
            steps.leave_out(held_s, now)

    def look(self, gang: Gang, attempt: int, world_size: int, *, now: float, wall: float) -> Failure | None:
        """Ask, wait for the answers, and say who it is. None while all is well or answers are missing."""
        clock = self._clock
        if clock is None:
            return None
        paused, self._looked = now - self._looked > MARGIN_S, now
        if gang.in_doubt:
            clock.excuse(now)
            self._asked = None
            return None
        silent_s, limit_s = clock.silent_s(now), clock.limit_s(self._first_s(clock))
        if self._asked is None:
            if min(silent_s, now - self._excused) > limit_s - ASK_S:
                self._asked, self._answers, self._again = now, {}, False
                gang.dump(attempt)
            return None
        if paused and not self._again:  # what they have answered is not read yet
            self._asked, self._again = now, True
        if silent_s <= limit_s - TURN_S or (len(self._answers) < world_size and now - self._asked <= ANSWERS_S):
            return None
        storing = any(at.stores for at in self.standings(world_size).values())
        if clock.busy and storing and silent_s <= self._save_s:  # slow storage is no hang yet
            self._asked, self._excused = None, now
            return None
        return self._judge(world_size, silent_s, wall - silent_s)

    def _judge(self, world_size: int, silent_s: float, when: float) -> Failure:
        standings = self.standings(world_size)
        if self.starting:
            return self._judge_start(standings, when)
        rank, why = culprit(standings)
        busy = self._clock.busy if self._clock else ""
        told = {"save": "while saving a checkpoint", "finish": "after the last step", "evaluate": "in an evaluation"}
        what = told.get(busy, "in a step")
        step = min((at.step for at in standings.values()), default=0) + 1
        return Failure(
            kind=FailureKind.HANG,
            time=when,
            node=self._nodes.get(rank, ""),
            rank=rank,
            step=step,
            detail=f"no progress for {silent_s:.1f} s {what} (step {step}): {self._named(rank, why)}",
        )

    def _judge_start(self, standings: Mapping[int, Standing], when: float) -> Failure:
        rank, why = late_at_the_start(standings)
        node = self._nodes.get(rank, "")
        if rank < 0 and (node := self._silent_node(standings)):
            why = f"no rank of node {node} says where it stands, and all others do"
        limit = f"no first step within {self._start_s:.0f} s (recovery.start_timeout_s)"
        detail = f"{limit}: {self._named(rank, why)}"
        return Failure(kind=FailureKind.START_TIMEOUT, time=when, node=node, rank=rank, detail=detail)

    def _silent_node(self, standings: Mapping[int, Standing]) -> str:
        """The one node of several of which nothing is known."""
        said = {self._nodes.get(rank, "") for rank in self._answers}
        silent = {self._nodes.get(rank, "") for rank in standings} - said
        return silent.pop() if said and len(silent) == 1 else ""

    def _named(self, rank: int, why: str) -> str:
        return f"{self._name(rank)} {why}" if rank >= 0 else why

    def _name(self, rank: int) -> str:
        assert self._topology is not None
        at = self._topology.coordinates(rank)
        node = f" on {self._nodes[rank]}" if rank in self._nodes else ""
        return f"rank {rank}{node} (pipe {at.pipe}, data {at.data}, model {at.model})"

    def account(self, hang: Failure, world_size: int) -> dict[str, Any]:
        """Where everybody stood, and who it was, for people."""
        return {"culprit": hang, "ranks": {str(rank): at for rank, at in self.standings(world_size).items()}}

    def standings(self, world_size: int) -> dict[int, Standing]:
        """Where every rank stands; one that has not answered has no stack."""
        steps = self._clock.steps if self._clock else {}
        return {
            rank: Standing(
                step=steps.get(rank, 0),
                state=str(self._answers.get(rank, {}).get("state", "?")),
                stack=str(self._answers.get(rank, {}).get("stack", "")),
                progress=_progress(self._answers.get(rank, {}).get("progress")),
            )
            for rank in range(world_size)
        }


def _progress(told: Any) -> Progress | None:
    """What an agent has read in the memory of a rank; None when that makes no sense."""
    try:
        return Progress.from_json(told)
    except (KeyError, TypeError, ValueError):
        return None

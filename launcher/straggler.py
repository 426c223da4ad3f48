"""Which rank is slower than it should be? Judged from the time of a step that is a rank's own. Pure.

In synchronous training all ranks take equally long for a step: those that are done wait for the slowest. So ranks tell
how long they computed and did not wait (:mod:`jobs.own_time`), and each is compared

- with its peers, who do equal work: ranks of the same pipeline stage, on other nodes where there are such;
- with its own past, as far as the others have kept to theirs: this finds a slow node that holds a whole stage.

On a host with more ranks than cores every rank waits for one now and then, some more than others. Where most ranks do,
what they waited is taken out of their own times; where a few do, something else runs on their node and makes it slow.

Pauses, checkpoints and noise make single steps slow and leave the median of many alone. Named is who was slower in most
steps of a window, by more than noise, and so much that the step suffers from it. Some noise lasts: a disk that writes
back, a neighbour, heat. So it is also learned how far whole windows are off those around them where nobody is slow, and
only who is off by clearly more is named, and not against its own past. Who is always a little slow is no noise, and
hides nobody. What lasts for less than a window is nobody's fault.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from launcher.equal_work import Peers
from launcher.observation import Observation
from launcher.recovery import Failure, FailureKind
from strategies.plan import ParallelPlan
from strategies.topology import Topology

WINDOW = 18  # steps
SLOW = 1.22  # the median of the window is larger than this ...
CLEARLY = 1.1  # ... and most steps of it than this
MOST = 15
AGREED = 1.18  # who is slower than its peers must also be so much slower than it was
NOISE = 2.0  # ... and, where times are noisy, larger than 1 by so many typical deviations of a single step
MATTERS = 0.05  # of the step, else nobody would gain by another node
WARM_UP = 3  # the first steps of an attempt compile, allocate and connect
LEARNED = 32  # steps from which a rank's own pace is learned, and of each block that it is learned from more surely
_BLOCKS = 7  # whose medians are remembered: what spoils one of them spoils nothing
_SETTLED = 3  # blocks from which on the past may speak for a rank
LASTING = 1.8  # more than windows of quiet times are off, but for one in twenty
_QUIET = 6  # windows from which that is known
_AROUND = 9  # windows of a rank, whose median is its level at the one in the middle
ALIKE = 0.05  # devices of one kind differ by so much
MAX_NAMED = 8  # in one attempt: the log must not grow with ranks
CROWDED = 0.05  # of its own time: where the median rank waits so long for a core, waiting is nobody's fault
READING = 0.1  # of its own time: from here on it is told that a slow rank waited for its samples
_FEW = 8  # from so many values on, one of them hardly moves the median


@dataclass(frozen=True, kw_only=True, slots=True)
class Slow:
    """A rank that holds up the others.

    Attributes:
        rank: Global rank.
        ratio: Its own time of a step over what it should be.
        step: The step at which it was found.
    """

    rank: int
    ratio: float
    step: int


class Times(NamedTuple):
    """What a rank tells of a step, in seconds: its own, all of them, without a core, and waiting for its samples."""

    own_s: float
    seconds: float
    queued_s: float
    data_s: float

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Times:
        """As the report of a step has them."""
        queued_s, data_s = float(data.get("queued_s", 0.0)), float(data.get("data_s", 0.0))
        return cls(float(data["own_s"]), float(data["seconds"]), queued_s, data_s)


class _Windows:
    """The newest ratios of ranks, a list for each step; counts those that are clearly above 1, so that most ranks cost
    no sorting.

    Args:
        world_size: Number of ranks.
        ranks: Those that have ratios.

    Attributes:
        levels: What is usual, for each rank.
    """

    def __init__(self, world_size: int, ranks: Iterable[int]) -> None:
        self.levels = [1.0] * world_size
        self._ranks = frozenset(ranks)
        self._steps: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._clear: deque[Sequence[int]] = deque(maxlen=WINDOW)  # who is clearly above 1 in each of them
        self._above = [0] * world_size
        self._medians: list[list[float]] = [[] for _ in range(world_size)]

    def add(self, ratios: Sequence[float]) -> None:
        """A step is complete."""
        for rank in self._clear[0] if len(self._clear) == WINDOW else ():
            self._above[rank] -= 1
        clear = [rank for rank, ratio in enumerate(ratios) if ratio > CLEARLY]
        for rank in clear:
            self._above[rank] += 1
        self._steps.append(ratios)
        self._clear.append(clear)

    @property
    def suspects(self) -> list[int]:
        """Ranks that are clearly above 1 in most steps."""
        return [rank for rank, above in enumerate(self._above) if above >= MOST]

    def has_recovered(self, rank: int) -> bool:
        """It is clearly above 1 in few steps."""
        return self._above[rank] * 2 < WINDOW

    def median(self, rank: int) -> float:
        """Of the ratios of one rank."""
        return statistics.median([ratios[rank] for ratios in self._steps])

    def verdict(self, rank: int, slow: float) -> float:
        """The median ratio where it is larger than ``slow`` and most are clearly above 1, else 0."""
        median = self.median(rank) if self._above[rank] >= MOST else 0.0
        return median if median > slow else 0.0

    def off_their_levels(self, named: Collection[int]) -> list[float]:
        """How far full and quiet windows are off those around them, as far as enough of these are known."""
        if len(self._steps) < WINDOW:
            return []
        known, found = self._ranks.difference(named, (rank for rank in self.suspects if self.verdict(rank, SLOW))), []
        for rank, ratios in enumerate(zip(*self._steps, strict=True)):
            if rank not in known:
                continue
            medians = self._medians[rank]
            medians.append(statistics.median(ratios))
            del medians[:-_AROUND]
            if len(medians) >= 3:
                usual = statistics.median(medians)
                self.levels[rank] = min(max(1.0, usual - ALIKE), usual + ALIKE)
                found.append(medians[len(medians) // 2] - self.levels[rank])
        return found


@dataclass(slots=True)
class _Noise:
    """How far ratios are off their levels in a typical step. Leaves out the newest: no straggler may pass for noise."""

    deviation: float = 0.0
    older: deque[float] = field(default_factory=lambda: deque(maxlen=20 * WINDOW))
    newest: list[float] = field(default_factory=list)

    def add(self, ratios: Sequence[float], levels: Sequence[float]) -> None:
        self.newest.append(statistics.median(abs(one - level) for one, level in zip(ratios, levels, strict=True)))
        if len(self.newest) == 3 * WINDOW:
            self.older.extend(self.newest[:WINDOW])
            del self.newest[:WINDOW]
            self.deviation = statistics.median(self.older)


@dataclass(slots=True)
class _Lasting:
    """How far the worst window is off its rank's level where nobody is slow, and so the ratio that noise may reach."""

    limit: float = 0.0
    worst: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def add(self, worst: float) -> None:
        """The largest of the windows of all ranks that are not known to be slow."""
        self.worst.append(worst)
        if len(self.worst) >= _QUIET:
            self.limit = 1 + LASTING * sorted(self.worst)[math.ceil(0.95 * len(self.worst)) - 1]


@dataclass(slots=True)
class _Usual:
    """What a step takes on each rank, learned block by block while nobody is known to be slow."""

    seconds: list[float] = field(default_factory=list)
    block: list[Sequence[float]] = field(default_factory=list)
    medians: deque[list[float]] = field(default_factory=lambda: deque(maxlen=_BLOCKS))

    def add(self, own_s: Sequence[float]) -> None:
        """A step is complete."""
        if len(self.medians) == _BLOCKS:
            return
        self.block.append(own_s)
        if len(self.block) == LEARNED:
            self.medians.append([statistics.median(times) for times in zip(*self.block, strict=True)])
            self.block = []
            self.seconds = [statistics.median(times) for times in zip(*self.medians, strict=True)]

    @property
    def settled(self) -> bool:
        """One block more or less changes little."""
        return len(self.medians) >= _SETTLED


class Pace:
    """The own times of all ranks of one attempt, step by step.

    Args:
        peers: For each rank, the other ranks that do equal work (:class:`launcher.equal_work.Peers`).
    """

    def __init__(self, peers: Sequence[Sequence[int]]) -> None:
        self._peers = Peers(peers)
        self._against_peers = _Windows(len(peers), self._peers.compared)
        self._against_past = _Windows(len(peers), range(len(peers)))
        self._usual = _Usual()
        self._noise, self._lasting = _Noise(), _Lasting()
        self._seen = 0
        self._named: set[int] = set()

    def note(self, step: int, own_s: Sequence[float], step_s: float) -> list[Slow]:
        """A step is complete.

        Args:
            step: Its number.
            own_s: Own time of every rank.
            step_s: How long the step took.

        Returns:
            Ranks that are found to be slow now, each once until it has recovered.
        """
        self._seen += 1
        if self._seen <= WARM_UP or min(own_s) <= 0:
            return []
        if compared := self._peers.compared:
            ratios, levels = self._peers.ratios(own_s), self._against_peers.levels
            self._against_peers.add(ratios)
            self._noise.add([ratios[rank] for rank in compared], [levels[rank] for rank in compared])
        self._compare_with_the_past(own_s)
        return self._judge(step, own_s, step_s)

    def _compare_with_the_past(self, own_s: Sequence[float]) -> None:
        usual = self._usual.seconds
        if not self._named:
            self._usual.add(own_s)
        if not usual:
            return
        drift = [own / before for own, before in zip(own_s, usual, strict=True)]
        common = statistics.median(drift)
        ratios = [one / common for one in drift]
        if len(drift) <= _FEW:
            self._against_past.add([one / _median_without(drift, rank) for rank, one in enumerate(drift)])
        else:
            self._against_past.add(ratios)
        if not self._peers.compared:
            self._noise.add(ratios, self._against_past.levels)

    def _judge(self, step: int, own_s: Sequence[float], step_s: float) -> list[Slow]:
        both = self._against_peers, self._against_past
        if self._seen % WINDOW == 0 and (off := [one for each in both for one in each.off_their_levels(self._named)]):
            self._lasting.add(max(off))
        found, limit = [], max(SLOW, 1 + NOISE * self._noise.deviation, self._lasting.limit)
        for rank in sorted(self._named.union(*(each.suspects for each in both))):
            ratio = max(each.verdict(rank, limit) for each in both)
            if ratio and self._usual.settled and self._against_past.median(rank) < AGREED:
                ratio = 0.0
            if not ratio:
                if all(each.has_recovered(rank) for each in both):
                    self._named.discard(rank)
            elif rank not in self._named and own_s[rank] * (1 - 1 / ratio) > MATTERS * step_s:
                self._named.add(rank)
                found.append(Slow(rank=rank, ratio=ratio, step=step))
        return found


def on_a_core(own_s: Sequence[float], queued_s: Sequence[float]) -> list[float]:
    """Own times without the waiting for a core, where that is common to all.

    Args:
        own_s: Own time of every rank.
        queued_s: For how much of it the rank was ready to run and had no core.
    """
    if statistics.median(queued_s) <= CROWDED * statistics.median(own_s):
        return list(own_s)
    return [max(0.0, own - queued) for own, queued in zip(own_s, queued_s, strict=True)]


def _median_without(values: Sequence[float], index: int) -> float:
    others = [*values[:index], *values[index + 1 :]]
    return statistics.median(others) if others else values[index]


def peers_of(plan: ParallelPlan, nodes: Mapping[int, str]) -> list[tuple[int, ...]]:
    """For each rank those of its pipeline stage on other nodes, or of its own node if the stage has no other.

    Args:
        plan: The plan.
        nodes: Rank -> node.
    """
    topology = Topology(plan)
    stages: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank in range(plan.world_size):
        stages[topology.coordinates(rank).pipe][nodes.get(rank, "")].append(rank)
    found: list[tuple[int, ...]] = [()] * plan.world_size
    for by_node in stages.values():
        whole, at = tuple(itertools.chain.from_iterable(by_node.values())), 0
        for ranks in by_node.values():
            elsewhere, at = whole[:at] + whole[at + len(ranks) :], at + len(ranks)
            for rank in ranks:
                found[rank] = elsewhere or tuple(other for other in ranks if other != rank)
    return found


class StragglerWatch:
    """Watches one attempt after the other, through the step reports of its ranks."""

    def __init__(self) -> None:
        self._plan: ParallelPlan | None = None
        self._pace: Pace | None = None
        self._nodes: dict[int, str] = {}
        self._steps: dict[int, dict[int, Times]] = {}
        self._found: list[tuple[Failure, float]] = []
        self._told = 0

    def begin(self, plan: ParallelPlan) -> None:
        """The first step of an attempt begins."""
        self.end()
        self._plan = plan

    def end(self) -> None:
        """The attempt ends."""
        self._plan, self._pace, self._told = None, None, 0
        self._nodes, self._steps, self._found = {}, {}, []

    def note(self, seen: Observation) -> None:
        """Take in what an agent says."""
        data = seen.data
        if self._plan is None or seen.kind != "report" or data.get("kind") != "step" or "own_s" not in data:
            return
        rank, step = int(data["rank"]), int(data["step"])
        self._nodes[rank] = seen.node
        reported = self._steps.setdefault(step, {})
        reported[rank] = Times.of(data)
        if len(reported) == self._plan.world_size:
            self._steps = {later: some for later, some in self._steps.items() if later > step}
            self._complete(self._plan, step, reported, seen.time)

    def _complete(self, plan: ParallelPlan, step: int, reported: Mapping[int, Times], when: float) -> None:
        if self._pace is None:
            self._pace = Pace(peers_of(plan, self._nodes))
        told = [reported[rank] for rank in range(plan.world_size)]
        own_s = on_a_core([one.own_s for one in told], [one.queued_s for one in told])
        step_s = max(one.seconds for one in told)
        for slow in self._pace.note(step, own_s, step_s):
            if self._told < MAX_NAMED:
                self._told += 1
                found = self._failure(plan, slow, own_s[slow.rank], told[slow.rank].data_s, when)
                self._found.append((found, slow.ratio))

    def _failure(self, plan: ParallelPlan, slow: Slow, own_s: float, data_s: float, when: float) -> Failure:
        at, node = Topology(plan).coordinates(slow.rank), self._nodes[slow.rank]
        name = f"rank {slow.rank} on {node} (pipe {at.pipe}, data {at.data}, model {at.model})"
        detail = f"{name} takes {slow.ratio:.2f}x as long as it should for its part of a step, {own_s:.3g} s"
        if data_s > READING * own_s:
            detail += f", of which it waited {data_s:.3g} s for its samples"
        return Failure(kind=FailureKind.STRAGGLER, time=when, node=node, rank=slow.rank, step=slow.step, detail=detail)

    def take(self) -> list[tuple[Failure, float]]:
        """What was found since the last time, with the ratio of own times."""
        taken, self._found = self._found, []
        return taken

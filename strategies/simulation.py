"""The failure process of :mod:`strategies.failures`, played event by event: the check on the closed form.

What is played, and nothing of it is taken from the formulas:

- Failures come at the gang's rate in every second: also during a recovery, which then starts over, and while the gang
  waits for a node, where they break more of them.
- Steps are whole. Both tiers save after fixed numbers of steps, with one stall for the copy of both, and commit when
  the replica or the write is through; a failure before that falls back to the save before.
- A failure is correlated by chance: then only the disk counts, and what memory held is gone.
- A failure breaks a node, or a few at once, which stand by again after the repair time. With more nodes broken than
  there are spares, the gang waits for one of them, or goes on with fewer replicas and grows back with a save and a
  restart.

A run is a function of its arguments and the seed. Its cost grows with the number of failures, not of steps.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, field

from strategies.failures import DAY_S, Process, Standby, shortage
from strategies.plan import ParallelPlan
from strategies.reliability import plan_process
from strategies.workload import Workload

_ENDLESS = 10_000_000  # failures after which a run counts as hopeless


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """What a number of simulated runs came to.

    Attributes:
        goodput: Seconds of work that counted over seconds of wall clock, over all runs.
        failures: Failures per run, on average.
        days_50: Half of the runs ended within so many days.
        days_90: Nine of ten did.
        lost: Share of the wall clock by kind, as in :attr:`strategies.reliability.Outlook.lost`.
    """

    goodput: float
    failures: float
    days_50: float
    days_90: float
    lost: dict[str, float]


def simulate(
    work: Workload, plan: ParallelPlan, step_s: float, *, seed: int, runs: int = 20, steps: int | None = None
) -> Simulated:
    """Play a number of runs of a plan.

    Args:
        work: Model, batch, cluster and tokens.
        plan: A legal plan.
        step_s: Seconds of one step, without failures.
        seed: Of the random numbers.
        runs: Number of runs.
        steps: Steps of one run; None means as many as the tokens of ``work`` take.

    Raises:
        ConfigError: The cluster has no hardware figures, or no bandwidth to the storage or the host.
    """
    what, standby = plan_process(work, plan, step_s, saving=work.saving)
    count = math.ceil(work.step_count(plan)) if steps is None else steps
    return simulate_process(what, standby, step_s, max(1, count), seed=seed, runs=runs)


def simulate_process(
    what: Process, standby: Standby | None, step_s: float, steps: int, *, seed: int, runs: int = 20
) -> Simulated:
    """Play a number of runs of ``steps`` steps of a process, with its intervals rounded to whole steps.

    Args:
        what: The process.
        standby: What happens when a node is gone; None: there is always a spare.
        step_s: Seconds of one step.
        steps: Steps of one run.
        seed: Of the random numbers.
        runs: Number of runs.
    """
    played = []
    for index in range(runs):
        gang = _Gang(what, standby, step_s, steps, random.Random(f"{seed}/{index}"))
        gang.play()
        played.append(gang)
    walls = sorted(gang.now_s for gang in played)
    total_s = sum(walls)
    kinds = played[0].spent_s
    return Simulated(
        goodput=runs * steps * step_s / total_s,
        failures=sum(gang.failures for gang in played) / runs,
        days_50=_quantile(walls, 0.5) / DAY_S,
        days_90=_quantile(walls, 0.9) / DAY_S,
        lost={kind: sum(gang.spent_s[kind] for gang in played) / total_s for kind in kinds},
    )


def _quantile(ordered: list[float], chance: float) -> float:
    """Linear between the order statistics."""
    place = chance * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(slots=True)
class _Tier:
    """Saves of one kind: every ``every`` steps (0: never), each through ``late_s`` after its copy."""

    every: int
    late_s: float
    step: int = 0  # newest that is committed

    def saves(self, first: int, last: int) -> int:
        """Number of saves after step ``first`` and up to step ``last``."""
        return last // self.every - first // self.every if self.every else 0


@dataclass(slots=True)
class _Gang:
    """One run."""

    what: Process
    standby: Standby | None
    step_s: float
    steps: int
    rng: random.Random
    now_s: float = 0.0
    step: int = 0
    failures: int = 0
    next_failure_s: float = math.inf  # from now
    broken: list[float] = field(default_factory=list)  # a heap: when each node comes back
    spent_s: dict[str, float] = field(default_factory=dict)
    shrinks: bool = False
    memory: _Tier = field(init=False)
    disk: _Tier = field(init=False)

    def __post_init__(self) -> None:
        whole = self.what.rounded(self.step_s)
        every = 0 if math.isinf(whole.memory_s) else round(whole.memory_s / self.step_s)
        self.memory = _Tier(every, self.what.replica_s)
        self.disk = _Tier(round(whole.disk_s / self.step_s), self.what.write_s)
        self.shrinks = self.standby is not None and shortage(self.what, self.standby).shrinks
        self.spent_s = dict.fromkeys(("checkpoint", "replay", "detect", "restart", "wait"), 0.0)

    def play(self) -> None:
        """To the last step."""
        self._draw()
        while self.step < self.steps and self.failures < _ENDLESS:
            if self._run():
                self._recover()
        self.spent_s["replay"] = self.now_s - self.steps * self.step_s - sum(self.spent_s.values())

    def _draw(self) -> None:
        self.next_failure_s = self.rng.expovariate(self.what.rate) if self.what.rate else math.inf

    def _missing(self) -> int:
        """Nodes that the gang lacks now."""
        while self.broken and self.broken[0] <= self.now_s:
            heapq.heappop(self.broken)
        return max(0, len(self.broken) - self.standby.spares) if self.standby else 0

    def _slowdown(self) -> float:
        """Share of the throughput that is gone with the units that were given up."""
        if not self.standby or not self.shrinks:
            return 0.0
        return min(1.0, -(-self._missing() // self.standby.unit_nodes) * self.standby.unit_loss)

    def _growth_s(self) -> float:
        """Seconds until enough nodes are back for one more unit; infinite when the gang is whole."""
        missing = self._missing() if self.shrinks else 0
        if not self.standby or not missing:
            return math.inf
        enough = (missing - 1) % self.standby.unit_nodes + 1
        return heapq.nsmallest(enough, self.broken)[-1] - self.now_s

    def _run(self) -> bool:
        """Run until the last step, a failure (True), or a unit more."""
        slow_s = self.step_s / (1 - self._slowdown())
        first, growth_s = self.step, self._growth_s()
        last = self.steps if math.isinf(growth_s) else min(self.steps, self._reached(slow_s, growth_s) + 1)
        used_s = self._lasts(last, slow_s)
        failed = used_s > self.next_failure_s
        if failed:
            last, used_s = self._reached(slow_s, self.next_failure_s), self.next_failure_s
        self._commit(last, slow_s, used_s)
        self.spent_s["wait"] += (last - first) * (slow_s - self.step_s)
        self.spent_s["checkpoint"] += self._lasts(last, slow_s) - (last - first) * slow_s
        self.step = last
        self.now_s += used_s
        self.next_failure_s -= used_s
        return failed or (last < self.steps and self._grow())

    def _lasts(self, last: int, step_s: float) -> float:
        """Seconds from now until step ``last`` is done, with the stalls of all saves before it."""
        if last == self.step:
            return 0.0
        return (last - self.step) * step_s + self._often.saves(self.step, last - 1) * self.what.copy_s

    @property
    def _often(self) -> _Tier:
        """The tier that the copies are made for; the other takes some of them."""
        return self.memory if self.memory.every else self.disk

    def _reached(self, step_s: float, limit_s: float) -> int:
        """The last step that is done in ``limit_s`` seconds from now."""
        stalls = self.what.copy_s / self._often.every
        last = min(self.steps, self.step + int(min(limit_s / (step_s + stalls), self.steps)))
        while last < self.steps and self._lasts(last + 1, step_s) <= limit_s:
            last += 1
        while last > self.step and self._lasts(last, step_s) > limit_s:
            last -= 1
        return last

    def _commit(self, last: int, step_s: float, limit_s: float) -> None:
        """Note the newest save of each tier that is through after ``limit_s`` seconds."""
        for tier in (self.memory, self.disk):
            at = last - last % tier.every if tier.every else 0
            while at > self.step and self._lasts(at, step_s) + self.what.copy_s + tier.late_s > limit_s:
                at -= tier.every
            tier.step = max(tier.step, at if at > self.step else 0)

    def _grow(self) -> bool:
        """Save, and start again with the nodes that are back; True if a failure comes in between."""
        self._often.step = self.step
        used_s = min(self.what.reshape_s, self.next_failure_s)
        failed = used_s == self.next_failure_s
        self.spent_s["wait"] += used_s
        self.now_s += used_s
        self.next_failure_s -= used_s
        return failed

    def _recover(self) -> None:
        """From a failure until the ranks train again."""
        from_disk = self._fail()
        needed_s = self.what.recover_disk_s if from_disk else self.what.recover_memory_s
        while self.next_failure_s < needed_s:
            self._pass(self.next_failure_s)
            from_disk = self._fail() or from_disk
            needed_s = self.what.recover_disk_s if from_disk else self.what.recover_memory_s
        self._pass(needed_s)
        self.next_failure_s -= needed_s
        if from_disk:
            self.memory.step = self.disk.step
        self.step = max(self.memory.step, self.disk.step)

    def _pass(self, seconds: float) -> None:
        """Seconds of a recovery."""
        detect_s = min(seconds, self.what.detect_s)
        self.spent_s["detect"] += detect_s
        self.spent_s["restart"] += seconds - detect_s
        self.now_s += seconds

    def _fail(self) -> bool:
        """A failure now: nodes are broken; waits while the gang cannot go on. True if memory is lost by then."""
        lost = self._break()
        while (self._slowdown() >= 1) if self.shrinks else self._missing():
            waited_s = min(self.broken[0] - self.now_s, self.next_failure_s)
            failed = waited_s == self.next_failure_s
            self.spent_s["wait"] += waited_s
            self.now_s += waited_s
            self.next_failure_s -= waited_s
            if failed:
                lost = self._break() or lost
        return lost

    def _break(self) -> bool:
        """One failure; True if it takes what memory held."""
        self.failures += 1
        self._draw()
        if self.standby:
            sizes, shares = zip(*self.standby.breaks, strict=True)
            for _ in range(sizes[0] if len(sizes) == 1 else self.rng.choices(sizes, shares)[0]):
                heapq.heappush(self.broken, self.now_s + self.what.repair_s)
        return self.rng.random() < self.what.correlated

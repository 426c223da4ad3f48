"""The best plans of the full space, proven: best-first branch and bound.

A heap holds subtrees of the space, the one with the smallest bound first. What comes off the heap is cut into smaller
subtrees with tighter bounds (:mod:`strategies.bounds`), down to single plans, which are predicted exactly. The search
ends when no subtree can beat the K-th best plan that fits. Every plan of the space is accounted for: predicted
(``evaluated``), in a subtree that a bound excluded (``pruned``), or refused by a rule or its own memory (``rejected``).
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import NamedTuple

from strategies.bounds import PLAIN, Bounds, Pace
from strategies.estimate import CostEstimate, Estimator, Objective
from strategies.plan import ParallelPlan, Recompute
from strategies.space import Inner, Pipe, Replicas, Shape, Space, State
from strategies.workload import Workload

POINTS = 2000
"""Predicted plans that are kept for a picture."""


class Point(NamedTuple):
    """A predicted plan, for a picture."""

    step_s: float
    peak_bytes: float
    fits: bool
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What a search found, and what became of every plan of the space.

    Attributes:
        objective: What plans are ranked by.
        ranked: The best plans that fit, the best first.
        best_runnable: The best plan that phalanx can run; None if there is none, or none was asked for.
        closest: The plan that needs least memory, when none fits; else None.
        space: Number of plans.
        evaluated: Plans that were predicted one by one.
        pruned: Plans in subtrees that a bound excluded: ``slower`` than the K-th best, ``model_state`` or
            ``activations`` beyond the memory.
        rejected: Plans that a rule refuses, by its name, or that do not fit (``memory``).
        points: Predicted plans, at most :data:`POINTS`.
    """

    objective: Objective
    ranked: tuple[CostEstimate, ...]
    best_runnable: CostEstimate | None = None
    closest: CostEstimate | None = None
    space: int
    evaluated: int
    pruned: Mapping[str, int]
    rejected: Mapping[str, int]
    points: tuple[Point, ...] = ()


class Found(NamedTuple):
    """A predicted plan that fits; tuples compare as plans are ranked.

    Ties go to plans that are simpler to run: fewer ranks, less cut, less recomputed.
    """

    score: float
    tie: tuple[object, ...]
    plan: ParallelPlan


def tie_break(plan: ParallelPlan, second: float = 0.0) -> tuple[object, ...]:
    """What decides between plans of the same score; never equal for two plans."""
    return (
        second,
        plan.world_size,
        (plan.tp, plan.pp, plan.ep, plan.sp, plan.cp),
        ("none", "optimizer", "optimizer+params").index(plan.offload),
        ("none", "selective", "full").index(plan.recompute),
        (plan.zero_stage, plan.grad_dtype != "fp32", plan.sequence_parallel),
        ("1f1b", "interleaved", "dualpipev").index(plan.schedule),
        (plan.vpp, plan.micro_batch, plan.grad_accum, plan.stages),
    )


def search(
    work: Workload,
    *,
    objective: Objective = "goodput",
    top: int = 5,
    space: Space | None = None,
    runnable_only: bool = False,
    points: bool = False,
    estimator: Estimator | None = None,
) -> SearchResult:
    """Find the best plans.

    Args:
        work: The workload.
        objective: What they shall be best at.
        top: How many to rank.
        space: What to search; None is everything.
        runnable_only: Only plans that phalanx can run.
        points: Keep predicted plans for a picture.
        estimator: Predicts; None makes one.

    Raises:
        ConfigError: The cluster has no hardware figures.
    """
    estimator = estimator or Estimator(work)
    space = space or Space(work, runnable_only=runnable_only)
    run = Search(estimator, space, objective, top)
    run.go()
    runnable = None
    ranked = tuple(estimator.estimate(one.plan) for one in run.found)
    if ranked:
        runnable = next((one for one in ranked if one.runnable), None)
        if runnable is None and not space.runnable_only:
            lone = Search(estimator, Space(work, space.fixed, runnable_only=True), objective, 1)
            lone.go()
            runnable = next((estimator.estimate(one.plan) for one in lone.found), None)
    return SearchResult(
        objective=objective,
        ranked=ranked,
        best_runnable=runnable,
        closest=None if ranked else closest(estimator, space),
        space=run.size,
        evaluated=run.evaluated,
        pruned={name: number for name, number in run.pruned.items() if number},
        rejected={name: number for name, number in run.rejected.items() if number},
        points=run.points() if points else (),
    )


def closest(estimator: Estimator, space: Space) -> CostEstimate | None:
    """The plan that needs least memory, whether it fits or not."""
    run = Search(estimator, space, "memory", 1, budget=math.inf)
    run.go()
    return estimator.estimate(run.found[0].plan) if run.found else None


class Search:
    """One run of branch and bound.

    Args:
        estimator: Predicts.
        space: What is searched.
        objective: What a plan shall be best at.
        top: How many plans to find.
        budget: Bytes that a rank may use; None takes the device's.
    """

    def __init__(
        self, estimator: Estimator, space: Space, objective: Objective, top: int, budget: float | None = None
    ) -> None:
        self.estimator, self.space, self.objective, self.top = estimator, space, objective, top
        self.bounds = Bounds(estimator, space, objective)
        if budget is not None:
            self.bounds.budget = budget
        self.found: list[Found] = []
        self.size, self.evaluated = 0, 0
        self.pruned, self.rejected = Counter[str](), Counter[str]()
        self._limit = math.inf
        self._heap: list[tuple[float, int, Callable[[], None], Callable[[], int]]] = []
        self._order = count()
        self._seen: list[tuple[float, ParallelPlan]] = []

    def go(self) -> None:
        """Search until nothing that is left can be better."""
        shapes = list(self.space.shapes())
        self.size, refused = self.space.census(shapes)
        self.rejected.update(refused)
        for shape in shapes:
            most = self.space.room(shape) // shape.unit * shape.unit
            if most:
                self._push_range(shape, most, 0.0)
        heap = self._heap
        while heap and heap[0][0] <= self._limit:
            heapq.heappop(heap)[2]()
        for _, _, _, number in heap:
            self.pruned["slower"] += number()
        heap.clear()

    def _push(self, bound: float, visit: Callable[[], None], number: Callable[[], int]) -> None:
        """Keep a subtree for later, or drop it at once."""
        if bound > self._limit:
            self.pruned["slower"] += number()
        else:
            heapq.heappush(self._heap, (bound, next(self._order), visit, number))

    # ---- subtrees, from the largest to the smallest -----------------------------------------------------------------

    def _push_range(self, shape: Shape, most: int, floor: float) -> None:
        """A shape with up to ``most`` replicas."""
        bound = self.bounds.range(shape, most, floor)
        self._push(bound, partial(self._visit_range, shape, most), partial(self.space.count, shape, 1, most))

    def _visit_range(self, shape: Shape, most: int) -> None:
        """Cut off the upper half of the replicas, and look at it by kinds of recomputation."""
        if not self.bounds.quiet(shape, most):
            self.pruned["model_state"] += self.space.count(shape, 1, most)
            return
        fewest, rest = halves(shape, most)
        floor = 0.0
        if self.objective == "memory":  # recomputation may need more memory: there is no order in it
            modes = [self.bounds.mode(shape, recompute, fewest, most) for recompute in self.space.recompute]
            floor = min(modes)
            for index, bound in enumerate(modes):
                self._push_mode(shape, index, index + 1, fewest, most, bound)
        else:
            everything = len(self.space.recompute)
            self._push_mode(shape, 0, everything, fewest, most, self._mode(shape, 0, fewest, most))
        if rest:
            self._push_range(shape, rest, floor)

    def _mode(self, shape: Shape, index: int, fewest: int, most: int) -> float:
        return self.bounds.mode(shape, self.space.recompute[index], fewest, most)

    def _push_mode(self, shape: Shape, index: int, end: int, fewest: int, most: int, bound: float) -> None:
        """A range of replicas with the kinds of recomputation from ``index`` to ``end``: it only adds time."""

        def number() -> int:
            return self.space.count(shape, fewest, most) // len(self.space.recompute) * (end - index)

        def visit() -> None:
            if index + 1 < end:
                self._push_mode(shape, index + 1, end, fewest, most, self._mode(shape, index + 1, fewest, most))
            self._visit_mode(shape, self.space.recompute[index], fewest, most)

        self._push(bound, visit, number)

    def _visit_mode(self, shape: Shape, recompute: Recompute, fewest: int, most: int) -> None:
        """Drop the micro-batches that the memory cannot hold."""
        rate = self.bounds.rate(shape, recompute, fewest, most)
        splits = self.space.sequence_parallel(shape)
        each = self.space.count(shape, fewest, most) // (len(self.space.recompute) * len(splits))
        for split in splits:
            inners = [Inner(size, recompute, split) for size in self.space.micro_batch]
            low, high, reach = 0, len(inners), 1  # the first that exceeds lies between, most often at the start
            while low < high:
                middle = min(low + reach, high) - 1 if high == len(inners) else (low + high) // 2
                if self.bounds.size_exceeds(shape, inners[middle], most):
                    high = middle
                else:
                    low, reach = middle + 1, 2 * reach
            kept = sum(self._push_size(shape, inner, fewest, most, rate) for inner in inners[:low])
            self.pruned["activations"] += each - kept

    def _push_size(self, shape: Shape, inner: Inner, fewest: int, most: int, rate: Pace) -> int:
        """A range of replicas with one kind of micro-batch; how many plans that is."""
        replicas = self.space.replicas(shape, inner, PLAIN, fewest, most)
        number = self.space.count_inner(shape, inner, fewest, most) if replicas else 0
        if number:

            def bound(exact: bool) -> float:
                return self.bounds.size(shape, inner, replicas[0].dp, replicas[-1], rate, exact=exact)

            def again() -> None:
                self._push(bound(True), partial(self._visit_size, shape, inner, replicas), partial(int, number))

            self._push(bound(False), again, partial(int, number))
        return number

    def _visit_size(self, shape: Shape, inner: Inner, plain: tuple[Replicas, ...]) -> None:
        """Look at the schedules."""
        if not self.bounds.quiet(shape, plain[-1].dp):
            self.pruned["model_state"] += self.space.count_inner(shape, inner, plain[0].dp, plain[-1].dp)
            return
        pace = self.bounds.any_state(shape, inner, plain[0].dp, plain[-1])
        for pipe in self.space.pipes(shape):
            replicas = self.space.replicas(shape, inner, pipe, plain[0].dp, plain[-1].dp)
            if replicas:
                bound = self.bounds.pipe(shape, inner, pipe, replicas, pace)
                visit = partial(self._visit_pipe, shape, inner, pipe, replicas)
                self._push(bound, visit, partial(int, len(replicas) * len(self.space.states(shape))))

    def _visit_pipe(self, shape: Shape, inner: Inner, pipe: Pipe, replicas: tuple[Replicas, ...]) -> None:
        """Look at the states, and at each number of replicas."""
        states = self.space.states(shape)
        exceeds = self.bounds.all_exceed(shape, inner, pipe, replicas[-1])
        if exceeds:
            self.pruned[exceeds] += len(replicas) * len(states)
            return
        for state in states:
            pace = self.bounds.pace(shape, inner, replicas[0].dp, replicas[-1], state)
            best = self.space.plan(shape, state, inner, pipe, replicas[-1])
            if self.bounds.state(shape, pipe, replicas, pace, best) > self._limit:
                self.pruned["slower"] += len(replicas)
            elif exceeds := self.bounds.exceeds(best):
                self.pruned[exceeds] += len(replicas)
            else:
                for one in reversed(replicas):
                    self._leaf(shape, state, inner, pipe, one, pace)

    def _leaf(self, shape: Shape, state: State, inner: Inner, pipe: Pipe, replicas: Replicas, pace: Pace) -> None:
        """Predict one plan, unless a bound excludes it."""
        if self.bounds.leaf(shape, pipe, replicas, pace) > self._limit:
            self.pruned["slower"] += 1
            return
        plan = self.space.plan(shape, state, inner, pipe, replicas)
        step_s = sum(self.estimator.timing.step(plan))
        self._seen.append((step_s, plan))
        if self.objective == "memory":
            score, second = self.estimator.memory.peak(plan), step_s
        else:
            score, second = self.estimator.score(plan, step_s, self.objective), 0.0
        if score <= self._limit and self.estimator.memory.peak(plan) > self.bounds.budget:
            self.rejected["memory"] += 1
            return
        self.evaluated += 1
        if score <= self._limit:
            bisect.insort(self.found, Found(score, tie_break(plan, second), plan))
            del self.found[self.top :]
            if len(self.found) == self.top:
                self._limit = self.found[-1].score

    def points(self) -> tuple[Point, ...]:
        """Predicted plans, evenly drawn from all."""
        memory, budget = self.estimator.memory, self.bounds.budget
        chosen = self._seen[:: -(-len(self._seen) // POINTS) or 1]
        peaks = [memory.peak(plan) for _, plan in chosen]
        return tuple(
            Point(step_s, peak, peak <= budget, plan.describe())
            for (step_s, plan), peak in zip(chosen, peaks, strict=True)
        )


def halves(shape: Shape, most: int) -> tuple[int, int]:
    """The fewest replicas of the upper half of a range, and the most of the lower half (0: there is none)."""
    rest = most // (2 * shape.unit) * shape.unit
    return rest + shape.unit, rest

"""Lower bounds for whole subtrees of the space: what the search prunes with.

A bound has to be provable, or the search is a guess. Everything here is the real prediction of a *relaxed* plan, one
that no plan of the subtree can beat, because predictions are monotone:

- **Time, of a range of replicas.** Work, bubble and messages of a step grow with the number of micro-batches; the
  reduction of gradients grows with the replicas (a ring of more ranks moves more, over links that are no faster). The
  corner that has the *fewest* micro-batches and the *fewest* replicas of the range is no plan, and no plan of the range
  is faster. Optimizer and offload are left out: they fall with replicas. States that may fit are compared by what they
  send (:meth:`Bounds.quiet`).
- **Time, of any micro-batch.** Seconds per sequence fall as micro-batches grow (fuller waves of tiles, fewer launches
  and latencies per byte), so a micro-batch of :data:`LARGE` sequences, scaled down, bounds all of them; :data:`MARGIN`
  covers tiles that do not divide it. Which stage is slowest depends on the micro-batch, and what it sends on its
  weights: the lightest of those that may be slowest counts (:mod:`strategies.lightest`). Cutting sequences over more
  ranks only adds communication.
- **Memory.** Model state falls with replicas, activations grow with the micro-batches in flight and their size, and of
  one ZeRO stage, what offloads most with the narrowest gradients holds least. ZeRO pads its buffers by a few elements
  per replica: :func:`padding` is taken off. Of the schedules, no interleaved one holds less than 1F1B, but DualPipeV
  may: it has the output layer on the first stage (:meth:`Bounds.leanest`).
- **Failures.** Goodput falls with the nodes and with the length of a step, so the fewest nodes and an infinitely short
  step bound a range (:func:`strategies.reliability.goodput_bound`).

Tests compare every bound with all plans below it on random small spaces.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast, get_args

from strategies.estimate import Estimator, Objective
from strategies.lightest import Lightest
from strategies.memory import DTYPE_BYTES
from strategies.plan import Offload, ParallelPlan, Recompute
from strategies.reliability import checkpoint_bytes, goodput_bound
from strategies.space import Inner, Pipe, Replicas, Shape, Space, State
from strategies.timing import StepTime, Timing

LARGE = 4096
"""Sequences of a micro-batch whose seconds per sequence no smaller one beats; more where the space has larger ones."""

MARGIN = 1.0 - 2e-3
"""Tiles that do not divide the large micro-batch waste less than this share of it."""

ROUNDING = 1.0 - 1e-9
"""The same sum in another order."""

_WORK = StepTime._fields.index("bubble")
PLAIN = Pipe("1f1b", 1)
DUAL = Pipe("dualpipev", 1)


class Pace(NamedTuple):
    """Seconds of a corner.

    Attributes:
        slow_s: Of one micro-batch on the slowest stage.
        whole_s: Of one micro-batch on all stages, one after the other.
        fixed_s: Of the step beside both.
    """

    slow_s: float
    whole_s: float
    fixed_s: float

    def step_s(self, micro_batches: float, divisor: float) -> float:
        """Seconds of a step whose schedule divides the bubble by ``divisor``."""
        return micro_batches * self.slow_s + (self.whole_s - self.slow_s) / divisor + self.fixed_s


class Bounds:
    """Bounds of one search.

    Args:
        estimator: Predicts.
        space: What is searched.
        objective: What a plan shall be best at.
    """

    def __init__(self, estimator: Estimator, space: Space, objective: Objective) -> None:
        self.estimator, self.space, self.objective = estimator, space, objective
        self.budget = estimator.memory.budget()
        self._host_s = estimator.timing.calibration.host_step_s
        self._lightest = Lightest(space.work, estimator.timing.calibration)
        self._large = max(LARGE, *space.micro_batch)
        self._slots = space.work.cluster.slots_per_node
        self._checkpoint = checkpoint_bytes(space.work.model)
        self._goodput: dict[int, float] = {}
        self._rates: dict[tuple[object, ...], Pace] = {}
        self._divisors: dict[tuple[int, Pipe], float] = {}
        self._best_divisors: dict[tuple[int, int], float] = {}
        self._lean: dict[tuple[bool, ...], tuple[State, ...]] = {}
        self._quiet: dict[tuple[object, ...], tuple[State, ...]] = {}
        self._whole: dict[tuple[int, int], float] = {}
        self._passes: dict[tuple[object, ...], float] = {}
        self._quicker: dict[tuple[int, int, Recompute], tuple[bool, ...]] = {}

    # ---- scores -----------------------------------------------------------------------------------------------------

    def score(self, step_s: float, fewest_ranks: int) -> float:
        """What the objective is at least, for steps of at least ``step_s`` on at least so many ranks."""
        if self.objective == "time":
            return step_s * ROUNDING
        nodes = -(-fewest_ranks // self._slots)
        share = self._goodput.get(nodes)
        if share is None:
            share = goodput_bound(nodes, 0.0, self._checkpoint, self.space.work.hardware, self._slots)
            self._goodput[nodes] = share
        if self.objective == "goodput":
            return step_s / share * ROUNDING
        devices = (nodes + self.space.work.cluster.spares) * self._slots
        return step_s / share * devices * self.space.work.hardware.price_per_device_hour / 3600 * ROUNDING

    # ---- subtrees: what the objective is at least -------------------------------------------------------------------

    def range(self, shape: Shape, most: int, floor: float) -> float:
        """Of a shape with at most ``most`` replicas, from the work alone; ``floor`` is known to hold."""
        if self.objective == "memory":
            return floor
        rest = most // (2 * shape.unit) * shape.unit
        upper = self.score(self._rough_s(shape, most), shape.ranks * (rest + shape.unit))
        return max(
            floor, min(upper, self.score(self._rough_s(shape, rest), shape.ranks * shape.unit)) if rest else upper
        )

    def mode(self, shape: Shape, recompute: Recompute, fewest: int, most: int) -> float:
        """Of a range of replicas with one kind of recomputation, or one that recomputes more."""
        if self.objective == "memory":
            size, splits = self.space.micro_batch[0], self.space.sequence_parallel(shape)
            return min(self._size_bytes(shape, Inner(size, recompute, split), most) for split in splits)
        rate, size = self.rate(shape, recompute, fewest, most), self.space.micro_batch[0]
        work = self.space.work.batch.global_batch / most * rate.slow_s
        bubble = size * (rate.whole_s - rate.slow_s) / self.best_divisor(shape)
        return self.score(work + bubble + rate.fixed_s, shape.ranks * fewest)

    def size(self, shape: Shape, inner: Inner, fewest: int, most: Replicas, rate: Pace, *, exact: bool) -> float:
        """The same with one kind of micro-batch; ``exact`` looks at its kernels, in a whole pass through the model."""
        if self.objective == "memory":
            return self._size_bytes(shape, inner, most.dp)
        whole, slow = inner.micro_batch * rate.whole_s, inner.micro_batch * rate.slow_s
        if exact:
            whole = max(whole, self._pass_s(shape, inner))
            slow = max(slow, whole / shape.pp)
        step_s = most.grad_accum * slow + (whole - slow) / self.best_divisor(shape) + rate.fixed_s
        return self.score(step_s, shape.ranks * fewest)

    def _pass_s(self, shape: Shape, inner: Inner) -> float:
        """Seconds of one micro-batch on one rank that has all blocks: the same for every number of stages."""
        key = (shape[0], shape[2:5], inner)
        found = self._passes.get(key)
        if found is None:
            lone = shape._replace(pp=1, stages=(self.space.work.model.layers,))
            states = self.space.states(lone)[:1]
            found = self._passes[key] = self._corner(lone, inner, Replicas(1, 1), states).slow_s
        return found

    def pipe(self, shape: Shape, inner: Inner, pipe: Pipe, replicas: tuple[Replicas, ...], pace: Pace) -> float:
        """The same with one schedule, in any state."""
        if self.objective == "memory":
            return self._least_bytes(shape, inner, pipe, replicas[-1])
        return self._range_score(shape, pipe, replicas, pace)

    def state(self, shape: Shape, pipe: Pipe, replicas: tuple[Replicas, ...], pace: Pace, best: ParallelPlan) -> float:
        """The same in the state whose pace it is; ``best`` has the most replicas."""
        if self.objective == "memory":
            return self.estimator.memory.peak(best) - padding(best)
        return self._range_score(shape, pipe, replicas, pace)

    def _range_score(self, shape: Shape, pipe: Pipe, replicas: tuple[Replicas, ...], pace: Pace) -> float:
        step_s = pace.step_s(replicas[-1].grad_accum, self.divisor(shape, pipe))
        return self.score(step_s, shape.ranks * replicas[0].dp)

    def leaf(self, shape: Shape, pipe: Pipe, replicas: Replicas, pace: Pace) -> float:
        """The same of one plan."""
        if self.objective == "memory":
            return 0.0
        step_s = pace.step_s(replicas.grad_accum, self.divisor(shape, pipe))
        return self.score(step_s, shape.ranks * replicas.dp)

    # ---- time -------------------------------------------------------------------------------------------------------

    def _rough_s(self, shape: Shape, most: int) -> float:
        """Seconds of a step of a shape with at most ``most`` replicas, from the work alone, evenly spread."""
        whole = self._whole.get((shape.tp, shape.ep))
        if whole is None:
            lone = shape._replace(pp=1, sp=1, cp=1, stages=(self.space.work.model.layers,))
            states, kinds = self.space.states(lone)[:1], self.space.sequence_parallel(lone)
            inners = (Inner(self._large, self.space.recompute[0], split) for split in kinds)
            least = _least(self._corner(lone, inner, Replicas(1, 1), states) for inner in inners)
            whole = self._whole[shape.tp, shape.ep] = least.whole_s / self._large * MARGIN
        bubble = self.space.micro_batch[0] * (1 - 1 / shape.pp) / self.best_divisor(shape)
        sequences = self.space.work.batch.global_batch / most / shape.pp
        return (sequences + bubble) * whole / (shape.sp * shape.cp) + self._host_s

    def rate(self, shape: Shape, recompute: Recompute, fewest: int, most: int) -> Pace:
        """Seconds per sequence that no micro-batch of a shape beats, with ``fewest`` to ``most`` replicas."""
        ranks, states = shape.sp * shape.cp, self.quiet(shape, most)
        key = (shape.tp, shape.ep, shape.stages, recompute, fewest * ranks, states)
        found = self._rates.get(key)
        if found is None:
            lone, corner = shape._replace(sp=1, cp=1), Replicas(fewest * ranks, 1)
            slow, whole, fixed = _least(
                self._corner(lone, Inner(self._large, recompute, split), corner, states, self._lightest)
                for split in self._quick(lone, recompute)
            )
            found = self._rates[key] = Pace(slow / self._large * MARGIN, max(slow, whole) / self._large * MARGIN, fixed)
        return found if ranks == 1 else Pace(found.slow_s / ranks, found.whole_s / ranks, found.fixed_s)

    def _quick(self, lone: Shape, recompute: Recompute) -> tuple[bool, ...]:
        """With and without Megatron's sequence parallelism: what is quicker in every part of the model, or both."""
        key = (lone.tp, lone.ep, recompute)
        found = self._quicker.get(key)
        if found is None:
            found, timing = self.space.sequence_parallel(lone), self.estimator.timing
            corner = (lone, self.space.states(lone)[0])
            plans = [
                self.space.plan(*corner, Inner(self._large, recompute, one), PLAIN, Replicas(1, 1)) for one in found
            ]
            units = [timing.unit(timing.shard(plan)) for plan in plans]
            parts = [(unit.dense_s, unit.moe_s, unit.embed_s, unit.head_s) for unit in units]
            for split, own in zip(found, parts, strict=True):
                if all(mine <= other for part in parts for mine, other in zip(own, part, strict=True)):
                    found = (split,)
                    break
            self._quicker[key] = found
        return found

    def any_state(self, shape: Shape, inner: Inner, fewest: int, most: Replicas) -> Pace:
        """Pace of a kind of micro-batch with ``fewest`` to ``most`` replicas, whatever the state."""
        return self._corner(shape, inner, Replicas(fewest, most.grad_accum), self.quiet(shape, most.dp))

    def _corner(
        self, shape: Shape, inner: Inner, replicas: Replicas, states: tuple[State, ...], timing: Timing | None = None
    ) -> Pace:
        """Pace of a corner in the best of some states; without messages between stages, which depend on more."""
        timing = timing or self.estimator.timing
        plans = (self.space.plan(shape, state, inner, PLAIN, replicas) for state in states)
        return _least(self._pace(timing.step(plan), replicas, messages=0.0) for plan in plans)

    def pace(self, shape: Shape, inner: Inner, fewest: int, most: Replicas, state: State) -> Pace:
        """Pace of a kind of micro-batch with ``fewest`` to ``most`` replicas in one state."""
        plan = self.space.plan(shape, state, inner, PLAIN, Replicas(fewest, most.grad_accum))
        return self._pace(self.estimator.timing.step(plan), most, messages=1.0)

    def _pace(self, step: StepTime, replicas: Replicas, *, messages: float) -> Pace:
        slow = (sum(step[:_WORK]) - self._host_s) / replicas.grad_accum
        return Pace(slow, slow + step.bubble, messages * step.p2p + step.dp + self._host_s)

    def quiet(self, shape: Shape, most: int) -> tuple[State, ...]:
        """Of the states that may fit with up to ``most`` replicas, those of which one sends least; none if none fits.

        With a pipeline the lowest ZeRO stage sends least; without one, any may. Narrow gradients always send less.
        """
        replicas = most * shape.sp * shape.cp
        key = (shape.tp, shape.pp, shape.ep, replicas, self.space.kind(shape))
        found = self._quiet.get(key)
        if found is None:
            stages = [one.zero_stage for one in self.lean(shape) if self._may_fit(shape, replicas, one)]
            first = {one.zero_stage: one for one in reversed(self._ranked(shape)) if one.zero_stage in stages}
            states = tuple(first[stage] for stage in sorted(first))
            found = self._quiet[key] = states[:1] if shape.pp > 1 else states
        return found

    def _ranked(self, shape: Shape) -> list[State]:
        """The states, by what they send."""
        return sorted(self.space.states(shape), key=lambda one: (one.zero_stage, _width(one), _off(one)))

    def _may_fit(self, shape: Shape, replicas: int, state: State) -> bool:
        """Model state alone, spread evenly, stays within the memory."""
        floor = self.estimator.memory.floor(
            tp=shape.tp,
            pp=shape.pp,
            replicas=replicas,
            ep=shape.ep,
            zero_stage=state.zero_stage,
            grad_dtype=state.grad_dtype,
            offload=state.offload,
        )
        return floor * ROUNDING <= self.budget

    def divisor(self, shape: Shape, pipe: Pipe) -> float:
        """How many times shorter the bubble of a schedule is than that of 1F1B."""
        key = (shape.pp, pipe)
        found = self._divisors.get(key)
        if found is None:
            found = 1.0
            if pipe != PLAIN:
                inner = Inner(1, "none", False)
                parts = (shape, self.space.states(shape)[0], inner)
                count = Replicas(shape.unit, 2 * shape.pp)
                plain, other = (
                    self.estimator.timing.step(self.space.plan(*parts, one, count)).bubble for one in (PLAIN, pipe)
                )
                found = plain / other if other > 0 else float("inf")
            self._divisors[key] = found
        return found

    def best_divisor(self, shape: Shape) -> float:
        """The largest of any schedule of a shape."""
        pipes = self.space.pipes(shape)
        key = (shape.pp, len(pipes))
        found = self._best_divisors.get(key)
        if found is None:
            # none where the schedule is fixed to one that the space leaves out
            found = self._best_divisors[key] = max((self.divisor(shape, pipe) for pipe in pipes), default=1.0)
        return found

    # ---- memory -----------------------------------------------------------------------------------------------------

    def leanest(self, shape: Shape, size: int) -> tuple[tuple[Pipe, int], ...]:
        """Schedules of which one holds least, whatever the state, each with the fewest micro-batches that it takes.

        1F1B has the fewest micro-batches in flight, but DualPipeV has the output layer on the first stage, where it
        needs no second table of tied embeddings; and the first blocks of a model with experts may be light.
        """
        many = 2 * shape.pp
        dual = self.space.work.batch.global_batch > (many - 1) * size and DUAL in self.space.pipes(shape)
        return ((PLAIN, 1), (DUAL, many)) if dual else ((PLAIN, 1),)

    def _size_bytes(self, shape: Shape, inner: Inner, most: int) -> float:
        """Bytes that a kind of micro-batch needs at least with up to ``most`` replicas, whatever the rest."""
        choices = self.leanest(shape, inner.micro_batch)
        return min(self._least_bytes(shape, inner, pipe, Replicas(most, count)) for pipe, count in choices)

    def _least_bytes(self, shape: Shape, inner: Inner, pipe: Pipe, replicas: Replicas) -> float:
        """Bytes that a corner needs in its leanest state."""
        plans = (self.space.plan(shape, state, inner, pipe, replicas) for state in self.lean(shape))
        return min(self.estimator.memory.peak(plan) - padding(plan) for plan in plans)

    def lean(self, shape: Shape) -> tuple[State, ...]:
        """Of each ZeRO stage, the highest first, the state that holds least: no other state holds less than all."""
        key = self.space.kind(shape)
        found = self._lean.get(key)
        if found is None:
            states = sorted(self.space.states(shape), key=lambda one: (one.zero_stage, _off(one), -_width(one)))
            last = {state.zero_stage: state for state in states}
            found = self._lean[key] = tuple(last[stage] for stage in sorted(last, reverse=True))
        return found

    def exceeds(self, plan: ParallelPlan) -> str:
        """What makes a corner, and with it every plan beyond it, exceed the memory; empty if nothing does."""
        memory, limit = self.estimator.memory, self.budget + padding(plan)
        first = sum(memory.stage(plan, 0))  # most often the fullest
        return "activations" if first > limit or memory.peak(plan) > limit else ""

    def size_exceeds(self, shape: Shape, inner: Inner, most: int) -> str:
        """What makes a kind of micro-batch exceed the memory with up to ``most`` replicas, whatever the rest.

        At least ``batch / (most * size)`` micro-batches, not rounded, have to be in flight where the pipeline is long
        enough. So what exceeds with every schedule also exceeds with larger micro-batches.
        """
        least, found = self.space.work.batch.global_batch / (most * inner.micro_batch), ""
        for pipe, count in self.leanest(shape, inner.micro_batch):
            number = cast(int, least if pipe == PLAIN else max(least, count))
            found = self.all_exceed(shape, inner, pipe, Replicas(most, number))
            if not found:
                return ""
        return found

    def all_exceed(self, shape: Shape, inner: Inner, pipe: Pipe, replicas: Replicas) -> str:
        """The same, whatever the state: what makes the leanest exceed the memory."""
        found = ""
        for state in self.lean(shape):
            found = self.exceeds(self.space.plan(shape, state, inner, pipe, replicas))
            if not found:
                return ""
        return found


def _least(paces: Iterable[Pace]) -> Pace:
    """The least of each kind."""
    found = list(paces)
    return found[0] if len(found) == 1 else Pace(*(min(kind) for kind in zip(*found, strict=True)))


def _width(state: State) -> int:
    """Bytes of a gradient."""
    return DTYPE_BYTES[state.grad_dtype]


def _off(state: State) -> int:
    """How much of the state lives in host memory."""
    return get_args(Offload).index(state.offload)


def padding(plan: ParallelPlan) -> float:
    """Bytes that ZeRO may add when replicas are added: elements that fill up its buffers, tensor by tensor in stage 3.

    A block has at most 24 tensors; an element takes at most 18 bytes of model state, and is padded once per replica.
    """
    tensors = 24 * (max(plan.stages) + 2) if plan.zero_stage == 3 else 2
    return tensors * (4.0 * plan.dp * plan.sp * plan.cp + 36.0)

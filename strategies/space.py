"""The full space of plans of one workload: what may be chosen for every knob, how many plans that makes, and each.

The space is a tree. A :class:`Shape` says how the model is cut, a :class:`State` how its state is kept, an
:class:`Inner` what one micro-batch is, a :class:`Pipe` in which order micro-batches flow, and :class:`Replicas` make a
plan of it. Every level multiplies the one above it, so that whole subtrees are counted, not visited. The choices:

- ``tp`` divides every tensor of the model; ``pp`` is anything up to the number of blocks; ``stages`` is the even split
  and, where the output projection weighs as much as blocks do, the split that makes up for it;
- ``cp``, ZeRO-2 and 3 only without a pipeline, which runs none of them;
- ``micro_batch`` is 1, 2, 3, 4, 6, 8, 12, ... (2^k and 3 x 2^k);
- for each count of accumulated micro-batches the fewest replicas that need it, as few as one: a larger machine has all
  the plans of a smaller one and more, so it can never be predicted to be slower;
- ``recompute`` is none or full, and selective where attention is not fused: else that saves nothing;
- everything else is each of its legal values. What breaks a rule only for some batches or machines is in the space, and
  counted as rejected by that rule.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import NamedTuple, cast, get_args

from strategies import capabilities
from strategies.cases import divisors, legal_tp
from strategies.plan import GradDtype, Offload, ParallelPlan, Recompute, Schedule, accumulation, split_layers
from strategies.specs import ModelSpec, Precision
from strategies.workload import Workload

KNOBS = (
    *("tp", "pp", "dp", "ep", "sp", "cp", "zero_stage", "schedule", "vpp", "stages", "micro_batch", "grad_accum"),
    *("grad_dtype", "recompute", "offload", "flash", "sequence_parallel"),
)
"""What a plan consists of: each is free, or fixed to one value."""


class Shape(NamedTuple):
    """How the model is cut."""

    tp: int
    pp: int
    sp: int
    cp: int
    ep: int
    stages: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Ranks of one replica."""
        return self.tp * self.pp * self.sp * self.cp

    @property
    def unit(self) -> int:
        """Replicas come in multiples of this many, so that experts are spread evenly."""
        return self.ep // math.gcd(self.ep, self.sp * self.cp)


class State(NamedTuple):
    """How weights, gradients and optimizer state are kept."""

    zero_stage: int
    grad_dtype: GradDtype
    offload: Offload


class Inner(NamedTuple):
    """What one micro-batch is, and how it is computed."""

    micro_batch: int
    recompute: Recompute
    sequence_parallel: bool


class Pipe(NamedTuple):
    """In which order micro-batches flow through the stages."""

    schedule: Schedule
    vpp: int


class Replicas(NamedTuple):
    """The data-parallel axis."""

    dp: int
    grad_accum: int


def replica_choices(global_batch: int, micro_batch: int, unit: int = 1) -> tuple[Replicas, ...]:
    """For each reachable count of accumulated micro-batches the fewest replicas that need it; replicas ascending.

    Args:
        global_batch: Sequences per step.
        micro_batch: Sequences per replica and forward pass.
        unit: Replicas come in multiples of this many (experts are spread over them).
    """
    found = []
    dp = unit
    while dp * micro_batch <= global_batch:
        count = accumulation(global_batch, micro_batch, dp)
        found.append(Replicas(dp, count))
        if count == 1:
            break
        fewest = -(-global_batch // (micro_batch * (count - 1)))
        dp = -(-fewest // unit) * unit
    return tuple(found)


def micro_batches(global_batch: int) -> tuple[int, ...]:
    """2^k and 3 x 2^k up to the batch."""
    powers = [2**k for k in range(max(1, global_batch).bit_length())]
    return tuple(sorted(size for power in powers for size in (power, 3 * power) if size <= global_batch))


def lightened(model: ModelSpec, pp: int) -> tuple[int, ...]:
    """Blocks per stage so that a short last stage makes up for the output projection, counted in multiplications.

    A block multiplies every token with 2 h (q + kv) weights of attention and 2 h f (3 h f with a gate) of its
    feed-forward part, the output projection with h V: of a small model with a large vocabulary, that is several blocks.
    """
    even = split_layers(model.layers, pp)
    if pp < 2 or model.layers < pp:
        return even
    width = (model.heads + model.kv_heads) * model.head_dim
    ffn = model.ffn if model.moe is None else model.moe.ffn * model.moe.top_k + model.moe.shared_ffn
    head = model.vocab / max(1, 2 * width + (3 if model.has_gate else 2) * ffn)

    def slowest(last: int) -> float:
        return max(-(-(model.layers - last) // (pp - 1)), last + head)

    last = min(range(1, model.layers - pp + 2), key=lambda blocks: (slowest(blocks), -blocks))
    if slowest(last) >= max(max(even), even[-1] + head):
        return even
    return (*split_layers(model.layers - last, pp - 1), last)


class Space:
    """All plans of one workload.

    Args:
        work: The workload; the size of its cluster limits the plans.
        fixed: Knobs that have one value; the others are free. A value that is no legal choice leaves no plan.
        runnable_only: Only what phalanx can run, by the capability table.
    """

    def __init__(self, work: Workload, fixed: Mapping[str, object] | None = None, runnable_only: bool = False) -> None:
        self.work = work
        self.fixed = dict(fixed or {})
        self.runnable_only = runnable_only
        self.flash = bool(self.fixed.get("flash", True))
        model = work.model
        self.tp: tuple[int, ...] = self._keep("tp", tuple(legal_tp(model)))
        self.pp: tuple[int, ...] = self._keep("pp", tuple(range(1, model.layers + 1)))
        self.sp: tuple[int, ...] = self._keep("sp", tuple(divisors(model.heads)))
        rings = [1] if runnable_only else divisors(work.batch.seq // 2) or [1]
        self.cp: tuple[int, ...] = self._keep("cp", tuple(rings))
        self.ep: tuple[int, ...] = self._keep("ep", tuple(divisors(model.moe.experts)) if model.moe else (1,))
        self.recompute: tuple[Recompute, ...] = self._keep("recompute", self._recomputes())
        self.offload: tuple[Offload, ...] = self._keep("offload", get_args(Offload))
        size = self.fixed.get("micro_batch")
        self.micro_batch = micro_batches(work.batch.smallest) if size is None else (cast(int, size),)
        self._known_states: dict[tuple[bool, ...], tuple[State, ...]] = {}
        self._known_pipes: dict[tuple[int, bool], tuple[Pipe, ...]] = {}

    def _keep(self, knob: str, choices: tuple) -> tuple:  # type: ignore[type-arg]
        """The choices of a knob, or that which equals what it is fixed to."""
        return tuple(value for value in choices if value == self.fixed.get(knob, value))

    def _recomputes(self) -> tuple[Recompute, ...]:
        """Selective recomputation saves the scores of attention; fused attention has none (and FSDP's saves others)."""
        useless = self.flash and self.work.framework != "fsdp" and "recompute" not in self.fixed
        return ("none", "full") if useless else get_args(Recompute)

    # ---- levels -----------------------------------------------------------------------------------------------------

    def shapes(self) -> Iterator[Shape]:
        """Every way to cut the model, whether the machine is large enough or not."""
        rings = {True: self.cp, False: (1,) * (1 in self.cp)}  # a pipeline runs no context parallelism
        for pp in self.pp:
            for stages, tp in product(self.splits(pp), self.tp):
                for sp, cp, ep in product(self.sp, rings[pp == 1], self.ep):
                    shape = Shape(tp, pp, sp, cp, ep, stages)
                    if self._cuts(shape) and self.states(shape):
                        yield shape

    def _cuts(self, shape: Shape) -> bool:
        """Heads and the sequence can be cut so: Ulysses trades shards for heads, causal rings take two parts a rank."""
        parts = shape.sp * (2 * shape.cp if shape.cp > 1 else 1)
        return self.work.model.heads // shape.tp % shape.sp == 0 and self.work.batch.seq % parts == 0

    def splits(self, pp: int) -> tuple[tuple[int, ...], ...]:
        """Blocks per stage, the choices."""
        model, asked = self.work.model, self.fixed.get("stages")
        if asked is None:
            return tuple(dict.fromkeys((split_layers(model.layers, pp), lightened(model, pp))))
        stages = tuple(cast(tuple[int, ...], asked))
        return (stages,) * (len(stages) == pp and sum(stages) == model.layers and min(stages) >= 1)

    def states(self, shape: Shape) -> tuple[State, ...]:
        """Every way to keep the state of a shape."""
        key = self.kind(shape)
        if key not in self._known_states:
            self._known_states[key] = tuple(self._states(shape))
        return self._known_states[key]

    def kind(self, shape: Shape) -> tuple[bool, ...]:
        """Shapes of one kind have the same states; where plans need not run, only a pipeline makes a difference."""
        if not self.runnable_only:
            return (shape.pp > 1,)
        return (shape.tp > 1, shape.pp > 1, shape.ep > 1, shape.sp > 1)

    def _states(self, shape: Shape) -> Iterator[State]:
        stages = self._keep("zero_stage", (0, 1) if shape.pp > 1 else (0, 1, 2, 3))
        for stage, offload in product(stages, self.offload):
            if offload == "none" or stage == 3 or (stage > 0 and offload == "optimizer"):
                for grads in self._keep("grad_dtype", _grad_dtypes(stage, self.work.precision)):
                    state = State(stage, grads, offload)
                    if not self.runnable_only or self._runs(shape, state):
                        yield state

    def _runs(self, shape: Shape, state: State) -> bool:
        """Whether the engine trains with such a state, whatever the replicas, the recomputation and the schedule."""
        made = product(self.recompute, (False, True)[: 1 + (shape.tp > 1)], (1, 2))
        plans = (
            self.plan(shape, state, Inner(1, recompute, split), Pipe("1f1b", 1), Replicas(dp, 1))
            for recompute, split, dp in made
        )
        return all(capabilities.runnable(plan, self.work.precision, self.work.model) is None for plan in plans)

    def inners(self, shape: Shape) -> Iterator[Inner]:
        """Every kind of micro-batch of a shape, the smallest first."""
        for size, recompute, split in product(self.micro_batch, self.recompute, self.sequence_parallel(shape)):
            yield Inner(size, recompute, split)

    def sequence_parallel(self, shape: Shape) -> tuple[bool, ...]:
        """Megatron's sequence parallelism rides on tensor parallelism."""
        held = self.work.batch.seq // (shape.sp * shape.cp)
        free = shape.tp > 1 and held % shape.tp == 0
        return self._keep("sequence_parallel", (False, True) if free else (False,))

    def pipes(self, shape: Shape) -> tuple[Pipe, ...]:
        """Every schedule of a shape.

        Virtual stages are equal and micro-batches come in rounds of ``pp`` (Megatron-LM asserts both); DualPipeV cuts
        each stage in two and needs ``2 pp`` micro-batches (DeepSeek's DualPipe asserts it).
        """
        key = (shape.pp, len(set(shape.stages)) == 1)
        if key not in self._known_pipes:
            self._known_pipes[key] = tuple(self._pipes(*key))
        return self._known_pipes[key]

    def _pipes(self, pp: int, equal: bool) -> Iterator[Pipe]:
        layers = self.work.model.layers
        found = [Pipe("1f1b", 1)]
        if pp > 1:
            virtual = divisors(layers // pp)[1:] if equal and not self.runnable_only else []
            found += [Pipe("interleaved", vpp) for vpp in virtual]
            if layers >= 2 * pp and not (self.runnable_only and "dualpipev" not in capabilities.schedules()):
                found.append(Pipe("dualpipev", 1))
        schedules = self._keep("schedule", get_args(Schedule))
        vpps = self._keep("vpp", tuple(range(1, layers + 1)))
        return (pipe for pipe in found if pipe.schedule in schedules and pipe.vpp in vpps)

    def replicas(self, shape: Shape, inner: Inner, pipe: Pipe, fewest: int, most: int) -> tuple[Replicas, ...]:
        """The legal ones of ``fewest`` to ``most``, ascending."""
        axis = self._axis(inner.micro_batch, shape.unit, 1 if pipe.schedule == "1f1b" else shape.pp, pipe.schedule)
        return axis.choices[bisect_left(axis.dps, fewest) : bisect_right(axis.dps, most)]

    def room(self, shape: Shape) -> int:
        """Replicas that the machine carries, of those that the batch could use."""
        return min(self.work.cluster.slots // shape.ranks, self.work.batch.smallest)

    @cache  # noqa: B019 - a space lives as long as its search
    def _axis(self, size: int, unit: int, pp: int, schedule: Schedule) -> _Axis:
        """All choices of replicas that a schedule takes, on a machine without end; ``pp`` 1 stands for any in 1F1B."""
        if schedule != "1f1b":
            plain = self._axis(size, unit, 1, "1f1b").choices
            return _axis(tuple(one for one in plain if _takes(schedule, pp, one.grad_accum)))
        batch, dp, accumulated = self.work.batch.global_batch, self.fixed.get("dp"), self.fixed.get("grad_accum")
        choices = replica_choices(batch, size, unit) if dp is None else _given(batch, size, unit, cast(int, dp))
        fed = (one for one in choices if one.dp * size <= self.work.batch.smallest)  # also in the first steps of a ramp
        return _axis(tuple(one for one in fed if accumulated in (None, one.grad_accum)))

    # ---- counting ---------------------------------------------------------------------------------------------------

    def count(self, shape: Shape, fewest: int, most: int) -> int:
        """Legal plans of a shape with ``fewest`` to ``most`` replicas."""
        legal = self._legal(shape, most) - (self._legal(shape, fewest - 1) if fewest > 1 else 0)
        return self._many(shape) * legal

    def count_inner(self, shape: Shape, inner: Inner, fewest: int, most: int) -> int:
        """The same with one kind of micro-batch."""
        found = 0
        for schedule, times in self._schedules(shape.pp, len(set(shape.stages))):
            axis = self._axis(inner.micro_batch, shape.unit, 1 if schedule == "1f1b" else shape.pp, schedule)
            found += times * (bisect_right(axis.dps, most) - bisect_left(axis.dps, fewest))
        return found * len(self.states(shape))

    def census(self, shapes: Iterable[Shape]) -> tuple[int, dict[str, int]]:
        """Number of all plans, and of those that no legal plan can be made of, by the rule that refuses them."""
        size, refused = 0, Counter[str]()
        for shape in shapes:
            pipes, many, room = len(self.pipes(shape)), self._many(shape), self.room(shape)
            carried = pipes * self._reach(shape.unit, 1, "1f1b", room)
            whole = pipes * self._reach(shape.unit, 1, "1f1b", self.work.batch.global_batch)
            size += many * whole
            refused["world_size_fits_cluster"] += many * (whole - carried)
            refused["schedule_fits"] += many * (carried - self._legal(shape, room))
        return size, {rule: number for rule, number in refused.items() if number}

    def _many(self, shape: Shape) -> int:
        """Plans of a shape with one size of micro-batch, one schedule and one number of replicas."""
        return len(self.states(shape)) * len(self.recompute) * len(self.sequence_parallel(shape))

    def _legal(self, shape: Shape, most: int) -> int:
        """Legal choices of micro-batch, schedule and at most ``most`` replicas of a shape."""
        unit, pp = shape.unit, shape.pp
        return sum(
            times * self._reach(unit, 1 if schedule == "1f1b" else pp, schedule, most)
            for schedule, times in self._schedules(pp, len(set(shape.stages)))
        )

    @cache  # noqa: B019
    def _schedules(self, pp: int, kinds: int) -> tuple[tuple[Schedule, int], ...]:
        """Schedules with their number of variants."""
        return tuple(Counter(pipe.schedule for pipe in self._pipes(pp, kinds == 1)).items())

    @cache  # noqa: B019
    def _reach(self, unit: int, pp: int, schedule: Schedule, most: int) -> int:
        """Choices of at most ``most`` replicas, over all sizes of micro-batches."""
        return bisect_right(self._merged(unit, pp, schedule), most)

    @cache  # noqa: B019
    def _merged(self, unit: int, pp: int, schedule: Schedule) -> list[int]:
        """Replicas of all choices of all sizes of micro-batches, ascending."""
        return sorted(dp for size in self.micro_batch for dp in self._axis(size, unit, pp, schedule).dps)

    # ---- plans ------------------------------------------------------------------------------------------------------

    def leaves(self) -> Iterator[ParallelPlan]:
        """Every legal plan, one by one: for small spaces only."""
        for shape in self.shapes():
            for state, inner, pipe in product(self.states(shape), tuple(self.inners(shape)), self.pipes(shape)):
                for replicas in self.replicas(shape, inner, pipe, 1, self.room(shape)):
                    yield self.plan(shape, state, inner, pipe, replicas)

    def plan(self, shape: Shape, state: State, inner: Inner, pipe: Pipe, replicas: Replicas) -> ParallelPlan:
        """The plan that these choices make."""
        return ParallelPlan(
            tp=shape.tp,
            pp=shape.pp,
            dp=replicas.dp,
            ep=shape.ep,
            sp=shape.sp,
            cp=shape.cp,
            zero_stage=state.zero_stage,
            schedule=pipe.schedule,
            vpp=pipe.vpp,
            stages=shape.stages,
            micro_batch=inner.micro_batch,
            grad_accum=replicas.grad_accum,
            grad_dtype=state.grad_dtype,
            recompute=inner.recompute,
            offload=state.offload,
            flash=self.flash,
            sequence_parallel=inner.sequence_parallel,
        )


class _Axis(NamedTuple):
    """Choices of replicas, and their ``dp`` alone for bisection."""

    choices: tuple[Replicas, ...]
    dps: list[int]


def _axis(choices: tuple[Replicas, ...]) -> _Axis:
    return _Axis(choices, [one.dp for one in choices])


def _takes(schedule: Schedule, pp: int, micro_batches: int) -> bool:
    """Whether a schedule runs so many micro-batches."""
    return micro_batches % pp == 0 if schedule == "interleaved" else micro_batches >= 2 * pp


def _grad_dtypes(stage: int, precision: Precision) -> tuple[GradDtype, ...]:
    """Precisions of gradients: fp32 or that of the arithmetic; without ZeRO, DeepSpeed has only the latter."""
    low: tuple[GradDtype, ...] = () if precision == "fp8" else (precision,)
    return low if stage == 0 else tuple(dict.fromkeys(("fp32", *low)))


def _given(global_batch: int, size: int, unit: int, dp: int) -> tuple[Replicas, ...]:
    """The replicas that somebody asked for, if they are legal."""
    legal = dp >= 1 and dp % unit == 0 and dp * size <= global_batch
    return (Replicas(dp, accumulation(global_batch, size, dp)),) if legal else ()

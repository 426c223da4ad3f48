"""Seconds of one optimizer step, by kind, on the critical path; the slowest pipeline stage rules.

With ``m`` micro-batches per replica and stages that need ``t_i`` seconds for the forward and backward pass of one:

    step = m * max(t) + bubble + p2p + exposed data-parallel communication + optimizer + offload + host

- bubble: ``(sum(t) - max(t)) / v`` for 1F1B (v = 1) and the interleaved schedule: the first micro-batch runs
  through all the other stages once (arXiv 2104.04473: ``(p - 1) / v`` for equal stages). DualPipeV: a third of 1F1B's
  (deepseek-ai/DualPipe: ``(p - 1) (F&B + B - 3W)`` of half a stage each).
- ``t``: blocks, with launches, tensor-, context- and expert-parallel communication (:mod:`strategies.blocks`), the
  embedding on the first stage, the output projection and the loss on the last.
"""

from __future__ import annotations

from typing import NamedTuple

from strategies import calibration as calibrations
from strategies import offload
from strategies.blocks import Blocks, BlockTime, Shard
from strategies.calibration import Calibration
from strategies.collectives import all_reduce_s, gather_s, send_s
from strategies.kernels import moved_s
from strategies.model_state import owned_parameters
from strategies.plan import ParallelPlan
from strategies.timing_terms import explain
from strategies.workload import Term, Workload


class StepTime(NamedTuple):
    """Seconds on the critical path of one optimizer step, by kind; their sum is the step time.

    Attributes:
        gemm: Products of activations and weights of the slowest stage, over all micro-batches of one replica.
        attention: Attention proper of that stage.
        memory_bound: Norms, residuals, activations, loss of that stage.
        tp: Exposed tensor-parallel communication (with Megatron's sequence parallelism).
        cp: Exposed ring attention and Ulysses exchanges.
        ep: Exposed exchanges of tokens between experts.
        launch: What launching kernels adds where the device would be faster.
        bubble: Waiting for the other pipeline stages.
        p2p: Exposed messages between pipeline stages.
        dp: Exposed reduction of gradients and gathering of parameters.
        optimizer: The optimizer's update.
        offload: Exposed traffic with host memory and disks, and the update there.
    """

    gemm: float
    attention: float
    memory_bound: float
    tp: float
    cp: float
    ep: float
    launch: float
    bubble: float
    p2p: float
    dp: float
    optimizer: float
    offload: float


class Unit(NamedTuple):
    """One micro-batch's times for one shard: what plans share."""

    dense: BlockTime
    moe: BlockTime
    embed: BlockTime
    head: BlockTime
    dense_s: float
    moe_s: float
    embed_s: float
    head_s: float
    dense_weights: float
    moe_weights: float
    expert_weights: float


class Part(NamedTuple):
    """Collectives of one kind in a step: so many ``times`` ``size`` bytes, gathered or reduced and scattered."""

    kind: str
    times: int
    size: float


class Traffic(NamedTuple):
    """What the replicas of a stage exchange in a step, and the seconds of computation that it may run under."""

    parts: tuple[Part, ...]
    hiding_s: float


class Stage(NamedTuple):
    """What the slowest stage consists of."""

    seconds: float
    dense: int
    moe: int
    first: bool
    last: bool

    def work(self, unit: Unit, micro_batches: int) -> tuple[float, ...]:
        """Seconds by kind of so many micro-batches."""
        kinds: tuple[float, ...] = unit.dense
        if self.dense != 1:
            count = self.dense
            kinds = tuple([count * one for one in kinds])
        if self.moe:
            count = self.moe
            kinds = tuple([one + count * more for one, more in zip(kinds, unit.moe, strict=True)])
        if self.first:
            kinds = tuple([one + more for one, more in zip(kinds, unit.embed, strict=True)])
        if self.last:
            kinds = tuple([one + more for one, more in zip(kinds, unit.head, strict=True)])
        return tuple([micro_batches * one for one in kinds])


_OPTIMIZER_BYTES = 40.0
"""Bytes per parameter of the optimizer's shard: gradient read for the norm and for the update (4 + 4), moments and
master weights read and written (24), weights written (2), and the scaled gradient written and read (4 + 8)."""

_BACKWARD = 2.0 / 3.0
"""Share of a micro-batch's time that is its backward pass, under which data-parallel communication can hide."""


class Timing:
    """Predicts steps of one workload; times that plans share are computed once."""

    def __init__(self, work: Workload, calibration: Calibration | None = None) -> None:
        """Prepare for plans of ``work``.

        Args:
            work: Model, batch, machine and precision.
            calibration: Constants; None looks them up.

        Raises:
            ConfigError: The cluster has no hardware figures.
        """
        hardware = work.hardware
        self.work = work
        self.calibration = calibration or calibrations.lookup(work)
        self.hardware = hardware
        self.device = calibrations.device_of(work, self.calibration)
        self.network = calibrations.network_of(work, self.calibration)
        gather = work.framework == "megatron"  # as phalanx does
        self.blocks = Blocks(work.model, self.device, self.network, self.calibration, shards_gather=gather)
        moe = work.model.moe
        self._experts = moe is not None
        self._dense_layers = work.model.layers if moe is None else min(moe.dense_layers, work.model.layers)
        self._units: dict[Shard, Unit] = {}
        self._deepspeed = work.framework == "megatron" and work.deepspeed
        self.buckets = self.calibration.buckets if self._deepspeed else 1.0
        self.optimizer_bytes = _OPTIMIZER_BYTES
        self._grad_bytes = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
        self._table = work.model.vocab * work.model.hidden
        self._itemsize = 4.0 if work.precision == "fp32" else 2.0

    # --- the step --------------------------------------------------------------------------------------------------

    def step(self, plan: ParallelPlan) -> StepTime:
        """Seconds of one step of a legal plan, by kind."""
        shard = self.shard(plan)
        unit = self._units.get(shard) or self.unit(shard)
        stage = self.slowest(unit, plan)
        work = list(stage.work(unit, plan.grad_accum))
        weights = self.stage_weights(unit, stage, plan)
        work[2] += (plan.grad_accum - 1) * self.accumulate_s(plan, weights)
        work[6] += self.calibration.host_step_s
        work += (
            self._bubble(unit, stage, plan),
            self._p2p(shard, plan),
            self._dp(stage.seconds, plan, weights),
            self._optimizer(plan, owned := self.owned(unit, stage, plan)),
            self._offload(plan, owned),
        )
        return StepTime._make(work)

    def stage_weights(self, unit: Unit, stage: Stage, plan: ParallelPlan) -> float:
        """Parameters that a rank of ``stage`` holds."""
        weights = stage.dense * unit.dense_weights + stage.moe * unit.moe_weights
        return weights + self._table / plan.tp if stage.first or stage.last else weights

    def owned(self, unit: Unit, stage: Stage, plan: ParallelPlan) -> float:
        """Those of which a rank of ``stage`` has the optimizer state."""
        return owned_parameters(plan, self.stage_weights(unit, stage, plan), stage.moe * unit.expert_weights)

    def shard(self, plan: ParallelPlan) -> Shard:
        """What of a plan the time of one micro-batch depends on."""
        return Shard(
            plan.tp,
            plan.sp,
            plan.cp,
            plan.ep,
            plan.micro_batch,
            self.work.batch.seq,
            plan.recompute,
            plan.flash,
            plan.sequence_parallel,
            self._deepspeed and plan.tp > 1,
        )

    def unit(self, shard: Shard) -> Unit:
        """Times of one micro-batch for ``shard``, remembered."""
        blocks = self.blocks
        dense = blocks.time(shard, moe=False) if self._dense_layers else _NOTHING
        moe = blocks.time(shard, moe=True) if self._experts else _NOTHING
        embed, head = blocks.ends(shard)
        unit = Unit(
            dense,
            moe,
            embed,
            head,
            sum(dense),
            sum(moe),
            sum(embed),
            sum(head),
            blocks.weights(shard, moe=False) if self._dense_layers else 0.0,
            blocks.weights(shard, moe=True) if self._experts else 0.0,
            blocks.expert_weights(shard),
        )
        self._units[shard] = unit
        return unit

    def slowest(self, unit: Unit, plan: ParallelPlan) -> Stage:
        """The stage that needs most seconds; only kinds of stages are looked at, not every stage."""
        stages = plan.stages
        last = len(stages) - 1
        if last == 0:
            return self._stage(unit, 0, stages[0], first=True, last=True)
        found = self._stage(unit, 0, stages[0], first=True, last=False)
        end = self._stage(unit, sum(stages) - stages[-1], stages[-1], first=False, last=True)
        if end.seconds > found.seconds:
            found = end
        if last > 1:
            middle = self._middle(unit, stages)
            if middle.seconds > found.seconds:
                found = middle
        return found

    def _middle(self, unit: Unit, stages: tuple[int, ...]) -> Stage:
        """The slowest of the stages between the first and the last."""
        if not self._experts:
            return self._stage(unit, 0, max(stages[1:-1]), first=False, last=False)
        start, found = stages[0], None
        for blocks in stages[1:-1]:
            stage = self._stage(unit, start, blocks, first=False, last=False)
            if found is None or stage.seconds > found.seconds:
                found = stage
            start += blocks
            if start > self._dense_layers and blocks == max(stages[1:-1]):
                break
        assert found is not None
        return found

    def _stage(self, unit: Unit, start: int, blocks: int, *, first: bool, last: bool) -> Stage:
        dense = max(0, min(self._dense_layers - start, blocks)) if self._experts else blocks
        moe = blocks - dense
        seconds = dense * unit.dense_s + moe * unit.moe_s + first * unit.embed_s + last * unit.head_s
        return Stage(seconds, dense, moe, first, last)

    # --- what comes on top -----------------------------------------------------------------------------------------

    def whole_s(self, unit: Unit) -> float:
        """Seconds of one micro-batch through all stages, one after the other."""
        layers, dense = self.work.model.layers, self._dense_layers
        return dense * unit.dense_s + (layers - dense) * unit.moe_s + unit.embed_s + unit.head_s

    def unit_of(self, plan: ParallelPlan) -> Unit:
        """Times of one micro-batch of ``plan``."""
        shard = self.shard(plan)
        return self._units.get(shard) or self.unit(shard)

    def _bubble(self, unit: Unit, stage: Stage, plan: ParallelPlan) -> float:
        if plan.pp == 1:
            return 0.0
        rest = max(0.0, self.whole_s(unit) - stage.seconds)
        return rest / 3.0 if plan.schedule == "dualpipev" else rest / plan.vpp

    def _p2p(self, shard: Shard, plan: ParallelPlan) -> float:
        """Activations forward and their gradients back, in ``tp`` parts that are gathered on arrival.

        Published runs of DeepSpeed's engine are explained best by gradients that travel whole; newer versions can cut
        them, too (``grad_partitioned``).
        """
        if plan.pp == 1:
            return 0.0
        size = 2.0 * shard.tokens * self.work.model.hidden
        crosses = plan.world_size > self.network.domain
        forward = backward = send_s(self.network, size / plan.tp, crosses=crosses)
        if not plan.sequence_parallel:
            forward = backward = forward + gather_s(self.network, size, plan.tp)
        if self._deepspeed and not plan.sequence_parallel:  # with it, a shard holds its part only
            backward = send_s(self.network, size, crosses=crosses)
        count = plan.grad_accum * plan.vpp + plan.pp - 1
        return count * (forward + backward) * self.calibration.p2p_exposed

    def _dp(self, seconds: float, plan: ParallelPlan, weights: float) -> float:
        """Exposed reduction of gradients and gathering of parameters."""
        traffic = self.traffic(seconds, plan, weights)
        if not traffic.parts:
            return self.tied_s(plan)
        ranks, stride = plan.dp * plan.sp * plan.cp, plan.tp
        total = sum(one.times * gather_s(self.network, one.size, ranks, stride) for one in traffic.parts)
        return self._exposed(total, traffic.hiding_s) + self.tied_s(plan)

    def traffic(self, seconds: float, plan: ParallelPlan, weights: float) -> Traffic:
        """What the replicas of a stage exchange in a step, and the computation that it may run under.

        Args:
            seconds: Of one micro-batch on the stage.
            plan: The plan.
            weights: Parameters of a rank of the stage.
        """
        if plan.dp * plan.sp * plan.cp == 1:
            return Traffic((), 0.0)
        zero, accum = plan.zero_stage, plan.grad_accum
        grads = weights * self._grad_bytes[plan.grad_dtype]
        params = weights * self._itemsize
        if zero == 3 and plan.pp == 1:
            return Traffic((Part("parameters", 2 * accum, params), Part("gradients", accum, grads)), accum * seconds)
        rounds = accum if zero == 2 else 1
        reduces = rounds
        if zero == 1 and self._deepspeed:
            reduces *= 2  # DeepSpeed's stage 1 with a pipeline sums whole gradients before every rank takes its part
        if not zero:
            return Traffic((Part("gradients", 2, grads),), _BACKWARD * seconds)
        parts = (Part("gradients", reduces, grads), Part("parameters", 1, params))
        return Traffic(parts, _BACKWARD * seconds * rounds)

    def _exposed(self, seconds: float, hiding_s: float) -> float:
        """What is left of communication that may run under ``hiding_s`` of computation."""
        calibration = self.calibration
        if not calibration.dp_overlap:
            return seconds * calibration.dp_exposed / self.buckets
        share = calibration.dp_exposed
        return share * seconds + max(0.0, (1.0 - share) * seconds - hiding_s)

    def tied_s(self, plan: ParallelPlan) -> float:
        """The first and the last stage sum the gradients of the embedding that they share."""
        if plan.pp == 1 or not self.work.model.tied:
            return 0.0
        size = self._table / plan.tp * self._grad_bytes[plan.grad_dtype]
        return all_reduce_s(self.network, size, 2, max(1, plan.world_size // 2))

    def _optimizer(self, plan: ParallelPlan, owned: float) -> float:
        return 0.0 if plan.offload != "none" else moved_s(self.device, _OPTIMIZER_BYTES * owned)

    def accumulate_s(self, plan: ParallelPlan, weights: float) -> float:
        """Adding one micro-batch's gradients to the sum: written and read once, the sum read and written."""
        own = 0.0 if self.calibration.fused_gradients else 2.0 * self._itemsize
        return moved_s(self.device, (own + 2.0 * self._grad_bytes[plan.grad_dtype]) * weights)

    def _offload(self, plan: ParallelPlan, owned: float) -> float:
        """Gradients down, parameters up, the update in host memory; and what disks have to read and write for it."""
        if plan.offload == "none":
            return 0.0
        host = owned * sum(size for _, size in self.offloaded(plan)) / self.hardware.host_bandwidth
        return host + owned * sum(size for _, size in self.on_disks(plan)) / self.disk_bandwidth(plan)

    def offloaded(self, plan: ParallelPlan) -> offload.Parts:
        """Bytes per parameter that cross the link to the host in a step, or move at about its speed there."""
        return offload.host_parts(plan, self._grad_bytes[plan.grad_dtype], self._itemsize)

    def on_disks(self, plan: ParallelPlan) -> offload.Parts:
        """Bytes per parameter that are read from disks and written to them in a step."""
        return offload.disk_parts(plan, self._itemsize)

    def disk_bandwidth(self, plan: ParallelPlan) -> float:
        """Bytes per second of one rank."""
        return self.hardware.disk_bandwidth / offload.sharers(plan, self.work.cluster)

    # --- arithmetic, bands -------- ---------------------------------------------------------------------------------

    def flops(self, plan: ParallelPlan) -> tuple[float, float]:
        """Floating point operations of one step of the whole machine: of the model, and with recomputation."""
        shard = self.shard(plan)._replace(tp=1, sp=1, cp=1, ep=1, micro_batch=1)
        model, tokens = self.work.model, float(self.work.batch.tokens)
        dense = self.blocks.flops_per_token(shard, moe=False) * self._dense_layers
        moe = self.blocks.flops_per_token(shard, moe=True) * (model.layers - self._dense_layers) if self._experts else 0
        attention = self.blocks.attention_flops_per_token(shard) * model.layers
        blocks = dense + moe + attention
        again = {"none": 0.0, "full": blocks, "selective": 0.0 if plan.flash else attention}[plan.recompute]
        useful = 3.0 * (blocks + 2.0 * self._table)
        return useful * tokens, (useful + again) * tokens

    def band(self, plan: ParallelPlan, step_s: float) -> tuple[float, float, tuple[str, ...]]:
        """The 90 % band around ``step_s``, and what it may not be trusted about."""
        return calibrations.band(self.calibration, self.work, plan, step_s)

    def explain(self, plan: ParallelPlan) -> tuple[Term, ...]:
        """The arithmetic of every kind, in words and numbers."""
        return explain(self, plan)


_NOTHING = BlockTime()

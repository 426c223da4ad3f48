"""Bytes of memory of every rank at its peak, by kind, from the plan alone.

The peak of a rank is what it always holds (model state, buffers, the context of the device) plus the larger of two
moments: the backward pass of a block, while other micro-batches wait, and, on the stage with the output layer, the
loss. Model state is exact (:mod:`strategies.model_state`), activations are sums over operations
(:mod:`strategies.activations`), buffers follow from what the frameworks allocate (:mod:`strategies.buffers`). What none
of them knows is in :data:`OVERHEADS`; :data:`FITTED` lists all fitted constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from strategies import activations, buffers, counts
from strategies.activations import BlockBytes, Cut
from strategies.counts import rank_parameters, stage_parameters
from strategies.memory_terms import terms
from strategies.model_state import DTYPE_BYTES, State, least_state, model_state_bytes, stage_state
from strategies.plan import GradDtype, Offload, ParallelPlan
from strategies.tensors import TensorSpec, block_tensors, head_stage, padded, stage_tensors
from strategies.workload import Framework, Term, Workload

__all__ = [
    "DTYPE_BYTES",
    "FITTED",
    "OVERHEADS",
    "Memory",
    "Overhead",
    "StageMemory",
    "TensorSpec",
    "block_tensors",
    "model_state_bytes",
    "padded",
    "rank_parameters",
    "stage_parameters",
    "stage_tensors",
]

_GIB = 2**30


class StageMemory(NamedTuple):
    """Bytes of one rank of a stage at its peak, by kind; their sum is the peak.

    Attributes:
        weights: Weights.
        gradients: Gradients that wait for the optimizer.
        optimizer: Moments and master copy.
        activations: Of all micro-batches in flight, and the working set of one block where it exceeds the logits.
        logits: Output layer and loss of one micro-batch.
        gathered: Weights and gradients that ZeRO-3 has whole for a moment.
        buffers: Of collectives, of the optimizer's step and of the pipeline.
        context: The device's context, its libraries and their workspaces.
        fragmentation: What the allocator holds and cannot use.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    gathered: float
    buffers: float
    context: float
    fragmentation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """What no formula knows.

    Attributes:
        context: Bytes of the CUDA context, NCCL's communicators and cuBLAS' workspaces.
        fragmentation: What the allocator holds beside activations and logits, as a part of them.
    """

    context: float
    fragmentation: float


OVERHEADS: dict[Framework, Overhead] = {
    "megatron": Overhead(context=1.5 * _GIB, fragmentation=0.01),
    "mcore": Overhead(context=2.0 * _GIB, fragmentation=0.03),
    "fsdp": Overhead(context=1.0 * _GIB, fragmentation=0.0),
}
"""Both of ``megatron`` and of ``fsdp`` are fitted (:data:`FITTED`): chosen by hand, round values that leave small
errors on the published runs that have a memory column. ``mcore`` is assumed: its one run tells what tensors took, not
what the process held."""

FITTED: dict[str, int] = {
    "megatron context": 27,
    "megatron fragmentation": 27,
    "megatron buckets": 27,
    "fsdp context": 13,
    "fsdp fragmentation": 13,
}
"""Fitted constants of memory, and the published runs each was fitted on; the number of DeepSpeed's buckets is in
:mod:`strategies.buffers`."""


class Layout(NamedTuple):
    """What one stage holds whatever the micro-batch is.

    Attributes:
        stage: Index of the stage.
        state: Model state on the device.
        parameters: Of the rank.
        dense: Blocks with a plain feed-forward part.
        mixed: Blocks with experts.
        head: The output layer is here.
        gathered: Bytes that ZeRO-3 has whole for a moment.
        copies: Bytes of gradients beside those that wait for the optimizer.
        reusing: Bytes of such copies that lie where activations were.
    """

    stage: int
    state: State
    parameters: int
    dense: int
    mixed: int
    head: bool
    gathered: float
    copies: float
    reusing: float


class MicroBatch(NamedTuple):
    """What one micro-batch takes, whatever the stage is.

    Attributes:
        at: How it is cut.
        dense: Of one block with a plain feed-forward part.
        mixed: Of one block with experts.
        first: Of the embedding, per micro-batch in flight.
        every: Of every stage, per micro-batch in flight.
        loss: Of output layer and loss.
        buffers: Of what is on its way to other ranks.
    """

    at: Cut
    dense: BlockBytes
    mixed: BlockBytes
    first: float
    every: float
    loss: float
    buffers: float


class Memory:
    """Memory of plans of one workload; terms that plans share are computed once."""

    def __init__(self, work: Workload) -> None:
        """Prepare for plans of ``work``."""
        self.work = work
        on_device = work.cluster.device.lower() != "cpu"
        self.overhead = OVERHEADS[work.framework] if on_device else Overhead(context=0.0, fragmentation=0.0)
        self._kernels = activations.kernels(work.model, work.precision, work.framework)
        self._layouts: dict[tuple[object, ...], dict[int, Layout]] = {}
        self._worst: dict[tuple[object, ...], tuple[Layout, ...]] = {}
        self._micro_batches: dict[tuple[object, ...], MicroBatch] = {}
        self._floors: dict[tuple[object, ...], float] = {}

    def stage(self, plan: ParallelPlan, stage: int) -> StageMemory:
        """Bytes of one rank of a pipeline stage at its peak."""
        return self._at_peak(plan, self.layout(plan, stage), self.micro_batch(plan))

    def peak(self, plan: ParallelPlan) -> float:
        """Bytes of the rank that needs most; looks only at stages of which one must need most."""
        key = _layout_key(plan)
        worst = self._worst.get(key)
        if worst is None:
            worst = self._worst[key] = tuple(self.layout(plan, stage) for stage in self.kinds(plan))
        batch = self.micro_batch(plan)
        return max([sum(self._at_peak(plan, layout, batch)) for layout in worst])

    def budget(self) -> float:
        """Bytes that a rank may use; infinite when the memory of the device is not known."""
        return float(self.work.cluster.device_memory_bytes) or math.inf

    def floor(
        self,
        *,
        tp: int,
        pp: int,
        replicas: int,
        ep: int = 1,
        zero_stage: int = 3,
        grad_dtype: GradDtype | None = None,
        offload: Offload = "none",
    ) -> float:
        """A lower bound of :meth:`peak` for every plan with these degrees, in constant time.

        The context, and the mean over the stages of the model state without padding: some stage holds at least the
        mean. It does not grow with ``pp`` or ``replicas``.

        Args:
            tp: Tensor-parallel degree.
            pp: Number of stages.
            replicas: Ranks that hold the same weights, ``dp x sp x cp``.
            ep: Expert-parallel degree.
            zero_stage: ZeRO stage; 3, the default, bounds the others too.
            grad_dtype: Precision of the gradients; None bounds them all.
            offload: What lives in host memory.
        """
        key = (tp, pp, replicas, ep, zero_stage, grad_dtype, offload)
        found = self._floors.get(key)
        if found is None:
            work = self.work
            whole = least_state(work.model, work.precision, work.framework, tp, ep, replicas, zero_stage, grad_dtype)
            found = self._floors[key] = self.overhead.context + sum(_on_device(whole, offload, zero_stage)) / pp
        return found

    def kinds(self, plan: ParallelPlan) -> tuple[int, ...]:
        """Stages of which one must need most: the first, the last, and the first of each other number of blocks.

        Of stages with equal blocks the earliest has most micro-batches in flight.
        """
        seen: dict[tuple[int, int], int] = {}
        for stage in range(1, plan.pp - 1):
            seen.setdefault((plan.stages[stage], counts.expert_blocks(self.work.model, plan, stage)), stage)
        return tuple(sorted({0, plan.pp - 1, *seen.values()}))

    def explain(self, plan: ParallelPlan, stage: int) -> tuple[Term, ...]:
        """The arithmetic of every kind, in words and in numbers."""
        return terms(self, plan, stage)

    def layout(self, plan: ParallelPlan, stage: int) -> Layout:
        """What a stage holds whatever the micro-batch is."""
        stages = self._layouts.setdefault(_layout_key(plan), {})
        found = stages.get(stage)
        if found is None:
            found = stages[stage] = self._layout(plan, stage)
        return found

    def _layout(self, plan: ParallelPlan, stage: int) -> Layout:
        work = self.work
        count = counts.stage_count(work.model, plan, stage)
        state = stage_state(work.model, plan, work.precision, work.framework, stage, count)
        mixed = counts.expert_blocks(work.model, plan, stage)
        copies, reusing = buffers.gradient_copies(work, plan, count)
        return Layout(
            stage=stage,
            state=_on_device(state, plan.offload, plan.zero_stage),
            parameters=count.total,
            dense=plan.stages[stage] - mixed,
            mixed=mixed,
            head=stage == head_stage(plan),
            gathered=buffers.gathered(work, plan, count, plan.stages[stage]),
            copies=copies,
            reusing=reusing,
        )

    def micro_batch(self, plan: ParallelPlan) -> MicroBatch:
        """What one micro-batch takes, whatever the stage is."""
        key = (
            *(plan.tp, plan.sp, plan.cp, plan.micro_batch, plan.recompute, plan.flash, plan.sequence_parallel),
            *(plan.ep > 1, plan.pp > 1, plan.grad_accum),
        )
        found = self._micro_batches.get(key)
        if found is None:
            found = self._micro_batches[key] = self._micro_batch(plan)
        return found

    def _micro_batch(self, plan: ParallelPlan) -> MicroBatch:
        work, code = self.work, self._kernels
        at = activations.cut(plan, work.batch.seq, work.precision)
        dense = activations.block_bytes(work.model, plan, at, code, dense=True)
        mixed = activations.block_bytes(work.model, plan, at, code, dense=False) if work.model.moe else dense
        stream = at.tokens * work.model.hidden / at.whole
        mask = activations.masks(plan, at) if work.packing else BlockBytes(0.0, 0.0)
        return MicroBatch(
            at=at,
            dense=dense._replace(working=dense.working + mask.working),
            mixed=mixed._replace(working=mixed.working + mask.working),
            first=8.0 * at.tokens + stream * code.dropout,  # token numbers, the mask of the embedding's dropout
            # DeepSpeed and torch keep the output of a stage, Megatron-Core frees it
            every=mask.kept + (at.width * stream if plan.pp > 1 and work.framework != "mcore" else 0.0),
            loss=activations.logit_bytes(work.model, at, code),
            buffers=buffers.in_transit(work, plan, at),
        )

    def _at_peak(self, plan: ParallelPlan, layout: Layout, batch: MicroBatch) -> StageMemory:
        kept = layout.dense * batch.dense.kept + layout.mixed * batch.mixed.kept + batch.every
        if layout.stage == 0:
            kept += batch.first
        working = max(batch.dense.working if layout.dense else 0.0, batch.mixed.working if layout.mixed else 0.0)
        loss = batch.loss if layout.head else 0.0
        acts = kept * activations.in_flight(plan, layout.stage) + max(0.0, working - loss)
        passing = acts + loss
        copies = layout.copies + max(0.0, layout.reusing - passing)
        weights, gradients, optimizer = layout.state
        context, part = self.overhead.context, self.overhead.fragmentation
        return StageMemory(
            weights, gradients, optimizer, acts, loss, layout.gathered, copies + batch.buffers, context, part * passing
        )


def _layout_key(plan: ParallelPlan) -> tuple[object, ...]:
    return (
        *(plan.tp, plan.pp, plan.dp, plan.sp, plan.cp, plan.ep, plan.zero_stage),
        *(plan.stages, plan.schedule, plan.grad_dtype, plan.offload),
    )


def _on_device(state: State, offload: Offload, zero_stage: int) -> State:
    """Without what is in the host's memory, as in DeepSpeed: weights go there under ZeRO-3 only.

    ZeRO-2 and 3 move gradients there as buckets are reduced and add up micro-batches there (``stage_1_and_2.py``,
    ``copy_grads_in_partition``; ``stage3.py``, ``grad_partitions_flat_buffer``). ZeRO-1 reduces at the last micro-batch
    only and keeps whole gradients on the device until then.
    """
    weights = 0 if offload == "optimizer+params" and zero_stage == 3 else state.weights
    if offload == "none":
        return State(weights, state.gradients, state.optimizer)
    return State(weights, 0 if zero_stage >= 2 else state.gradients, 0)

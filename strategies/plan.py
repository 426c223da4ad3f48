"""The plan: one value from dry run to recovery."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["1f1b", "interleaved", "dualpipev"]
Recompute = Literal["none", "selective", "full"]
GradDtype = Literal["fp32", "bf16", "fp16"]
Balance = Literal["blocks", "parameters", "time"]
"""What stages are even in (:mod:`strategies.balance`)."""

Offload = Literal["none", "optimizer", "optimizer+params"]

PLAN_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelPlan:
    """How one model is spread over ranks. All degrees are counts of ranks unless said otherwise.

    Attributes:
        tp: Tensor-parallel degree.
        pp: Number of pipeline stages.
        dp: Number of data-parallel replicas.
        ep: Expert-parallel degree, inside ``dp``.
        sp: Sequence-parallel degree (Ulysses).
        cp: Context-parallel degree (ring attention).
        zero_stage: ZeRO stage over the data-parallel ranks.
        schedule: Pipeline schedule.
        vpp: Virtual stages per rank (interleaved schedule).
        stages: Transformer blocks per pipeline stage, first to last; sums to the number of layers.
        micro_batch: Sequences per replica and forward pass.
        grad_accum: Forward passes per replica and optimizer step.
        grad_dtype: Precision in which gradients are accumulated.
        recompute: Activation checkpointing.
        offload: What lives in host memory.
        offload_path: Folder on local disks (NVMe) that it lives in instead; empty for host memory.
        flash: Fused attention that never stores the score matrix.
        sequence_parallel: Megatron's: norms and residuals are split over the tensor-parallel ranks, along the sequence.
        version: Version of this document.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    sp: int = 1
    cp: int = 1
    zero_stage: int = 0
    schedule: Schedule = "1f1b"
    vpp: int = 1
    stages: tuple[int, ...]
    micro_batch: int
    grad_accum: int
    grad_dtype: GradDtype = "fp32"
    recompute: Recompute = "none"
    offload: Offload = "none"
    offload_path: str = ""
    flash: bool = True
    sequence_parallel: bool = False
    version: int = PLAN_VERSION

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp * self.sp * self.cp

    @property
    def rows_per_step(self) -> int:
        """Rows (sequences) that all replicas process in one step, padding rows included."""
        return self.micro_batch * self.grad_accum * self.dp

    @property
    def least_accumulation(self) -> int:
        """Micro-batches without which the schedule cannot run: DualPipeV keeps two streams of them in flight."""
        return 2 * self.pp if self.schedule == "dualpipev" and self.pp > 1 else 1

    @property
    def parts(self) -> tuple[int, ...]:
        """Blocks of every part of the pipeline, in the order of the model.

        Under DualPipeV the layers run down through the stages and up again: stage ``r`` has the parts ``r`` and
        ``2 pp - 1 - r``, the surplus block of an odd number in the first. Else parts are stages.
        """
        if self.least_accumulation == 1:
            return self.stages
        return (*((blocks + 1) // 2 for blocks in self.stages), *(blocks // 2 for blocks in reversed(self.stages)))

    def describe(self) -> str:
        """One short line, for tables: ``TP2 x PP2 x DP2 ZeRO-1, micro-batch 1 x 4``."""
        axes = [("TP", self.tp), ("PP", self.pp), ("DP", self.dp), ("EP", self.ep), ("SP", self.sp), ("CP", self.cp)]
        degrees = " x ".join(f"{name}{size}" for name, size in axes if size > 1) or "1 rank"
        return f"{degrees} ZeRO-{self.zero_stage}, micro-batch {self.micro_batch} x {self.grad_accum}"


def split_layers(layers: int, pp: int) -> tuple[int, ...]:
    """Spread ``layers`` blocks over ``pp`` stages as evenly as possible, the longer stages in the middle.

    The first and last stages carry the embedding and the head, so they are the last to get a surplus block.
    """
    base, surplus = divmod(layers, pp)
    by_room = sorted(range(pp), key=lambda stage: abs(stage - (pp - 1) / 2))
    longer = set(by_room[:surplus])
    return tuple(base + (stage in longer) for stage in range(pp))


def accumulation(global_batch: int, micro_batch: int, dp: int) -> int:
    """Forward passes per replica so that every sequence of the global batch has a row."""
    return math.ceil(global_batch / (micro_batch * dp))

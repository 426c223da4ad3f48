"""What an estimate is about: one model, one batch, one machine, one arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from strategies.errors import ConfigError
from strategies.hardware import Hardware
from strategies.plan import ParallelPlan
from strategies.saving import BEST, Saving
from strategies.schedule import SampleSchedule
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec, Precision

Framework = Literal["megatron", "mcore", "fsdp"]
"""Families of training code that differ in kernels and overlap, and so in their calibration.

``megatron``: Megatron-LM and Megatron-DeepSpeed, the relatives of what phalanx runs. ``mcore``: Megatron-Core with
Transformer Engine. ``fsdp``: PyTorch's fully sharded data parallelism.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The fixed part of an estimate; the plan is what varies.

    Attributes:
        model: The model.
        batch: The work of one step.
        cluster: The machine.
        precision: Arithmetic of forward and backward.
        framework: Family of the training code.
        deepspeed: A ``megatron`` workload has the costs of Megatron-DeepSpeed as published runs of 2021 and 2022 show
            them (BLOOM-176B): shards that wait for each other, reduction in buckets. False: those of Megatron-LM.
        tokens: Tokens of the whole run; 0 when unknown: then there is no finish date.
        saving: What the run is told about its checkpoints. Plans are compared with the best intervals of each.
        packing: Documents in a sequence are kept apart, by a mask of every sequence.
    """

    model: ModelSpec
    batch: BatchSpec
    cluster: ClusterSpec
    precision: Precision
    framework: Framework = "megatron"
    deepspeed: bool = False
    tokens: float = 0.0
    saving: Saving = BEST
    packing: bool = False

    @property
    def hardware(self) -> Hardware:
        """The hardware of the cluster. Raises ConfigError when it is not known."""
        if self.cluster.hardware is None:
            raise ConfigError(
                f"The cluster '{self.cluster.name}' says nothing about its hardware, so there is no time to predict.",
                hint="phalanx cluster probe measures it; cluster=a100_80 and others come with figures",
            )
        return self.cluster.hardware

    def step_count(self, plan: ParallelPlan) -> float:
        """Steps of the full batch that take as long as all steps of the run.

        A smaller step of a ramp takes as long as its micro-batches do, with the pipeline's fill and drain.
        """
        if self.batch.ramp is None:
            return math.ceil(self.tokens / self.batch.tokens)
        schedule = SampleSchedule.of(self.batch)
        end = schedule.steps_for(math.ceil(self.tokens / self.batch.seq)) + 1
        begins = [1, *(change.step for change in schedule.changes)]
        drain = (plan.pp - 1) / plan.vpp
        return sum(
            max(0, min(until, end) - since) * (schedule.micro_batches(since, plan) + drain) / (plan.grad_accum + drain)
            for since, until in zip(begins, [*begins[1:], end], strict=True)
        )


def run_tokens(batch: BatchSpec, steps: int) -> int:
    """Tokens that a run of ``steps`` steps trains on."""
    return SampleSchedule.of(batch).trained(steps + 1) * batch.seq


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One line of arithmetic, for people who want to check a number.

    Attributes:
        kind: What the number is: a kind of time or of memory.
        value: The number.
        unit: ``s`` or ``bytes``.
        formula: The arithmetic in words.
        numbers: The same with its numbers.
    """

    kind: str
    value: float
    unit: str
    formula: str
    numbers: str

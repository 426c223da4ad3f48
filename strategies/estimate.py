"""One plan on one machine: memory, time, failures and money, with the assumptions that the numbers rest on.

The parts are :mod:`strategies.memory`, :mod:`strategies.timing` and :mod:`strategies.reliability`; this module puts
them together and judges. Searching works on the plain floats of :meth:`Estimator.objective`; a :class:`CostEstimate` is
made only of what somebody will read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from strategies import capabilities
from strategies.memory import Memory, StageMemory
from strategies.plan import ParallelPlan
from strategies.reliability import Outlook, billed_nodes, checkpoint_bytes, outlook, plan_goodput, plan_process
from strategies.timing import StepTime, Timing
from strategies.workload import Workload

Objective = Literal["goodput", "time", "cost", "memory"]
"""What the best plan is best at: tokens per second that survive failures, seconds per step without failures, dollars
per token that survives failures, or bytes per rank (then seconds)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CostEstimate:
    """Everything that the planner says about one plan.

    Attributes:
        plan: The plan.
        runnable: phalanx can run it; False means that it can be modelled only.
        modelled_reason: Why it cannot be run; empty if it can.
        step: Seconds on the critical path of one optimizer step, by kind.
        step_s: Their sum.
        low_s: Lower end of the 90 % band of ``step_s``.
        high_s: Upper end.
        stages: Bytes of one rank of every pipeline stage at its peak, by kind.
        peak_bytes: Of the rank that needs most.
        budget_bytes: What a rank may use; infinite when the device's memory is unknown.
        tokens_per_s: Of the whole machine, without failures.
        mfu: Model FLOPs per second over the peak of the ranks in use.
        hfu: The same with recomputation counted as work.
        outlook: Failures, checkpoints, goodput, finish and cost.
        warnings: What the numbers cannot be trusted about.
    """

    plan: ParallelPlan
    runnable: bool
    modelled_reason: str
    step: StepTime
    step_s: float
    low_s: float
    high_s: float
    stages: tuple[StageMemory, ...]
    peak_bytes: float
    budget_bytes: float
    tokens_per_s: float
    mfu: float
    hfu: float
    outlook: Outlook
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Every rank stays within its memory."""
        return self.peak_bytes <= self.budget_bytes

    @property
    def surviving_tokens_per_s(self) -> float:
        """Tokens per second that survive failures: what plans are ranked by."""
        return self.tokens_per_s * self.outlook.goodput


class Estimator:
    """Estimates plans of one workload; terms that plans share are computed once."""

    def __init__(self, work: Workload) -> None:
        """Prepare for plans of ``work``. Raises ConfigError when its cluster has no hardware figures."""
        self.work = work
        self.timing = Timing(work)
        self.memory = Memory(work)
        self._checkpoint_bytes = checkpoint_bytes(work.model)

    def estimate(self, plan: ParallelPlan) -> CostEstimate:
        """Everything about one legal plan, whether it fits or not."""
        work, step = self.work, self.timing.step(plan)
        step_s = sum(step)
        low_s, high_s, warnings = self.timing.band(plan, step_s)
        stages = tuple(self.memory.stage(plan, stage) for stage in range(plan.pp))
        verdict = capabilities.runnable(plan, work.precision, work.model)
        modelled = verdict.message if verdict else ""
        model_flops, hardware_flops = self.timing.flops(plan)
        peak = self._peak_flops() * plan.world_size * step_s
        return CostEstimate(
            plan=plan,
            runnable=not modelled,
            modelled_reason=modelled,
            step=step,
            step_s=step_s,
            low_s=low_s,
            high_s=high_s,
            stages=stages,
            peak_bytes=max(sum(stage) for stage in stages),
            budget_bytes=self.memory.budget(),
            tokens_per_s=work.batch.tokens / step_s,
            mfu=model_flops / peak,
            hfu=hardware_flops / peak,
            outlook=outlook(work, plan, step_s, self._checkpoint_bytes, (low_s, high_s)),
            warnings=tuple(warnings),
        )

    def objective(self, plan: ParallelPlan, objective: Objective) -> float:
        """What a search minimises, as one number; it does not look at whether the plan fits."""
        if objective == "memory":
            return self.memory.peak(plan)
        return self.score(plan, sum(self.timing.step(plan)), objective)

    def score(self, plan: ParallelPlan, step_s: float, objective: Objective) -> float:
        """Seconds per step, surviving seconds per step, or dollars per surviving step, of a plan of known speed."""
        if objective == "time":
            return step_s
        surviving_s = step_s / plan_goodput(self.work, plan, step_s, self._checkpoint_bytes)
        if objective == "goodput":
            return surviving_s
        devices = billed_nodes(self.work, plan) * self.work.cluster.slots_per_node
        return surviving_s * devices * self.work.hardware.price_per_device_hour / 3600

    def _peak_flops(self) -> float:
        """Dense operations per second of one device in 16 bit (fp32 for fp32): the convention of MFU."""
        hardware = self.work.hardware
        if self.work.precision == "fp8":
            return hardware.flops_fp8 or hardware.flops_16
        return hardware.flops_fp32 if self.work.precision == "fp32" else hardware.flops_16


def best_disk_steps(work: Workload, plan: ParallelPlan) -> int:
    """Steps between two saves to disk that lose least, with the saves to memory that the run is told to make.

    Raises:
        ConfigError: The cluster has no hardware figures, or no bandwidth to the storage or the host.
    """
    step_s = sum(Timing(work).step(plan))
    what, _ = plan_process(work, plan, step_s, saving=work.saving._replace(disk_steps=None))
    return round(what.rounded(step_s).disk_s / step_s)

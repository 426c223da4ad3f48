"""Rules about state that lives beside the device: what DeepSpeed can move, by ZeRO stage."""

from __future__ import annotations

from strategies.cases import Case, Rule
from strategies.errors import Violation
from strategies.remedy import hint_of, offered


def offload_needs_zero(case: Case) -> Violation | None:
    """DeepSpeed moves what ZeRO cuts: the optimizer's state from stage 1 on, parameters in stage 3 only."""
    plan = case.plan
    if plan.offload == "none" or not case.engine:
        return None
    least = 3 if plan.offload == "optimizer+params" else 1
    if plan.zero_stage >= least:
        return None
    what, stages = ("parameters", "3") if least == 3 else ("the optimizer's state", "1, 2 and 3")
    rule, stage = "offload_needs_zero", (f"strategy.zero_stage={least}", {"zero_stage": least})
    others = ("strategy.offload=optimizer", {"offload": "optimizer"}), ("strategy.offload=none", {"offload": "none"})
    return Violation(
        rule=rule,
        message=f"offload {plan.offload} with zero_stage {plan.zero_stage}: DeepSpeed moves {what} in stage {stages}",
        hint=hint_of(offered(case, rule, stage, *others[least != 3 :])),
    )


def disks_need_zero_three(case: Case) -> Violation | None:
    """Only ZeRO-3 swaps state to disks."""
    plan = case.plan
    if not plan.offload_path or plan.offload == "none" or not case.engine or plan.zero_stage == 3:
        return None
    rule, memory = "disks_need_zero_three", ("strategy.offload_path=null (host memory)", {"offload_path": ""})
    return Violation(
        rule=rule,
        message=f"offload_path {plan.offload_path} with zero_stage {plan.zero_stage}: only ZeRO-3 swaps state to disks",
        hint=hint_of(offered(case, rule, ("strategy.zero_stage=3", {"zero_stage": 3}), memory)),
    )


OFFLOAD_RULES: tuple[Rule, ...] = (offload_needs_zero, disks_need_zero_three)
"""In the order in which they are reported."""

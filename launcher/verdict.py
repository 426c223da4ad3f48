"""What is said about a given plan besides its numbers: whether it fits with a margin, and what beats it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.quantities import gain, percent, span, storage
from strategies.plan import ParallelPlan
from strategies.workload import Workload

MEMORY_ERROR = 0.07
"""How far predicted memory is off, as a fraction: about the mean over the published runs (``plan --validate``)."""

_ENOUGH = 0.01
"""A step that is shorter by less than this fraction beats nothing: predictions are not that good."""


def tight(estimate: Mapping[str, Any]) -> bool:
    """Whether a plan that fits would not if it took more than predicted, by the usual error of the prediction.

    Args:
        estimate: The ``estimate`` of ``plan --json``.
    """
    memory = estimate["memory"]
    return bool(estimate["fits"]) and _near(memory["peak_bytes"], memory["budget_bytes"])


def _near(peak: float, budget: float | None) -> bool:
    return budget is not None and peak * (1 + MEMORY_ERROR) > budget


def tight_text(estimate: Mapping[str, Any]) -> str:
    """The verdict on the memory of a plan that fits tightly."""
    memory = estimate["memory"]
    return (
        f"fits tightly ({storage(memory['peak_bytes'])} per rank of {storage(memory['budget_bytes'])}; "
        f"the prediction errs by {percent(MEMORY_ERROR, 0)})"
    )


def fastest(work: Workload, plan: ParallelPlan, estimate: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan with the shortest step that fits, proven by a search; None if nothing fits.

    A plan that phalanx runs is compared with plans that it runs, another one with all; gradients are summed as in the
    plan, because 16-bit sums change the numbers that training gives.

    Args:
        work: Model, batch and machine.
        plan: The given plan.
        estimate: Its ``estimate``, as in ``plan --json``.

    Returns:
        The plan in the words of a ranking; ``faster`` is the fraction of steps that it makes more per second.
    """
    from launcher.auto import senseless, summary
    from strategies.search import search
    from strategies.space import Space

    fixed = {"grad_dtype": plan.grad_dtype, **senseless(work.cluster)}
    space = Space(work, fixed, runnable_only=estimate["runnable"])
    found = search(work, objective="time", top=1, space=space).ranked
    if not found:
        return None
    best = summary(found[0])
    kept = ("plan", "plan_text", "overrides", "runnable", "modelled_reason", "step_s", "peak_bytes")
    faster = estimate["time"]["step_s"] / best["step_s"] - 1
    return {name: best[name] for name in kept} | {"faster": faster, "among_runnable": estimate["runnable"]}


def fastest_text(estimate: Mapping[str, Any]) -> str:
    """One line: what beats the plan, or that nothing does; empty if nobody has looked.

    Args:
        estimate: The ``estimate`` of ``plan --json``.
    """
    best = estimate.get("fastest")
    if best is None:
        return ""
    numbers = f"{span(best['step_s'])}, {storage(best['peak_bytes'])} per rank"
    numbers += "; fits tightly" if _near(best["peak_bytes"], estimate["memory"]["budget_bytes"]) else ""
    numbers += "" if best["runnable"] else "; modelled only"
    if not estimate["fits"]:
        return f"the fastest plan that fits: {best['plan_text']} ({numbers})"
    if best["faster"] <= _ENOUGH:
        which = "plan that phalanx runs" if best["among_runnable"] else "plan"
        return f"no {which} has a step that is more than {percent(_ENOUGH, 0)} faster"
    return f"beaten by {best['plan_text']} ({gain(best['faster']).removeprefix('+')} faster step: {numbers})"

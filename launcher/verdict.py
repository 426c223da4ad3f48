"""What is said about a given plan besides its numbers: whether it fits with a margin, and what beats it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.quantities import percent, span, storage

MEMORY_ERROR = 0.07
"""How far predicted memory is off, as a fraction: about the mean over the published runs (``plan --validate``)."""

_ENOUGH = 0.01
"""A plan that is better by less than this fraction beats nothing: predictions are not that good."""

BEST_AT = {
    "goodput": "tokens per second that survive failures",
    "time": "seconds per step without failures",
    "cost": "dollars per token that survives failures",
    "memory": "bytes per rank",
}
"""What plans are best by, of each objective."""


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


def best_text(estimate: Mapping[str, Any]) -> str:
    """One line: what beats the plan, or that nothing does; empty if nobody has looked.

    Args:
        estimate: The ``estimate`` of ``plan --json``.
    """
    best = estimate.get("best")
    if best is None:
        return ""
    numbers = f"{span(best['step_s'])} per step, {storage(best['peak_bytes'])} per rank"
    numbers += "; fits tightly" if _near(best["peak_bytes"], estimate["memory"]["budget_bytes"]) else ""
    numbers += "" if best["runnable"] else "; modelled only"
    numbers += "".join(f"; {one}" for one in best["warnings"])
    measure = BEST_AT[best["objective"]]
    if not estimate["fits"]:
        return f"the best plan that fits, by {measure}: {best['plan_text']} ({numbers})"
    among = f"compared with {contenders_text(best)}"
    if best["better"] <= _ENOUGH:
        return f"no other plan is more than {percent(_ENOUGH, 0)} better in {measure} ({among})"
    gained = f"{percent(best['better'], 0)} better in {measure}"
    return f"beaten by {best['plan_text']} ({gained}: {numbers}; {among})"


def contenders_text(found: Mapping[str, Any]) -> str:
    """Which plans a search looked at.

    Args:
        found: With ``among_runnable``, and ``fixed``: the knobs that had one value.
    """
    named = {"grad_dtype": "gradients in", "offload": "offload"}
    words = [f"{named.get(name, name)} {value}" for name, value in found["fixed"].items()]
    which = "the plans that phalanx runs" if found["among_runnable"] else "all plans, modelled ones too"
    return which + (f", with {', '.join(words)}" if words else "")

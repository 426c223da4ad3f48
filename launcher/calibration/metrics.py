"""How well predictions agree with measurements, as a few plain numbers. Pure.

An *error* is signed and relative to the measurement: (predicted - measured) / measured. Fractions, not percent.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypedDict

MISSING = -1.0
"""Error of a prediction that was not made: as if it had been zero."""


class Agreement(TypedDict):
    """Errors of many predictions; None where there are none.

    ``mape`` is the mean of their sizes, ``median`` the median of their sizes, ``bias`` their mean with sign, ``under``
    and ``over`` the outermost ones.
    """

    n: int
    mape: float | None
    median: float | None
    bias: float | None
    under: float | None
    over: float | None


class Verdicts(TypedDict):
    """Runs that fitted and that ran out of memory, by whether the planner said so."""

    fit_right: int
    fit_wrong: int
    oom_right: int
    oom_wrong: int


def agreement(errors: Sequence[float]) -> Agreement:
    """Summary of signed relative errors."""
    if not errors:
        return {"n": 0, "mape": None, "median": None, "bias": None, "under": None, "over": None}
    sizes = [abs(error) for error in errors]
    return {
        "n": len(errors),
        "mape": statistics.fmean(sizes),
        "median": statistics.median(sizes),
        "bias": statistics.fmean(errors),
        "under": min(errors),
        "over": max(errors),
    }


def verdicts(pairs: Sequence[tuple[bool, bool]]) -> Verdicts:
    """Count ``(fitted, judged right)`` pairs."""
    counts: Verdicts = {"fit_right": 0, "fit_wrong": 0, "oom_right": 0, "oom_wrong": 0}
    for fitted, right in pairs:
        if fitted:
            counts["fit_right" if right else "fit_wrong"] += 1
        else:
            counts["oom_right" if right else "oom_wrong"] += 1
    return counts


def ranks(values: Sequence[float]) -> list[float]:
    """Rank of every value, from 1; equal values share the mean of their ranks."""
    order = sorted(values)
    first = {value: order.index(value) for value in set(order)}
    return [first[value] + (order.count(value) + 1) / 2 for value in values]


def spearman(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Rank correlation; None where one side has no order."""
    if len(predicted) < 2 or len(set(predicted)) < 2 or len(set(measured)) < 2:
        return None
    return statistics.correlation(ranks(predicted), ranks(measured))

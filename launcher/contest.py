"""What a given plan is compared with: one search, whose best plan is the only one that is named beside it.

Text, JSON and page take it from here, and ``strategy=auto`` finds the same: the objective is the configuration's, a
plan that phalanx runs is compared with plans that it runs, another one with all, and gradients are summed as in the
plan, because 16-bit sums change the numbers that training gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strategies.codec import to_json
from strategies.estimate import CostEstimate, Estimator, Objective
from strategies.search import SearchResult, search
from strategies.space import Space


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """A search around a given plan.

    Attributes:
        space: What was searched.
        result: What was found.
    """

    space: Space
    result: SearchResult


def contest(estimator: Estimator, estimate: CostEstimate, objective: Objective) -> Contest:
    """Search for what beats a plan.

    Args:
        estimator: What made ``estimate``.
        estimate: That of the given plan.
        objective: What a plan shall be best at.
    """
    from launcher.auto import senseless

    work = estimator.work
    fixed = {"grad_dtype": estimate.plan.grad_dtype, **senseless(work.cluster)}
    space = Space(work, fixed, runnable_only=estimate.runnable)
    return Contest(space=space, result=search(work, objective=objective, top=1, space=space, estimator=estimator))


def best_document(estimator: Estimator, estimate: CostEstimate, found: Contest) -> dict[str, Any] | None:
    """The best plan that fits, in the words of a ranking; None if nothing fits.

    ``better`` is the fraction by which the objective of the given plan is worse: 0.1 is 10 % fewer tokens per second
    that survive failures (goodput), steps per second (time) or tokens per dollar (cost), or 10 % more bytes (memory).
    ``warnings`` are those that the given plan does not have.

    Args:
        estimator: What made ``estimate``.
        estimate: That of the given plan.
        found: The search around it.
    """
    from launcher.auto import summary

    if not found.result.ranked:
        return None
    objective, first = found.result.objective, found.result.ranked[0]
    best = summary(first)
    kept = ("plan", "plan_text", "overrides", "runnable", "modelled_reason", "step_s", "peak_bytes")
    return {name: best[name] for name in kept} | {
        "objective": objective,
        "better": _score(estimator, estimate, objective) / _score(estimator, first, objective) - 1,
        "among_runnable": found.space.runnable_only,
        "fixed": to_json(found.space.fixed),
        "warnings": _new_warnings(estimate, first),
    }


def _new_warnings(given: CostEstimate, best: CostEstimate) -> list[str]:
    """What the numbers of the best plan cannot be trusted about, if those of the given one can: by their first word."""
    known = {_subject(one) for one in given.warnings}
    return [one for one in best.warnings if _subject(one) not in known]


def _subject(warning: str) -> str:
    return warning.partition(" ")[0].partition("=")[0]


def _score(estimator: Estimator, estimate: CostEstimate, objective: Objective) -> float:
    """What the objective makes smallest."""
    if objective == "memory":
        return estimate.peak_bytes
    return estimator.score(estimate.plan, estimate.step_s, objective)


def search_document(found: Contest) -> Mapping[str, Any]:
    """The counts of the search, as in :func:`launcher.auto.auto_document`."""
    from launcher.auto import summary

    result = found.result
    return {
        "objective": result.objective,
        "space": result.space,
        "evaluated": result.evaluated,
        "pruned": result.pruned,
        "rejected": result.rejected,
        "ranked": [summary(one) for one in result.ranked],
        "best_runnable": None,
        "fixed": to_json(found.space.fixed),
    }

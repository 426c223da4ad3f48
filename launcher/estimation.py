"""The estimate of a plan as a document: what ``plan --json`` prints under ``estimate`` and the report draws.

Keys are stable and say their unit: ``_s`` seconds, ``_bytes``, ``_usd``, ``days_``; shares are fractions of 1. What is
not known is null. Arithmetic is left to :mod:`strategies`; nothing here reads files or clocks.

===============  ======================================================================================================
``fits``         every rank stays within ``memory.budget_bytes``
``runnable``     phalanx can run it, else ``modelled_reason``
``time``         ``step_s`` with its 90 % band, ``kinds_s`` (they sum to it), ``tokens_per_s``, ``mfu``, ``hfu``
``memory``       ``peak_bytes``, ``peak_stage``, and ``stages`` with every kind (they sum to ``total_bytes``)
``bottleneck``   the largest kind of time, its share, a sentence
``failures``     rates, checkpoint intervals per tier, spares, ``goodput``, ``lost`` by kind, finish, cost, ``sweep``
``ladder``       what happens on fewer nodes; neighbours with the same plan are one entry
``advice``       changes of the ``plan`` and of the ``hardware`` that gain most
``warnings``     what the numbers cannot be trusted about
``arithmetic``   with ``--explain``: formula and numbers of every kind
``best``         with ``--explain`` or ``--report``: the best plan by the objective, and by how much it is better
``search``       with ``--report``: counts, the best plan, points (seconds, bytes) of the scatter plot
===============  ======================================================================================================
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.quantities import span, storage
from strategies import reliability_terms, replan, rules
from strategies.advice import Advice, Change, advise
from strategies.codec import to_json
from strategies.estimate import CostEstimate, Estimator, Objective
from strategies.plan import ParallelPlan
from strategies.replan import Candidate, Find, Rung
from strategies.shrink import smaller_plans
from strategies.specs import ClusterSpec
from strategies.topology import nodes_needed
from strategies.workload import Workload

if TYPE_CHECKING:
    from launcher.contest import Contest

_RUNGS = 4
"""Times that the ladder gives up a replica (with experts: a set of them that holds all)."""

_POINTS = 1500
"""Plans in the scatter plot."""

_LOST_NODES = 1000
"""Lost nodes that the ladder looks at, at most."""


def estimated(
    work: Workload,
    plan: ParallelPlan,
    *,
    explain: bool = False,
    report: bool = False,
    searched: Mapping[str, Any] | None = None,
    objective: Objective = "goodput",
) -> dict[str, Any]:
    """The estimate of a legal plan.

    Args:
        work: Model, batch and machine.
        plan: The plan.
        explain: With the arithmetic of every number, and the best plan to compare this one with.
        report: With that plan, and what only the report draws: the search, and plans around this one.
        searched: What :func:`launcher.auto.auto_document` says about the search that the plan came from.
        objective: What the best plan is best at.
    """
    estimator = Estimator(work)
    estimate = estimator.estimate(plan)
    replicas = nodes_needed(plan, work.cluster.slots_per_node) * plan.ep // plan.dp
    lost = min(_LOST_NODES, _RUNGS * max(1, replicas))
    rungs = replan.ladder(work, plan, estimate.step_s, next_plan(estimator, plan), lost) if estimate.fits else ()
    document = estimate_document(estimator, estimate, rungs=rungs, explain=explain)
    if explain or report:
        from launcher.contest import best_document, contest

        found = contest(estimator, estimate, objective)
        document["best"] = best_document(estimator, estimate, found)
    if report:
        from launcher.auto import label

        document |= {"plan_text": label(plan), "search": _search(estimator, found, searched)}
    return document


def _search(estimator: Estimator, found: Contest, searched: Mapping[str, Any] | None) -> dict[str, Any]:
    """A search for the report: its counts, the best plan, and a sample of all plans.

    It is the search that a given plan is compared by, or the one that the plan came from.
    """
    from launcher.contest import search_document
    from launcher.report.sample import sample
    from strategies.space import Space

    space = found.space if searched is None else Space(estimator.work, searched["fixed"])
    searched = search_document(found) if searched is None else searched
    return {
        **{name: searched[name] for name in ("objective", "space", "evaluated", "fixed", "best_runnable")},
        **{name: sum(searched[name].values()) for name in ("pruned", "rejected")},
        "among_runnable": space.runnable_only,
        "best": searched["ranked"][0] if searched["ranked"] else None,
        "points": sample(estimator, space, _POINTS),
    }


def next_plan(estimator: Estimator, plan: ParallelPlan) -> Find:
    """How a plan shrinks: the first of those that recovery tries (:mod:`strategies.shrink`) that is legal and fits."""
    work, budget = estimator.work, estimator.memory.budget()
    known: dict[ParallelPlan, Candidate | None] = {}

    def judged(smaller: ParallelPlan, cluster: ClusterSpec) -> Candidate | None:
        broken = rules.check(
            model=work.model,
            plan=smaller,
            batch=work.batch,
            cluster=cluster,
            precision=work.precision,
            modelled=True,
            engine=work.framework == "megatron",
            brief=True,
        )
        if broken or estimator.memory.peak(smaller) > budget:
            return None
        step_s = sum(estimator.timing.step(smaller))
        return Candidate(smaller, step_s, work.batch.tokens / step_s)

    def find(cluster: ClusterSpec) -> Candidate | None:
        for smaller in smaller_plans(model=work.model, plan=plan, batch=work.batch, cluster=cluster):
            if smaller not in known:
                known[smaller] = judged(smaller, cluster)
            if known[smaller] is not None:
                return known[smaller]
        return None

    return find


def estimate_document(
    estimator: Estimator,
    estimate: CostEstimate,
    *,
    rungs: Sequence[Rung] = (),
    explain: bool = False,
) -> dict[str, Any]:
    """Everything that the planner says about a plan.

    Args:
        estimator: What made ``estimate``.
        estimate: The estimate.
        rungs: The degradation ladder.
        explain: With the arithmetic of every number.
    """
    work, plan = estimator.work, estimate.plan
    advice = advise(estimator, estimate)
    document = {
        "plan_text": plan.describe(),
        "framework": work.framework,
        "runnable": estimate.runnable,
        "modelled_reason": estimate.modelled_reason,
        "fits": estimate.fits,
        "tokens": work.tokens,
        "time": _time(estimate),
        "memory": _memory(estimate),
        "bottleneck": to_json(advice.bottleneck),
        "failures": _failures(work, estimate),
        "ladder": _ladder(work, plan, rungs),
        "advice": _advice(advice),
        "warnings": list(estimate.warnings),
        "best": None,
        "search": None,
    }
    if explain:
        stage = document["memory"]["peak_stage"]
        document["arithmetic"] = {
            "time": [to_json(term) for term in estimator.timing.explain(plan)],
            "memory": [to_json(term) for term in estimator.memory.explain(plan, stage)],
            "memory_stage": stage,
            "failures": [to_json(term) for term in reliability_terms.explain(work, plan, estimate.step_s)],
        }
    return document


def _time(estimate: CostEstimate) -> dict[str, Any]:
    return {
        "step_s": estimate.step_s,
        "low_s": estimate.low_s,
        "high_s": estimate.high_s,
        "kinds_s": estimate.step._asdict(),
        "tokens_per_s": estimate.tokens_per_s,
        "surviving_tokens_per_s": estimate.surviving_tokens_per_s,
        "mfu": estimate.mfu,
        "hfu": estimate.hfu,
    }


def _memory(estimate: CostEstimate) -> dict[str, Any]:
    stages = [
        {
            "stage": i,
            "blocks": estimate.plan.stages[i],
            **{f"{kind}_bytes": value for kind, value in stage._asdict().items()},
            "total_bytes": sum(stage),
        }
        for i, stage in enumerate(estimate.stages)
    ]
    totals = [sum(stage) for stage in estimate.stages]
    return {
        "budget_bytes": estimate.budget_bytes if math.isfinite(estimate.budget_bytes) else None,
        "peak_bytes": estimate.peak_bytes,
        "peak_stage": totals.index(max(totals)),
        "stages": stages,
    }


def _failures(work: Workload, estimate: CostEstimate) -> dict[str, Any]:
    values = {one.name: to_json(getattr(estimate.outlook, one.name)) for one in dataclasses.fields(estimate.outlook)}
    values["mtbf_s"] = values.pop("node_mtbf_s")
    for name in ("cost_low", "cost_50", "cost_90"):
        values[f"{name}_usd"] = values.pop(name)
    values["sweep"] = [{"restart_s": seconds, "goodput": share} for seconds, share in estimate.outlook.sweep]
    seconds = work.tokens / estimate.tokens_per_s
    if work.batch.ramp is not None:
        seconds = work.step_count(estimate.plan) * estimate.step_s
    values["days_fault_free"] = seconds / 86400 if work.tokens else None
    return values


def _ladder(work: Workload, plan: ParallelPlan, rungs: Sequence[Rung]) -> list[dict[str, Any]]:
    """The rungs, neighbours with the same plan merged."""
    nodes = nodes_needed(plan, work.cluster.slots_per_node)
    found: list[dict[str, Any]] = []
    before: Rung | None = None
    for one in rungs:
        if before is not None and one.plan == before.plan:
            found[-1] |= {"nodes_lost_most": nodes - one.nodes, "idle_nodes_least": one.spares if one.plan else 0}
        else:
            found.append(_rung(one, nodes - one.nodes))
        before = one
    return found


def _rung(one: Rung, lost: int) -> dict[str, Any]:
    return {
        "nodes_lost": lost,
        "nodes_lost_most": lost,
        "nodes": one.nodes,
        "plan": to_json(one.plan),
        "plan_text": one.plan.describe() if one.plan else "",
        "step_s": one.step_s,
        "tokens_per_s": one.tokens_per_s,
        "throughput": one.throughput,
        "idle_nodes": one.spares if one.plan else 0,
        "idle_nodes_least": one.spares if one.plan else 0,
        "changes": list(one.changes),
        "moved_bytes": one.moved_bytes,
        "move_s": one.move_s,
        "grow_s": one.grow_s,
        "wait_until_s": one.wait_until_s,
        "shrinks": one.shrinks,
        "verdict": one.verdict,
        "advice": _wait_or_shrink(one),
    }


def _wait_or_shrink(one: Rung) -> str:
    """The verdict in a few words."""
    if one.plan is None or one.wait_until_s is None:
        return "wait: nothing legal fits"
    if one.shrinks:
        return f"shrink, unless it is back in {span(one.wait_until_s)}"
    return f"wait; shrinking pays after {span(one.wait_until_s)}"


def _advice(advice: Advice) -> dict[str, Any]:
    return {"plan": [_change(one) for one in advice.plan], "hardware": [_change(one) for one in advice.hardware]}


def _change(one: Change) -> dict[str, Any]:
    return {
        "change": one.change,
        "overrides": one.overrides,
        "gain": one.gain,
        "step_s": one.step_s,
        "peak_bytes": one.peak_bytes,
        "runnable": one.runnable,
        "plan": to_json(one.plan),
    }


def memory_violation(document: dict[str, Any], plan: ParallelPlan) -> dict[str, str] | None:
    """What is said of a plan that does not fit the devices, in the form of a broken rule; None if it fits.

    Args:
        document: The estimate.
        plan: Its plan.
    """
    if document["fits"]:
        return None
    memory = document["memory"]
    stage, peak, budget = memory["peak_stage"], memory["peak_bytes"], memory["budget_bytes"]
    where = f"a rank of stage {stage}" if plan.pp > 1 else "a rank"
    kinds = {kind.removesuffix("_bytes"): value for kind, value in memory["stages"][stage].items()}
    largest = sorted((k for k in kinds if k not in ("stage", "blocks", "total")), key=lambda k: -kinds[k])[:3]
    parts = ", ".join(f"{kind} {storage(kinds[kind])}" for kind in largest)
    helps = [
        f"{one['overrides']} ({storage(one['peak_bytes'])})" for one in document["advice"]["plan"] if one["overrides"]
    ]
    return {
        "rule": "memory_fits",
        "message": f"{where} would need {storage(peak)} of {storage(budget)}: "
        f"{storage(peak - budget)} too much ({parts})",
        "hint": "; or ".join(helps) if helps else "strategy=auto looks for a plan that fits; or give more devices",
    }

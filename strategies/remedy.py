"""What would mend a broken rule: values that are legal with everything else as it is, found by judging them.

A rule proposes; what it proposes is said only if the rule is silent then and no other one speaks up. What follows from
other values by itself follows here, too: gradient accumulation, even stages, and replicas that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from strategies.cases import Case, either, nearest
from strategies.plan import ParallelPlan, accumulation, split_layers
from strategies.resolve import resolve_plan

REACH = 256
"""Values below a limit that are tried, the nearest first."""


def changed(case: Case, values: Mapping[str, Any]) -> Case:
    """The case of somebody who gives other values.

    Args:
        case: The case as it is.
        values: Knobs of the plan by their names; ``model.heads``, ``moe.top_k``, ``batch.global_batch``,
            ``ramp.start``, ``cluster.nodes`` and the like.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, _, field = name.rpartition(".")
        parts.setdefault(part or "plan", {})[field] = value
    model, batch, cluster = case.model, case.batch, case.cluster
    if "model" in parts:
        follows = {"kv_heads": parts["model"]["heads"]} if _copies(case, parts["model"]) else {}
        model = replace(model, **(follows | parts["model"]))
    if "moe" in parts and model.moe is not None:
        model = replace(model, moe=replace(model.moe, **parts["moe"]))
    if "batch" in parts:
        batch = replace(batch, **parts["batch"])
    if "ramp" in parts and batch.ramp is not None:
        batch = replace(batch, ramp=replace(batch.ramp, **parts["ramp"]))
    if "cluster" in parts and cluster is not None:
        cluster = replace(cluster, **parts["cluster"])
    made = replace(case, model=model, batch=batch, cluster=cluster)
    return replace(made, plan=_derived(case, made, parts.get("plan", {})))


def _copies(case: Case, given: Mapping[str, Any]) -> bool:
    """Key/value heads that are as many as heads stay so."""
    return "heads" in given and "kv_heads" not in given and case.model.kv_heads == case.model.heads


def _derived(before: Case, after: Case, given: Mapping[str, Any]) -> ParallelPlan:
    """The plan of the changed case: what is given, and what nobody asked for as it follows from that."""
    plan, size = before.plan, before.batch.global_batch
    exact = accumulation(max(1, size), max(1, plan.micro_batch), max(1, plan.dp))
    left_open = before.left_open | {"grad_accum"} if plan.grad_accum == exact else before.left_open
    if plan.stages == split_layers(max(0, before.model.layers), max(1, plan.pp)):
        left_open |= {"stages"}
    names = (one.name for one in fields(plan) if one.name not in {"version", *left_open})
    values = {name: getattr(plan, name) for name in names}
    return resolve_plan(after.model, after.batch, after.cluster, after.precision, **(values | dict(given)))


def mends(case: Case, rule: str, values: Mapping[str, Any]) -> bool:
    """Whether other values mend a rule and break none; True where nobody judges."""
    return case.judge is None or not _left(case, rule, values)


def _left(case: Case, rule: str, values: Mapping[str, Any]) -> frozenset[str]:
    """Rules that other values break, and ``rule`` if it stays broken."""
    assert case.judge is not None
    after = case.judge(changed(case, values))
    return after - (case.judge(case) - {rule})


def legal(case: Case, rule: str, knob: str, values: Iterable[int]) -> list[int]:
    """Those values of a knob that mend a rule, and as many of the others as any of them does."""
    if case.judge is None:
        return list(values)
    mending = [value for value in values if mends(case, rule, {knob: value})]
    broken = {value: len(case.judge(changed(case, {knob: value}))) for value in mending}
    return [value for value in mending if broken[value] == min(broken.values())]


def nearest_legal(case: Case, rule: str, knob: str, value: int, values: Iterable[int], name: str = "") -> str:
    """``nearest legal ep: 2 or 4``, or what is in the way.

    Args:
        case: The case.
        rule: What is broken.
        knob: What to change.
        value: Its value.
        values: The choices.
        name: What people call it; empty for ``knob``.
    """
    values, name = list(values), name or knob
    found = nearest(value, legal(case, rule, knob, values))
    if found:
        return f"nearest legal {name}: {either(found)}"
    tried = nearest(value, values)
    if not tried or case.judge is None:
        return f"no {name} mends it"
    blocked = sorted(frozenset().union(*(_left(case, rule, {knob: one}) for one in tried)) - {rule})
    return f"no {name} mends it by itself: {either(tried)} would break {', '.join(blocked)}"


def at_most(case: Case, rule: str, knob: str, limit: int) -> list[str]:
    """``dp at most 3`` with the largest legal number up to a limit; nothing if there is none."""
    values = [*range(limit, max(0, limit - REACH), -1), *([1] if limit > REACH else [])]
    best = next((value for value in values if mends(case, rule, {knob: value})), None)
    return [] if best is None else [f"{knob} at most {best}"]


def offered(case: Case, rule: str, *choices: tuple[str, Mapping[str, Any]]) -> list[str]:
    """Of several ways to mend a rule, words and values, the words of those that do."""
    return [words for words, values in choices if mends(case, rule, values)]


def hint_of(options: Iterable[str], between: str = ", or ") -> str:
    """Ways to mend a rule as one hint."""
    return between.join(options) or "no single value mends it: other rules would be broken"

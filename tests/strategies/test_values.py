"""The values that travel: the plan and specs as JSON and back, the errors, and what the package exports."""

from __future__ import annotations

import json
from typing import Any

import pytest

import strategies
from strategies.codec import from_json, to_json
from strategies.errors import ConfigError, PlanInfeasible, Violation, did_you_mean
from strategies.plan import ParallelPlan, accumulation, split_layers
from strategies.specs import ClusterSpec, ModelSpec
from tests.strategies.support import FOUR_BY_TWO, LLAMA_TINY, plan


def test_exports_are_sorted_complete_and_there() -> None:
    names = strategies.__all__
    assert sorted(names) == sorted(set(names))
    constants = [name for name in names if name.isupper()]
    classes = [name for name in names if name[0].isupper() and not name.isupper()]
    functions = [name for name in names if name[0].islower()]
    assert names == [*sorted(constants), *sorted(classes), *sorted(functions)]
    assert all(hasattr(strategies, name) for name in names)


@pytest.mark.parametrize("value", [plan(tp=2, pp=2, dp=3, recompute="full"), LLAMA_TINY, FOUR_BY_TWO])
def test_values_survive_json(value: Any) -> None:
    assert from_json(type(value), json.loads(json.dumps(to_json(value)))) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tpp": 2}, "ParallelPlan: unknown key 'tpp'"),
        ({"tp": "2"}, "ParallelPlan.tp: expected a whole number, found '2'"),
        ({"tp": True}, "ParallelPlan.tp: expected a whole number, found True"),
        ({"tp": 2.0}, "ParallelPlan.tp: expected a whole number, found 2.0"),
        ({"schedule": "2f2b"}, "ParallelPlan.schedule: expected one of"),
        ({"stages": 4}, "ParallelPlan.stages: expected a list"),
        ({"stages": [1, "2"]}, r"ParallelPlan.stages\[1\]: expected a whole number"),
    ],
)
def test_a_damaged_plan_names_the_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(ParallelPlan, to_json(plan()) | change)


def test_a_missing_field_is_named() -> None:
    document = to_json(plan())
    del document["micro_batch"]
    with pytest.raises(ConfigError, match="missing micro_batch"):
        from_json(ParallelPlan, document)


def test_a_whole_number_is_a_number() -> None:
    assert from_json(ModelSpec, to_json(LLAMA_TINY) | {"rope_theta": 10000}).rope_theta == 10000.0


def test_unknown_keys_get_a_suggestion() -> None:
    assert did_you_mean("slot_per_node", ["nodes", "slots_per_node"]) == (
        "Did you mean 'slots_per_node'? Known: nodes, slots_per_node."
    )
    assert did_you_mean("zzz", ["nodes"]) == "Known: nodes."


def test_an_error_says_what_why_and_what_next() -> None:
    error = ConfigError("This is wrong.", why="because of 3", hint="use 4")
    assert str(error) == "This is wrong.\n  why:  because of 3\n  next: use 4"
    broken = PlanInfeasible([Violation(rule="a", message="b", hint="c"), Violation(rule="d", message="e", hint="")])
    assert str(broken) == "The plan breaks 2 rules:\n  - a: b; c\n  - d: e"


@pytest.mark.parametrize(
    ("layers", "pp", "stages"),
    [(4, 2, (2, 2)), (5, 2, (3, 2)), (7, 4, (1, 2, 2, 2)), (6, 4, (1, 2, 2, 1)), (2, 3, (1, 1, 0)), (0, 2, (0, 0))],
)
def test_layers_are_split_evenly(layers: int, pp: int, stages: tuple[int, ...]) -> None:
    found = split_layers(layers, pp)
    assert sum(found) == layers
    assert len(found) == pp
    assert max(found) - min(found) <= 1
    assert sorted(found) == sorted(stages)


def test_accumulation_rounds_up() -> None:
    assert [accumulation(16, 1, dp) for dp in (1, 3, 16)] == [16, 6, 1]


def test_plans_describe_themselves() -> None:
    assert plan(tp=2, pp=2, dp=2).describe() == "TP2 x PP2 x DP2 ZeRO-1, micro-batch 1 x 8"
    assert plan().describe() == "1 rank ZeRO-0, micro-batch 1 x 16"
    assert plan(tp=2, pp=2, dp=3).world_size == 12


def test_slots_of_a_cluster_leave_the_spares_out() -> None:
    assert ClusterSpec(name="c", kind="local", nodes=3, slots_per_node=4, spares=2).slots == 12

"""The values that travel: the plan and specs as JSON and back, the errors, and what the package exports."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

import strategies
from strategies.codec import from_json, to_json
from strategies.errors import ConfigError, PlanInfeasible, Violation, did_you_mean
from strategies.plan import ParallelPlan, accumulation, split_layers
from strategies.specs import ClusterSpec, LatentAttention, ModelSpec, MoeSpec
from tests.strategies.support import FOUR_BY_TWO, LLAMA_TINY, TINY, plan


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


MIXTRAL = replace(LLAMA_TINY, name="mix", moe=MoeSpec(experts=8, top_k=2, ffn=32))


def test_values_with_sections_survive_json() -> None:
    latent = LatentAttention(q_rank=8, kv_rank=4, nope_width=8, rope_width=4, value_width=8)
    model = replace(MIXTRAL, latent=latent)
    assert from_json(ModelSpec, json.loads(json.dumps(to_json(model)))) == model


def test_parameters_of_a_block_by_hand() -> None:
    """Llama flavour: 48 wide, 6 heads of 8, 2 of them for keys and values, gated feed-forward block of 96."""
    assert LLAMA_TINY.attention_parameters == 2 * 48 * 48 + 2 * 48 * 16
    assert LLAMA_TINY.ffn_parameters(96) == 3 * 48 * 96
    assert LLAMA_TINY.block_parameters == LLAMA_TINY.attention_parameters + 3 * 48 * 96 + 2 * 48
    assert LLAMA_TINY.parameters == 6 * LLAMA_TINY.block_parameters + 2 * 101 * 48 + 48
    assert LLAMA_TINY.active_parameters == LLAMA_TINY.parameters


def test_what_changes_a_model_changes_its_parameters() -> None:
    block, hidden, ffn = TINY.block_parameters, TINY.hidden, TINY.ffn
    assert replace(TINY, gated=True).block_parameters - block == hidden * ffn + ffn
    assert replace(LLAMA_TINY, gated=False).ffn_parameters(96) == 2 * 48 * 96
    assert replace(TINY, head_width=32).block_parameters - block == 4 * hidden * hidden + 3 * hidden
    assert replace(TINY, position_rows=0).parameters == TINY.parameters - TINY.seq * hidden
    assert replace(LLAMA_TINY, position_rows=7).parameters == LLAMA_TINY.parameters + 7 * 48
    assert replace(TINY, embed_norm=True).parameters == TINY.parameters + 2 * hidden
    assert replace(TINY, tied=False).parameters == TINY.parameters + TINY.vocab * hidden


def test_experts_are_counted_whole_and_per_token() -> None:
    expert, router = 3 * 48 * 32, 8 * 48
    assert (MIXTRAL.expert_parameters, MIXTRAL.router_parameters) == (expert, router)
    dense = LLAMA_TINY.block_parameters - 3 * 48 * 96
    assert MIXTRAL.block_parameters == dense + 8 * expert + router
    assert MIXTRAL.active_block_parameters == dense + 2 * expert + router
    assert MIXTRAL.parameters - MIXTRAL.active_parameters == 6 * 6 * expert
    moe = MoeSpec(experts=8, top_k=2, ffn=32, dense_layers=2, shared_ffn=64, router_bias=True)
    model = replace(LLAMA_TINY, moe=moe)
    assert model.dense_layers == 2
    assert model.block_parameters == dense + 8 * expert + router + 8 + 3 * 48 * 64
    assert model.parameters - model.embedding_parameters - model.head_parameters == (
        2 * LLAMA_TINY.block_parameters + 4 * model.block_parameters
    )
    assert LLAMA_TINY.expert_parameters == LLAMA_TINY.router_parameters == LLAMA_TINY.shared_expert_parameters == 0


def test_latent_attention_by_hand() -> None:
    latent = LatentAttention(q_rank=8, kv_rank=4, nope_width=8, rope_width=4, value_width=10)
    model = replace(LLAMA_TINY, latent=latent)
    queries = 48 * 8 + 8 + 8 * 6 * 12
    keys_values = 48 * (4 + 4) + 4 + 4 * 6 * (8 + 10)
    assert model.attention_parameters == queries + keys_values + 6 * 10 * 48
    direct = replace(model, latent=replace(latent, q_rank=0))
    assert direct.attention_parameters == 48 * 6 * 12 + keys_values + 6 * 10 * 48

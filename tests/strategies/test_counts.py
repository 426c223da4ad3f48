"""Closed-form counts against the listing of tensors, for every kind of model."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from strategies.counts import (
    block,
    embedding,
    expert_blocks,
    head,
    model_count,
    rank_parameters,
    stage_count,
    stage_parameters,
)
from strategies.plan import ParallelPlan
from strategies.specs import LatentAttention, ModelSpec, MoeSpec
from strategies.tensors import block_tensors, stage_tensors
from tests.strategies.support import plan, random_model

LATENT = LatentAttention(q_rank=24, kv_rank=16, nope_width=8, rope_width=4, value_width=8)


def any_model(rng: random.Random) -> ModelSpec:
    """A model with a random choice of everything that a model can have."""
    model = random_model(rng)
    moe = MoeSpec(
        experts=rng.choice([2, 4, 8]),
        top_k=2,
        ffn=rng.choice([8, 12]),
        dense_layers=rng.randint(0, model.layers),
        shared_ffn=rng.choice([0, 16]),
        router_bias=rng.random() < 0.5,
    )
    return replace(
        model,
        gated=rng.choice([None, True, False]),
        head_width=rng.choice([0, 6]),
        position_rows=rng.choice([None, 0, 10]),
        embed_norm=rng.random() < 0.5,
        moe=rng.choice([None, moe]),
        latent=rng.choice([None, LATENT, replace(LATENT, q_rank=0)]),
    )


def any_plan(rng: random.Random, model: ModelSpec, **degrees: Any) -> ParallelPlan:
    """A plan of random degrees for ``model``."""
    pp = rng.randint(1, model.layers)
    schedule = rng.choice(["1f1b", "1f1b", "dualpipev"])
    return plan(
        model=model, pp=pp, tp=rng.choice([1, 2, 3]), dp=4, ep=rng.choice([1, 2, 4]), schedule=schedule, **degrees
    )


@pytest.mark.parametrize("seed", range(200))
def test_stages_count_what_is_listed(seed: int) -> None:
    rng = random.Random(seed)
    model = any_model(rng)
    the_plan = any_plan(rng, model)
    listed = [list(stage_tensors(model, the_plan, stage)) for stage in range(the_plan.pp)]
    for stage, tensors in enumerate(listed):
        expert, dense = (
            sum(tensor.local_numel(the_plan.tp, the_plan.ep) for tensor in tensors if tensor.expert == kind)
            for kind in (True, False)
        )
        assert stage_count(model, the_plan, stage) == (dense, expert)
        assert rank_parameters(model, the_plan)[stage] == dense + expert
        assert stage_parameters(model, the_plan)[stage] == sum(tensor.numel for tensor in tensors)
        assert expert_blocks(model, the_plan, stage) == sum("router.weight" in tensor.name for tensor in tensors)


@pytest.mark.parametrize("seed", range(200))
def test_the_listing_sums_to_the_parameters_of_the_model(seed: int) -> None:
    rng = random.Random(seed)
    model = any_model(rng)
    the_plan = any_plan(rng, model)
    tensors = [tensor for stage in range(the_plan.pp) for tensor in stage_tensors(model, the_plan, stage)]
    assert sum(tensor.numel for tensor in tensors if not tensor.copy) == model.parameters == model_count(model).total
    names = [tensor.name for tensor in tensors if not tensor.copy]
    assert len(set(names)) == len(names)


def test_parts_sum_to_the_whole() -> None:
    for seed in range(50):
        model = any_model(random.Random(seed))
        dense = model.layers if model.moe is None else min(model.moe.dense_layers, model.layers)
        blocks = dense * block(model).total + (model.layers - dense) * block(model, dense=False).total
        assert embedding(model) + blocks + head(model, alone=False) == model.parameters


def test_experts_are_dealt_out_and_cut() -> None:
    model = ModelSpec(
        name="moe",
        flavour="llama",
        layers=2,
        hidden=32,
        heads=4,
        kv_heads=2,
        ffn=64,
        vocab=100,
        seq=16,
        moe=MoeSpec(experts=8, top_k=2, ffn=16),
    )
    assert block(model, tp=2, ep=4, dense=False).expert == 8 * 3 * 32 * 16 // 8
    cut = {t.name: t.sharded for t in block_tensors(model, "b", dense=False) if t.expert}
    assert cut == {"b.ffn.experts.gate.weight": 1, "b.ffn.experts.up.weight": 1, "b.ffn.experts.down.weight": 2}


def test_dualpipev_has_both_ends_on_the_first_stage() -> None:
    model = any_model(random.Random(3))
    model = replace(model, layers=8, tied=True)
    names = [t.name for t in stage_tensors(model, plan(model=model, pp=4, schedule="dualpipev"), 0)]
    assert "head.norm.weight" in names
    assert names.count("embed.tokens.weight") == 1

"""Bytes of model state, and the counts below them, against published numbers and arithmetic done another way."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from strategies.counts import rank_parameters, stage_parameters
from strategies.model_state import model_state_bytes, replicas
from strategies.plan import ParallelPlan
from strategies.specs import BatchSpec, ModelSpec, MoeSpec
from strategies.tensors import TensorSpec, padded, stage_tensors
from tests.strategies.support import (
    GPT2,
    GPT2_XL,
    LLAMA2_7B,
    LLAMA2_70B,
    LLAMA3_8B,
    LLAMA_TINY,
    TINY,
    plan,
    random_model,
)

PUBLISHED = [
    (GPT2, 124_439_808),
    (GPT2_XL, 1_557_611_200),
    (LLAMA2_7B, 6_738_415_616),
    (LLAMA2_70B, 68_976_648_192),
    (LLAMA3_8B, 8_030_261_248),
]


@pytest.mark.parametrize(("model", "parameters"), PUBLISHED, ids=lambda value: getattr(value, "name", ""))
def test_published_parameter_counts(model: ModelSpec, parameters: int) -> None:
    assert model.parameters == parameters
    assert stage_parameters(model, plan(model=model)) == (parameters,)


@pytest.mark.parametrize("seed", range(100))
def test_stages_sum_to_the_model_but_for_the_tied_copy(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    pp = rng.randint(1, model.layers)
    the_plan = plan(model=model, pp=pp, tp=rng.choice([1, 2, 3]))
    copy = model.vocab * model.hidden if model.tied and pp > 1 else 0
    assert sum(stage_parameters(model, the_plan)) == model.parameters + copy


@pytest.mark.parametrize("seed", range(100))
def test_shards_sum_to_the_model_plus_replicas_and_padding(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    tp = rng.choice([1, 2, 3, 4])
    model = replace(model, heads=4 * tp, kv_heads=2 * tp, hidden=24 * tp, ffn=12 * tp)
    the_plan = plan(model=model, tp=tp, pp=rng.randint(1, model.layers))
    for stage, local in enumerate(rank_parameters(model, the_plan)):
        tensors = list(stage_tensors(model, the_plan, stage))
        replicated = sum(tensor.numel for tensor in tensors if tensor.sharded is None)
        vocabularies = sum(
            1
            for tensor in tensors
            if tensor.shape[0] == model.vocab and tensor.sharded == 0 and "blocks" not in tensor.name
        )
        padding = vocabularies * (padded(model.vocab, tp) - model.vocab) * model.hidden
        assert tp * local == stage_parameters(model, the_plan)[stage] + (tp - 1) * replicated + padding


def test_what_tensor_parallelism_cuts() -> None:
    tensors = {tensor.name: tensor for tensor in stage_tensors(TINY, plan(), 0)}
    cut = {name.removeprefix("blocks.0."): t.sharded for name, t in tensors.items() if name.startswith("blocks.0.")}
    assert cut == {
        "attn_norm.weight": None,
        "attn_norm.bias": None,
        "attn.q.weight": 0,
        "attn.q.bias": 0,
        "attn.k.weight": 0,
        "attn.k.bias": 0,
        "attn.v.weight": 0,
        "attn.v.bias": 0,
        "attn.o.weight": 1,
        "attn.o.bias": None,
        "ffn_norm.weight": None,
        "ffn_norm.bias": None,
        "ffn.up.weight": 0,
        "ffn.up.bias": 0,
        "ffn.down.weight": 1,
        "ffn.down.bias": None,
    }
    assert tensors["embed.tokens.weight"].sharded == 0
    assert tensors["embed.positions.weight"].sharded is None


def test_names_are_unique_in_the_model_and_only_the_tied_copy_is_a_copy() -> None:
    for model in (TINY, LLAMA_TINY):
        the_plan = plan(model=model, pp=2)
        tensors = [tensor for stage in range(2) for tensor in stage_tensors(model, the_plan, stage)]
        names = [tensor.name for tensor in tensors if not tensor.copy]
        assert len(set(names)) == len(names)
        assert [t.name for t in tensors if t.copy] == (["embed.tokens.weight"] if model.tied else [])


def test_the_vocabulary_is_padded_to_a_multiple_of_tp() -> None:
    embedding = TensorSpec(name="e", shape=(259, 64), sharded=0)
    assert [embedding.local_numel(tp) for tp in (1, 2, 4)] == [259 * 64, 130 * 64, 65 * 64]
    assert [padded(259, tp) for tp in (1, 2, 4, 7)] == [259, 260, 260, 259]


BATCH = BatchSpec(global_batch=16, seq=32)
N = TINY.parameters  # even, so that flat buffers need no padding at dp 1


@pytest.mark.parametrize(
    ("precision", "degrees", "weights", "gradients", "optimizer"),
    [
        ("fp32", {"zero_stage": 0}, 4 * N, 4 * N, 8 * N),
        ("fp32", {"zero_stage": 1}, 4 * N, 4 * N, 12 * N),
        ("fp32", {"zero_stage": 2}, 4 * N, 4 * N, 12 * N),
        ("bf16", {"zero_stage": 0}, 2 * N, 2 * N, 12 * N),
        ("bf16", {"zero_stage": 1}, 2 * N, 4 * N, 12 * N),
        ("bf16", {"zero_stage": 1, "grad_dtype": "bf16"}, 2 * N, 2 * N, 12 * N),
        ("bf16", {"zero_stage": 2}, 2 * N, 4 * N, 12 * N),
        ("fp16", {"zero_stage": 1}, 2 * N, 4 * N, 12 * N),
        ("fp32", {"zero_stage": 0, "dp": 2}, 4 * N, 4 * N, 8 * N),
        ("fp32", {"zero_stage": 1, "dp": 2}, 4 * N, 4 * N, 6 * N),
        ("fp32", {"zero_stage": 2, "dp": 2}, 4 * N, 2 * N, 6 * N),
        ("bf16", {"zero_stage": 1, "dp": 2}, 2 * N, 4 * N, 6 * N),
        ("bf16", {"zero_stage": 2, "dp": 2}, 2 * N, 2 * N, 6 * N),
    ],
)
def test_bytes_per_kind_on_one_stage(
    precision: Any, degrees: dict[str, Any], weights: int, gradients: int, optimizer: int
) -> None:
    assert N % 4 == 0
    (found,) = model_state_bytes(TINY, plan(precision=precision, **degrees), precision)
    assert found == {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "total": weights + gradients + optimizer,
    }


def test_flat_buffers_are_padded_to_two_elements_per_replica() -> None:
    the_plan = plan(dp=7, zero_stage=1)
    (found,) = model_state_bytes(TINY, the_plan, "fp32")
    flat = padded(N, 14)
    assert flat > N
    assert (found["weights"], found["optimizer"]) == (4 * flat, 12 * flat // 7)


def test_zero_3_cuts_tensor_by_tensor_and_keeps_small_ones_whole() -> None:
    model = replace(GPT2, layers=1, vocab=1000, seq=8)
    the_plan = plan(model=model, batch=BATCH, dp=3, zero_stage=3)
    sizes = [tensor.numel for tensor in stage_tensors(model, the_plan, 0)]
    share = sum(-(-size // 3) for size in sizes)
    small = sum(padded(size, 3) for size in sizes if size <= 100_000)
    assert 0 < small < sum(sizes)
    (found,) = model_state_bytes(model, the_plan, "fp32")
    assert (found["weights"], found["gradients"]) == (4 * (share + small), 4 * share)
    assert found["optimizer"] == 12 * share


def test_a_pipeline_in_bf16_without_zero_still_cuts_the_optimizer() -> None:
    the_plan = plan(precision="bf16", pp=2, dp=2, zero_stage=0)
    (alone,) = {stage["optimizer"] for stage in model_state_bytes(TINY, replace(the_plan, zero_stage=1), "bf16")[:1]}
    assert model_state_bytes(TINY, the_plan, "bf16")[0]["optimizer"] == alone


def test_every_stage_is_counted_by_itself() -> None:
    the_plan = plan(model=LLAMA_TINY, pp=3, tp=2)
    found = model_state_bytes(LLAMA_TINY, the_plan, "fp32")
    assert [stage["weights"] for stage in found] == [
        4 * padded(count, 2) for count in rank_parameters(LLAMA_TINY, the_plan)
    ]
    assert len({stage["total"] for stage in found}) > 1


def test_sizes_of_illegal_plans_are_numbers_too() -> None:
    """A plan is shown with its sizes even when it breaks rules."""
    rng = random.Random(0)

    def number() -> int:
        return rng.choice([1, 2, 3, 5, 8, 16])

    for _ in range(500):
        sizes: dict[str, Any] = {
            name: number() for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq")
        }
        model = ModelSpec(name="random", flavour=rng.choice(["gpt3", "llama"]), **sizes)
        stages = rng.choice([None, (1,), (1, 2, 3)])
        the_plan = plan(model=model, tp=number(), pp=number(), dp=number(), stages=stages, zero_stage=rng.randint(0, 4))
        found = model_state_bytes(model, the_plan, "bf16")
        assert len(found) == len(stage_parameters(model, the_plan)) == len(the_plan.stages)
        assert all(stage["total"] >= 0 for stage in found)


def _mixed(tp: int, dp: int) -> ParallelPlan:
    return plan(model=LLAMA2_7B, precision="bf16", tp=tp, dp=dp)


def test_seven_billion_parameters_in_mixed_precision() -> None:
    (found,) = model_state_bytes(LLAMA2_7B, _mixed(1, 8), "bf16")
    assert found["total"] == 6_738_415_616 * (2 + 4) + 6_738_415_616 * 12 // 8
    (half,) = model_state_bytes(LLAMA2_7B, _mixed(2, 8), "bf16")
    assert 0.5 < half["total"] / found["total"] < 0.501


EXPERTS = replace(
    LLAMA_TINY, vocab=400, moe=MoeSpec(experts=8, top_k=2, ffn=24, dense_layers=2, shared_ffn=12), tied=True
)


def test_experts_are_cut_over_the_replicas_that_hold_the_same_ones() -> None:
    the_plan = plan(model=EXPERTS, precision="bf16", dp=8, ep=4, zero_stage=1)
    assert replicas(the_plan) == (8, 2)
    expert = 4 * 8 * 3 * 48 * 24  # blocks x experts x three matrices
    rest = EXPERTS.parameters - expert
    (found,) = model_state_bytes(EXPERTS, the_plan, "bf16")
    assert found["weights"] == 2 * (padded(rest, 16) + padded(expert // 4, 4))
    assert found["optimizer"] == 12 * (padded(rest, 16) // 8 + padded(expert // 4, 4) // 2)


def test_megatron_core_is_six_plus_twelve_over_the_replicas() -> None:
    (found,) = model_state_bytes(TINY, plan(precision="bf16", dp=4, zero_stage=1), "bf16", "mcore")
    assert found["total"] == 6 * N + 12 * N // 4
    (whole,) = model_state_bytes(TINY, plan(precision="bf16", dp=4, zero_stage=0, grad_dtype="fp32"), "bf16", "mcore")
    assert whole["total"] == 18 * N


def test_fsdp_trains_fp32_weights_that_are_cut() -> None:
    (found,) = model_state_bytes(TINY, plan(precision="bf16", dp=4, zero_stage=3), "bf16", "fsdp")
    assert (found["weights"], found["gradients"], found["optimizer"]) == (N, N, 2 * N)


@pytest.mark.parametrize("framework", ["megatron", "mcore", "fsdp"])
@pytest.mark.parametrize("seed", range(20))
def test_a_higher_stage_never_holds_more(framework: Any, seed: int) -> None:
    """Of models with matrices that ZeRO-3 cuts; a single rank and tensors that it keeps whole are exceptions."""
    rng = random.Random(seed)
    model = replace(random_model(rng), hidden=24 * 64, ffn=4096, vocab=9000, heads=24, kv_heads=12)
    pp = rng.choice([1, min(2, model.layers)])
    totals = []
    for stage in range(4):
        the_plan = plan(model=model, precision="bf16", pp=pp, dp=6, zero_stage=stage, grad_dtype="bf16")
        totals.append([kinds["total"] for kinds in model_state_bytes(model, the_plan, "bf16", framework)])
    for low, high in pairwise(totals):
        assert all(after <= before for before, after in zip(low, high, strict=True))

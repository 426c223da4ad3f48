"""Bytes of activations against the paper's closed forms and published counts of micro-batches in flight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from strategies.activations import block_bytes, cut, expert_bytes, in_flight, kernels, logit_bytes
from strategies.plan import ParallelPlan
from strategies.specs import ModelSpec, MoeSpec
from strategies.workload import Framework
from tests.strategies.support import LLAMA3_8B, plan

GPT = ModelSpec(name="gpt", layers=8, hidden=6144, heads=64, kv_heads=64, ffn=24576, vocab=51200, seq=2048)
SBH = 4 * 2048 * 6144


def kept(framework: Any = "megatron", model: ModelSpec = GPT, dense: bool = True, **choice: Any) -> float:
    """Bytes that one block keeps for a micro-batch of 4."""
    the_plan = _plan(**choice)
    at = cut(the_plan, model.seq, "bf16")
    return block_bytes(model, the_plan, at, kernels(model, "bf16", framework), dense=dense).kept


def _plan(**choice: Any) -> ParallelPlan:
    parallel = choice.pop("sequence_parallel", False)
    the_plan = plan(model=GPT, precision="bf16", micro_batch=4, **({"flash": False} | choice))
    return replace(the_plan, sequence_parallel=parallel)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_the_table_of_the_paper(tp: int) -> None:
    """Table 2 of arXiv 2205.05198."""
    scores = 5 * 64 * 2048 / (6144 * tp)
    assert kept(tp=tp) == pytest.approx(SBH * (10 + 24 / tp + scores))
    assert kept(tp=tp, sequence_parallel=True) == pytest.approx(SBH * (34 / tp + scores))
    assert kept(tp=tp, recompute="selective") == pytest.approx(SBH * (10 + 24 / tp))
    assert kept(tp=tp, recompute="selective", sequence_parallel=True) == pytest.approx(SBH * 34 / tp)
    assert kept(tp=tp, recompute="full") == pytest.approx(SBH * 2)


def test_fused_attention_leaves_nothing_for_selective_recomputation_to_save() -> None:
    assert kept(flash=True) == kept(flash=True, recompute="selective") == kept(recompute="selective")


@pytest.mark.parametrize("axis", ["cp", "sp"])
def test_cutting_the_sequence_cuts_activations(axis: str) -> None:
    choice: dict[str, Any] = {axis: 2, "flash": True}
    assert kept(**choice) == pytest.approx(kept(flash=True) / 2)


def test_grouped_queries_and_a_gate() -> None:
    """Llama-3-8B, per token: 4 h of norms' and products' inputs, q, k, v and out, and 3 f of a fused gate."""
    model = replace(LLAMA3_8B, seq=1024)
    tokens = 4 * 1024
    fused = 2 * (4 * 4096 + 2 * 4096 + 2 * 1024 + 3 * 14336)
    assert kept("fsdp", model, flash=True) == tokens * (fused + 2 * 14336)


def test_fp8_inputs_are_half_as_large() -> None:
    the_plan = _plan(flash=True)
    at = cut(the_plan, GPT.seq, "fp8")
    eight = block_bytes(GPT, the_plan, at, kernels(GPT, "fp8", "mcore"), dense=True)
    sixteen = block_bytes(GPT, the_plan, at, kernels(GPT, "bf16", "mcore"), dense=True)
    assert 0.6 < eight.kept / sixteen.kept < 0.9


def test_experts_keep_what_their_tokens_take() -> None:
    moe = MoeSpec(experts=16, top_k=2, ffn=24576, imbalance=1.0)
    model = replace(GPT, moe=moe)
    tokens = 4 * 2048
    extra = kept(model=model, dense=False, flash=True) - kept(model=model, flash=True)
    assert extra == pytest.approx(tokens * (2 * 4 * 6144 + 4 * 24576 + 4 * 16))
    uneven = replace(model, moe=replace(moe, imbalance=1.3))
    assert kept(model=uneven, dense=False, flash=True) > kept(model=model, dense=False, flash=True)


@pytest.mark.parametrize(("ep", "split"), [(1, False), (1, True), (2, False), (2, True)])
def test_shards_that_gather_keep_all_that_visits_them(ep: int, split: bool) -> None:
    """But only their own of what the experts give back, where they have dealt the tokens among them."""
    model = replace(GPT, moe=MoeSpec(experts=16, top_k=2, ffn=24576, imbalance=1.0))
    the_plan = replace(_plan(tp=4, sequence_parallel=split), ep=ep)
    at = cut(the_plan, model.seq, "bf16")
    ours, others = (
        expert_bytes(model, cast(MoeSpec, model.moe), at, kernels(model, "bf16", family)) for family in FAMILIES
    )
    hidden = 2 * 2 * 6144  # of both visits of a token
    whole = 4 if split else 1
    inner = 2 * 24576 * 2 * 2 / 4
    assert others == pytest.approx(2 * hidden / whole + inner + 4 * 16 / whole)
    router = 2 * 6144 * (1 - 1 / whole) if ep == 1 else 0
    assert ours == pytest.approx(hidden * (1 + 1 / (4 if ep > 1 else 1)) + inner + 4 * 16 + router)


FAMILIES: tuple[Framework, ...] = ("megatron", "mcore")


def test_full_recomputation_moves_a_block_to_the_working_set() -> None:
    code = kernels(GPT, "bf16", "megatron")
    none, full = (
        block_bytes(GPT, the_plan, cut(the_plan, GPT.seq, "bf16"), code, dense=True)
        for the_plan in (_plan(), _plan(recompute="full"))
    )
    assert full.working == pytest.approx(none.kept + none.working)


def test_logits_have_fp32_copies_and_tensor_parallelism_cuts_them() -> None:
    columns = GPT.vocab
    whole = logit_bytes(GPT, cut(_plan(), GPT.seq, "bf16"), kernels(GPT, "bf16", "megatron"))
    assert whole == 4 * 2048 * (14 * columns + 4 * 6144)
    half = logit_bytes(GPT, cut(_plan(tp=2), GPT.seq, "bf16"), kernels(GPT, "bf16", "megatron"))
    assert half == 4 * 2048 * (7 * columns + 4 * 6144)


def test_1f1b_waits_for_the_stages_below() -> None:
    the_plan = replace(_plan(pp=4), grad_accum=8)
    assert [in_flight(the_plan, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(replace(the_plan, grad_accum=2), stage) for stage in range(4)] == [2, 2, 2, 1]


@pytest.mark.parametrize(("pp", "vpp"), [(4, 2), (8, 3)])
def test_interleaving_holds_more_on_the_first_stage(pp: int, vpp: int) -> None:
    """1 + (p - 1) / (p v) times as much: arXiv 2205.05198, section 4.2.3."""
    the_plan = replace(_plan(pp=2), pp=pp, vpp=vpp, schedule="interleaved", grad_accum=64)
    assert in_flight(the_plan, 0) == pytest.approx(pp * (1 + (pp - 1) / (pp * vpp)))
    assert in_flight(the_plan, pp - 1) < in_flight(the_plan, 0)


def test_dualpipev_is_even() -> None:
    the_plan = replace(_plan(pp=4, schedule="dualpipev"), grad_accum=16)
    assert {in_flight(the_plan, stage) for stage in range(4)} == {4.5}

"""Every rule: what breaks it, the numbers in its message and the legal values in its hint."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from strategies.capabilities import MODELLED_ONLY, runnable
from strategies.cases import Case, divisors, legal_tp, nearest
from strategies.errors import PlanInfeasible, Violation
from strategies.hardware import Hardware
from strategies.plan import Offload, ParallelPlan
from strategies.rules import RULES, check, require
from strategies.specs import BatchSpec, ClusterSpec, LatentAttention, ModelSpec, MoeSpec
from tests.strategies.support import BATCH, FOUR_BY_TWO, LLAMA_TINY, TINY, plan, random_model


def _check(
    the_plan: ParallelPlan,
    model: ModelSpec = TINY,
    batch: BatchSpec = BATCH,
    cluster: ClusterSpec | None = None,
    precision: Any = "fp32",
    *,
    modelled: bool = False,
    engine: bool = True,
) -> tuple[Violation, ...]:
    return check(
        model=model,
        plan=the_plan,
        batch=batch,
        cluster=cluster,
        precision=precision,
        modelled=modelled,
        engine=engine,
    )


def _only(found: tuple[Violation, ...]) -> Violation:
    assert len(found) == 1, [str(violation) for violation in found]
    return found[0]


@pytest.mark.parametrize(
    "degrees",
    [
        {},
        {"dp": 4, "zero_stage": 0},
        {"dp": 4, "zero_stage": 1},
        {"dp": 4, "zero_stage": 2},
        {"dp": 4, "zero_stage": 3},
        {"tp": 2},
        {"tp": 4},
        {"pp": 2},
        {"pp": 4, "zero_stage": 0},
        {"tp": 2, "pp": 2},
        {"tp": 2, "pp": 2, "dp": 2},
        {"pp": 2, "recompute": "full"},
        {"pp": 2, "stages": (1, 3)},
        {"dp": 3},
        {"dp": 3, "micro_batch": 4},
        {"recompute": "selective"},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plans_of_the_parity_proof_are_legal(degrees: dict[str, Any], precision: Any) -> None:
    if precision == "bf16" and degrees.get("zero_stage") == 0:
        degrees = degrees | {"grad_dtype": "bf16"}
    the_plan = plan(precision=precision, **degrees)
    assert _check(the_plan, cluster=FOUR_BY_TWO, precision=precision) == ()


MODEL_CASES = [
    ({"layers": 0}, "model_sizes_positive", "layers 0", "at least 1"),
    ({"seq": -1}, "model_sizes_positive", "seq -1", "at least 1"),
    ({"vocab": 1}, "model_sizes_positive", "vocab 1", "the vocabulary at least 2"),
    ({"hidden": 66}, "hidden_divisible_by_heads", "hidden 66 is not divisible by heads 4 (rest 2)", "heads: 3 or 6"),
    ({"hidden": 66}, "hidden_divisible_by_heads", "66", "nearest legal hidden: 64 or 68"),
    ({"kv_heads": 3}, "heads_divisible_by_kv_heads", "heads 4 is not divisible by kv_heads 3 (rest 1)", "2 or 4"),
    ({"kv_heads": 8}, "heads_divisible_by_kv_heads", "heads 4", "nearest legal kv_heads: 4"),
]


@pytest.mark.parametrize(("change", "rule", "message", "hint"), MODEL_CASES)
def test_an_inconsistent_model(change: dict[str, Any], rule: str, message: str, hint: str) -> None:
    model = replace(TINY, **change)
    violation = next(v for v in _check(plan(model=model), model=model) if v.rule == rule)
    assert message in violation.message
    assert hint in violation.hint


def test_rotary_heads_are_even() -> None:
    model = replace(LLAMA_TINY, hidden=30, heads=6, kv_heads=6)
    violation = _only(_check(plan(model=model), model=model))
    assert violation.rule == "rotary_head_width_even"
    assert violation.message == "hidden 30 / heads 6 = 5 is odd, rotary positions need pairs"
    assert violation.hint == "nearest legal heads: 5 or 15"
    learned = replace(model, flavour="gpt3", seq=32)
    assert _check(plan(model=learned), model=learned) == ()


def test_heads_not_divisible_by_tp_names_the_nearest_legal_values() -> None:
    model = replace(TINY, heads=6, kv_heads=6, hidden=96, ffn=384)
    violation = _check(plan(model=model, tp=4), model=model)[0]
    assert violation.rule == "heads_divisible_by_tp"
    assert violation.message == "heads 6 is not divisible by tp 4 (rest 2)"
    assert violation.hint == "nearest legal tp: 3 or 6"


def test_tp_cuts_every_dimension() -> None:
    model = replace(TINY, heads=8, kv_heads=2, ffn=250, hidden=64)
    rules = {violation.rule: violation.hint for violation in _check(plan(model=model, tp=4), model=model)}
    assert rules == {
        "kv_heads_divisible_by_tp": "nearest legal tp: 2",
        "ffn_divisible_by_tp": "nearest legal tp: 2",
    }
    odd = replace(model, hidden=60, heads=6, kv_heads=6, ffn=64)
    assert "hidden_divisible_by_tp" in {v.rule for v in _check(plan(model=odd, tp=8), model=odd)}


def test_the_vocabulary_needs_no_rule_because_it_is_padded() -> None:
    assert TINY.vocab % 4 != 0
    assert _check(plan(tp=4)) == ()


@pytest.mark.parametrize("name", ["tp", "pp", "dp", "ep", "sp", "cp", "vpp", "micro_batch", "grad_accum"])
@pytest.mark.parametrize("value", [0, -3])
def test_degrees_are_positive(name: str, value: Any) -> None:
    violation = next(v for v in _check(plan(**{name: value}), cluster=FOUR_BY_TWO) if v.rule == "degrees_positive")
    assert f"{name} {value}" in violation.message


def test_more_stages_than_layers() -> None:
    violation = _only(_check(plan(pp=5)))
    assert violation.rule == "pp_at_most_layers"
    assert violation.message == "pp 5 is larger than layers 4: 1 stages would be empty"
    assert violation.hint == "nearest legal pp: 4"


@pytest.mark.parametrize(
    ("stages", "rules"),
    [
        ((4,), ["stages_match_pp"]),
        ((2, 3), ["stages_sum_to_layers"]),
        ((4, 0), ["stages_not_empty"]),
        ((1, 1, 1), ["stages_match_pp", "stages_sum_to_layers"]),
        ((5, -1), ["stages_not_empty"]),
    ],
)
def test_stages(stages: tuple[int, ...], rules: list[str]) -> None:
    found = _check(plan(pp=2, stages=stages))
    assert [violation.rule for violation in found] == rules
    assert all("strategy.stages=[2, 2]" in violation.hint for violation in found)


def test_a_cluster_too_small_says_what_is_there_and_what_fits() -> None:
    cluster = replace(FOUR_BY_TWO, nodes=2)
    violation = _only(_check(plan(tp=2, pp=2, dp=2), cluster=cluster))
    assert violation.rule == "world_size_fits_cluster"
    assert violation.message == "tp 2 x pp 2 x dp 2 = 8 ranks, the cluster has 2 nodes x 2 slots = 4"
    assert violation.hint == (
        "the largest plan that fits: strategy.tp=2 strategy.pp=2 strategy.dp=1 (4 ranks); or cluster.nodes=4"
    )


def test_spares_carry_no_ranks() -> None:
    assert _check(plan(dp=3), cluster=replace(FOUR_BY_TWO, nodes=1, spares=9)) != ()


def test_the_last_node_may_stay_partly_empty() -> None:
    assert _check(plan(dp=3), cluster=replace(FOUR_BY_TWO, nodes=2)) == ()


@pytest.mark.parametrize("change", [{"nodes": 0}, {"slots_per_node": 0}, {"spares": -1}])
def test_an_empty_cluster(change: dict[str, Any]) -> None:
    assert _only(_check(plan(), cluster=replace(FOUR_BY_TWO, **change))).rule == "cluster_not_empty"


@pytest.mark.parametrize("batch", [BatchSpec(global_batch=0, seq=32), BatchSpec(global_batch=16, seq=0)])
def test_an_empty_batch(batch: BatchSpec) -> None:
    assert _only(_check(plan(batch=batch), batch=batch)).rule == "batch_positive"


def test_sequences_longer_than_the_learned_positions() -> None:
    batch = BatchSpec(global_batch=16, seq=33)
    assert _only(_check(plan(), batch=batch)).hint == "model.seq=33, or sequences of at most 32 tokens"
    rows = replace(TINY, seq=16, position_rows=24)
    violation = _only(_check(plan(model=rows), model=rows, batch=BatchSpec(global_batch=16, seq=32)))
    assert (violation.rule, violation.hint[:22]) == ("sequence_within_positions", "model.position_rows=32")
    assert _check(plan(model=LLAMA_TINY), model=LLAMA_TINY, batch=batch) == ()


def test_a_replica_of_padding_alone_is_refused() -> None:
    batch = BatchSpec(global_batch=5, seq=32)
    violation = _only(_check(plan(batch=batch, dp=3, micro_batch=2), batch=batch))
    assert violation.rule == "replicas_within_batch"
    assert violation.message.startswith("dp 3 x micro_batch 2 = 6 rows at a time, the global batch has 5")
    assert violation.hint == "dp at most 2; or micro_batch at most 1; or train.global_batch of 6 or more"


@pytest.mark.parametrize("grad_accum", [5, 7])
def test_accumulation_is_exactly_what_covers_the_batch(grad_accum: int) -> None:
    violation = _only(_check(plan(dp=3, grad_accum=grad_accum)))
    assert violation.rule == "accumulation_exact"
    assert f"grad_accum {grad_accum} x dp 3 = {3 * grad_accum} rows for a global batch of 16" in violation.message
    assert violation.hint == "grad_accum 6 (= 16 / 3, rounded up)"


@pytest.mark.parametrize("stage", [-1, 4])
def test_unknown_zero_stage(stage: int) -> None:
    assert _only(_check(plan(zero_stage=stage))).rule == "zero_stage_known"


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_2_and_3_exclude_a_pipeline(stage: int) -> None:
    violation = _only(_check(plan(pp=2, zero_stage=stage)))
    assert violation.rule == "zero_with_pipeline"
    assert f"zero_stage {stage} with pp 2" in violation.message


def test_context_parallelism_excludes_a_pipeline_and_is_modelled_only() -> None:
    rules = [violation.rule for violation in _check(plan(pp=2, cp=2), modelled=True)]
    assert rules == ["sequence_parallel_with_pipeline"]
    assert _check(plan(cp=2), modelled=True) == ()
    assert _only(_check(plan(cp=2))).rule == "combination_runs"


@pytest.mark.parametrize("degrees", [{}, {"pp": 2}, {"zero_stage": 3}, {"tp": 2, "sequence_parallel": True}])
def test_sequences_that_are_split_run(degrees: dict[str, Any]) -> None:
    assert _check(plan(sp=2, **degrees)) == ()
    assert _check(plan(**degrees)) == ()


def test_ulysses_needs_heads_on_every_shard() -> None:
    violation = _only(_check(plan(tp=2, sp=4), modelled=True))
    assert violation.rule == "heads_divisible_by_sp"
    assert violation.hint == "nearest legal sp: 2"


def test_a_dense_model_has_no_experts() -> None:
    assert _only(_check(plan(dp=2, ep=2))).rule == "experts_need_moe"


def test_dualpipev_needs_two_micro_batches_per_stage() -> None:
    batch = BatchSpec(global_batch=7, seq=32)
    the_plan = plan(batch=batch, pp=4, schedule="dualpipev")
    violation = _only(_check(the_plan, batch=batch, modelled=True))
    assert violation.rule == "schedule_fits"
    assert "2 x pp 4 = 8 or more, found 7" in violation.message
    assert "train.global_batch of 8 or more" in violation.hint
    assert _check(plan(pp=4, schedule="dualpipev"), modelled=True) == ()


def test_virtual_stages_belong_to_the_interleaved_schedule() -> None:
    assert _only(_check(plan(pp=2, vpp=2))).rule == "schedule_fits"
    assert _check(plan(pp=2, vpp=2, schedule="interleaved"), modelled=True) == ()


@pytest.mark.parametrize(("precision", "grad_dtype"), [("fp32", "bf16"), ("bf16", "fp16"), ("fp16", "bf16")])
def test_gradients_have_the_precision_of_the_backward_pass_or_fp32(precision: Any, grad_dtype: Any) -> None:
    the_plan = plan(zero_stage=1, grad_dtype=grad_dtype)
    violation = _only(_check(the_plan, precision=precision, modelled=True))
    assert violation.rule == "gradient_dtype_matches"
    assert f"strategy.grad_dtype={precision}" in violation.hint


def test_mixed_precision_with_fp32_accumulation_needs_zero() -> None:
    violation = _only(_check(plan(precision="bf16", zero_stage=0, grad_dtype="fp32"), precision="bf16"))
    assert violation.rule == "mixed_precision_needs_zero"
    assert violation.hint == "strategy.zero_stage=1 (legal at dp 1, too), or strategy.grad_dtype=bf16"
    assert _check(plan(precision="bf16", zero_stage=0), precision="bf16") == ()


# --- experts, sequences, virtual stages, hardware ---------------------------------------------------------------------

MOE = replace(TINY, name="moe", moe=MoeSpec(experts=12, top_k=2, ffn=96))


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"top_k": 13}, "top_k 13 of 12 experts", "nearest legal model.moe.top_k: 12"),
        ({"dense_layers": 4}, "dense_layers 4 of 4 layers", "nearest legal model.moe.dense_layers: 3"),
        ({"shared_ffn": -1}, "shared_ffn -1", "model.moe.shared_ffn: 0"),
        ({"imbalance": 0.5}, "imbalance 0.5", "model.moe.imbalance: 1"),
        ({"capacity_factor": -1.0}, "capacity_factor -1", "model.moe.capacity_factor: 0"),
        ({"balance_weight": math.inf}, "balance_weight inf", "model.moe.balance_weight: 0"),
        ({"z_weight": math.nan}, "z_weight nan", "model.moe.z_weight: 0"),
    ],
)
def test_experts_that_do_not_add_up(change: dict[str, Any], message: str, hint: str) -> None:
    assert MOE.moe is not None
    model = replace(MOE, moe=replace(MOE.moe, **change))
    violation = _only(_check(plan(model=model), model=model, modelled=True))
    assert violation.rule == "experts_consistent"
    assert message in violation.message
    assert hint in violation.hint


def test_experts_are_spread_evenly_over_replicas() -> None:
    assert _check(plan(model=MOE, dp=4, ep=4), model=MOE, modelled=True) == ()
    violation = _only(_check(plan(model=MOE, dp=5, ep=5), model=MOE, modelled=True))
    assert violation.rule == "experts_divisible_by_ep"
    assert violation.hint == "nearest legal ep: 4 or 6"
    violation = _only(_check(plan(model=MOE, dp=4, ep=3), model=MOE, modelled=True))
    assert violation.rule == "ep_divides_replicas"
    assert violation.message == "ep 3 does not divide dp 4"
    assert violation.hint == "nearest legal ep: 2 or 4"
    assert _check(plan(model=MOE, dp=2, cp=2, ep=4), model=MOE, modelled=True) == ()


def test_everything_that_is_wrong_with_experts_is_told_at_once() -> None:
    assert MOE.moe is not None
    model = replace(MOE, moe=replace(MOE.moe, top_k=13, ffn=90, capacity_factor=-1.0))
    found = _check(plan(model=model, tp=4, dp=5, ep=5), model=model, modelled=True)
    rules = [one.rule for one in found]
    assert rules == ["experts_consistent", "experts_divisible_by_tp", "experts_divisible_by_ep"]
    assert found[0].hint == "nearest legal model.moe.top_k: 12; nearest legal model.moe.capacity_factor: 0"


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_experts_run_under_every_degree(zero_stage: int) -> None:
    for tp, ep in product((1, 2), (1, 2, 4)):
        assert _check(plan(model=MOE, tp=tp, dp=4, ep=ep, zero_stage=zero_stage), model=MOE) == ()
        offloaded = plan(model=MOE, tp=tp, dp=4, ep=ep, zero_stage=zero_stage, offload="optimizer")
        assert zero_stage == 0 or _check(offloaded, model=MOE) == ()
    assert _check(plan(model=MOE, dp=2, sp=2, ep=4, zero_stage=zero_stage), model=MOE) == ()
    if zero_stage < 2:
        assert _check(plan(model=MOE, tp=2, pp=2, dp=4, ep=2, zero_stage=zero_stage), model=MOE) == ()


@pytest.mark.parametrize(
    ("degrees", "message", "hint"),
    [
        ({"zero_stage": 3}, "zero_stage 3 with ep 2 is modelled only", "strategy.zero_stage=2, or strategy.ep=1"),
        ({"cp": 2, "ep": 4}, "cp 2: context parallelism is modelled only", "strategy.cp=1"),
    ],
)
def test_what_does_not_run_with_experts(degrees: dict[str, Any], message: str, hint: str) -> None:
    the_plan = plan(model=MOE, **({"dp": 2, "ep": 2} | degrees))
    violation = _only(_check(the_plan, model=MOE))
    assert violation.rule == "combination_runs"
    assert message in violation.message
    assert hint in violation.hint
    assert _check(replace(the_plan, ep=1, cp=1, zero_stage=1), model=MOE) == ()


def test_experts_in_16_bit_need_zero() -> None:
    the_plan = plan(model=MOE, precision="bf16", dp=2, ep=2, zero_stage=0, grad_dtype="bf16")
    violation = _only(_check(the_plan, model=MOE, precision="bf16"))
    assert violation.message.startswith("zero_stage 0 with ep 2 and gradients in bf16")
    assert violation.hint == "strategy.zero_stage=1"
    assert _check(replace(the_plan, zero_stage=1), model=MOE, precision="bf16") == ()


def test_other_code_spreads_experts_over_tensor_parallel_ranks_too() -> None:
    the_plan = plan(model=MOE, tp=2, dp=2, ep=4)
    assert _only(_check(the_plan, model=MOE, modelled=True)).rule == "ep_divides_replicas"
    assert _check(the_plan, model=MOE, modelled=True, engine=False) == ()


def test_tensor_parallelism_cuts_experts() -> None:
    assert MOE.moe is not None
    model = replace(MOE, moe=replace(MOE.moe, ffn=90))
    violation = _only(_check(plan(model=model, tp=4), model=model, modelled=True))
    assert violation.rule == "experts_divisible_by_tp"
    assert violation.hint == "nearest legal tp: 2"
    assert legal_tp(model) == [1, 2]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            {"latent": LatentAttention(q_rank=8, kv_rank=8, nope_width=8, rope_width=4, value_width=8)},
            "latent attention",
        ),
        ({"embed_norm": True}, "a norm after the embedding"),
        ({"gated": True}, "a feed-forward block of the other flavour"),
        ({"position_rows": 0}, "positions of the other flavour"),
    ],
)
def test_a_model_that_our_code_would_build_otherwise_is_modelled_only(change: dict[str, Any], part: str) -> None:
    model = replace(TINY, **change)
    violation = _only(_check(plan(model=model), model=model))
    assert violation.rule == "combination_runs"
    assert part in violation.message
    assert "modelled only" in violation.message
    assert _check(plan(model=model), model=model, modelled=True) == ()
    same = replace(TINY, gated=False, head_width=16, position_rows=32)
    assert _check(plan(model=same), model=same) == ()
    ours = replace(TINY, head_width=32, position_rows=40)
    assert _check(plan(model=ours), model=ours) == ()


def test_heads_of_their_own_width_need_not_share_the_hidden_width() -> None:
    model = replace(LLAMA_TINY, hidden=50, head_width=8)
    assert _check(plan(model=model), model=model, modelled=True) == ()
    odd = replace(model, head_width=7)
    assert _only(_check(plan(model=odd), model=odd, modelled=True)).hint == "nearest legal head_width: 6 or 8"


def test_the_sequence_is_cut_evenly() -> None:
    batch = BatchSpec(global_batch=16, seq=24)
    violation = _only(_check(plan(batch=batch, cp=8), batch=batch, modelled=True))
    assert violation.rule == "sequence_divisible"
    assert violation.message == "sequences of 24 tokens are not divisible by sp 1 x 2 x cp 8 = 16"
    assert violation.hint == "nearest legal cp: 6 or 12"
    batch = BatchSpec(global_batch=16, seq=30)
    violation = _only(_check(plan(batch=batch, sp=4), batch=batch, modelled=True))
    assert violation.hint == "nearest legal sp: 3 or 5"


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    violation = _only(_check(plan(sequence_parallel=True), modelled=True))
    assert violation.rule == "sequence_parallel_fits"
    assert "strategy.tp of 2 or more" in violation.hint
    assert _check(plan(tp=2, sequence_parallel=True), modelled=True) == ()
    batch = BatchSpec(global_batch=16, seq=30)
    violation = _only(_check(plan(batch=batch, tp=4, sequence_parallel=True), batch=batch, modelled=True))
    assert violation.message == "sequence_parallel: 30 tokens of a sequence per rank are not divisible by tp 4"
    assert violation.hint == "strategy.sequence_parallel=false; or nearest legal tp: 3 or 5"


def test_virtual_stages_cut_every_stage_evenly() -> None:
    def broken(stages: tuple[int, ...], vpp: int, *, engine: bool = True) -> list[str]:
        model = replace(TINY, layers=sum(stages))
        the_plan = plan(model=model, pp=len(stages), stages=stages, vpp=vpp, schedule="interleaved")
        return [v.rule for v in _check(the_plan, model=model, modelled=True, engine=engine)]

    assert broken((4, 4), 2) == broken((4, 4), 4) == []
    assert broken((4, 4), 3) == ["virtual_stages_divide_blocks"]
    assert broken((7, 8, 8, 7), 8) == []  # embedding and head count as blocks
    assert broken((8, 7, 7, 8), 8) == ["virtual_stages_divide_blocks"]
    assert broken((5, 5), 2, engine=False) == []
    assert broken((1, 2), 2, engine=False) == []
    model = replace(TINY, layers=12)
    violation = _only(_check(plan(model=model, pp=2, vpp=4, schedule="interleaved"), model=model, modelled=True))
    assert violation.message == "stage 0 has 6 blocks, not divisible into vpp 4 virtual stages"
    assert violation.hint == "nearest legal vpp: 3 or 6"


def test_interleaving_works_in_whole_rounds() -> None:
    batch = BatchSpec(global_batch=12, seq=32)
    model = replace(TINY, layers=16)
    the_plan = plan(model=model, batch=batch, pp=8, vpp=2, schedule="interleaved")
    violation = _only(_check(the_plan, model=model, batch=batch, modelled=True))
    assert violation.rule == "interleaving_in_rounds"
    assert violation.message == "grad_accum 12 is not divisible by pp 8, as the interleaved schedule needs"
    assert violation.hint.startswith("nearest legal train.global_batch: 8 or 16")


V100 = Hardware(
    flops_fp32=15e12,
    flops_16=125e12,
    bf16=False,
    processors=80,
    memory_bandwidth=9e11,
    intra_bandwidth=150e9,
    intra_latency_s=2e-6,
    inter_bandwidth=12e9,
    inter_latency_s=5e-6,
)


def test_devices_without_the_arithmetic() -> None:
    cluster = replace(FOUR_BY_TWO, device="V100-16GB", hardware=V100)
    violation = _only(_check(plan(precision="bf16"), cluster=cluster, precision="bf16", modelled=True))
    assert (violation.rule, violation.message) == ("precision_supported", "devices of kind V100-16GB have no bf16")
    assert violation.hint == "train.precision=fp16, or fp32"
    for precision in ("fp16", "fp32"):
        assert _check(plan(precision=precision), cluster=cluster, precision=precision, modelled=True) == ()
    newer = replace(cluster, hardware=replace(V100, bf16=True))
    violation = _only(_check(plan(precision="fp8"), cluster=newer, precision="fp8", modelled=True))
    assert violation.hint == "train.precision=bf16, or fp32"
    newest = replace(cluster, hardware=replace(V100, bf16=True, flops_fp8=1e15))
    assert _check(plan(precision="fp8"), cluster=newest, precision="fp8", modelled=True) == ()


def test_links_without_speed_are_all_named() -> None:
    bad = replace(V100, inter_bandwidth=0.0, intra_bandwidth=-3.0, restart_s=-1.0)
    violation = _only(_check(plan(), cluster=replace(FOUR_BY_TWO, hardware=bad)))
    assert violation.rule == "hardware_has_speeds"
    assert violation.message == "the hardware has intra_bandwidth -3, inter_bandwidth 0, restart_s -1"
    for hint in ("cluster.hardware.inter_bandwidth more than 0", "cluster.hardware.restart_s=0 or more"):
        assert hint in violation.hint


@pytest.mark.parametrize(
    ("degrees", "precision", "rule"),
    [
        ({"pp": 2, "zero_stage": 3}, "fp32", "zero_with_pipeline"),
        ({"pp": 2, "cp": 2}, "fp32", "sequence_parallel_with_pipeline"),
        ({"zero_stage": 0, "grad_dtype": "fp32"}, "bf16", "mixed_precision_needs_zero"),
    ],
)
def test_what_only_our_engine_refuses(degrees: dict[str, Any], precision: Any, rule: str) -> None:
    the_plan = plan(precision=precision, **degrees)
    assert _only(_check(the_plan, precision=precision, modelled=True)).rule == rule
    assert _check(the_plan, precision=precision, modelled=True, engine=False) == ()
    assert _only(_check(the_plan, precision=precision, engine=False)).rule in MODELLED_ONLY


def test_other_code_copies_key_value_heads() -> None:
    model = replace(TINY, heads=8, kv_heads=2, hidden=64)
    assert _only(_check(plan(model=model, tp=4), model=model, modelled=True)).rule == "kv_heads_divisible_by_tp"
    assert _check(plan(model=model, tp=4), model=model, modelled=True, engine=False) == ()


@pytest.mark.parametrize(
    ("degrees", "word"),
    [
        ({"pp": 2, "schedule": "interleaved", "vpp": 2}, "schedule interleaved"),
        ({"cp": 2}, "context parallelism"),
    ],
)
def test_what_can_only_be_modelled_says_so(degrees: dict[str, Any], word: str) -> None:
    violation = _only(_check(plan(**degrees)))
    assert violation.rule == "combination_runs"
    assert word in violation.message
    assert "modelled only" in violation.message
    assert _check(plan(**degrees), modelled=True) == ()


@pytest.mark.parametrize(
    ("degrees", "rule", "hint"),
    [
        ({"offload": "optimizer"}, "offload_needs_zero", "strategy.zero_stage=1, or strategy.offload=none"),
        (
            {"offload": "optimizer+params", "zero_stage": 1},
            "offload_needs_zero",
            "strategy.zero_stage=3, or strategy.offload=optimizer, or strategy.offload=none",
        ),
        (
            {"offload": "optimizer", "zero_stage": 2, "offload_path": "/disks"},
            "disks_need_zero_three",
            "strategy.zero_stage=3, or strategy.offload_path=null (host memory)",
        ),
    ],
)
def test_what_deepspeed_cannot_move_is_refused(degrees: dict[str, Any], rule: str, hint: str) -> None:
    violation = _only(_check(plan(dp=2, **degrees), modelled=True))
    assert (violation.rule, violation.hint) == (rule, hint)
    assert _check(plan(dp=2, **degrees), modelled=True, engine=False) == ()


@pytest.mark.parametrize(
    "degrees",
    [
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 1, "pp": 2},
        {"zero_stage": 1, "tp": 2, "pp": 2},
        {"zero_stage": 1, "pp": 2, "schedule": "dualpipev"},
    ],
)
def test_the_optimizer_may_live_in_host_memory(degrees: dict[str, Any]) -> None:
    for precision in ("fp32", "bf16"):
        assert runnable(plan(precision=precision, dp=2, offload="optimizer", **degrees), precision, TINY) is None


@pytest.mark.parametrize("offload", ["optimizer", "optimizer+params"])
def test_state_may_live_on_disks_with_zero_three(offload: Offload) -> None:
    for tp in (1, 2):
        the_plan = plan(precision="bf16", tp=tp, dp=2, zero_stage=3, offload=offload, offload_path="/disks")
        assert runnable(the_plan, "bf16", TINY) is None


def test_a_combination_outside_of_the_table_is_not_runnable() -> None:
    violation = runnable(plan(zero_stage=7), "fp32", TINY)
    assert violation is not None
    assert violation.rule == "combination_probed"


def test_all_violations_come_at_once_and_none_twice() -> None:
    model = replace(TINY, heads=6, kv_heads=4, ffn=250)
    the_plan = plan(model=model, tp=4, pp=9, dp=3, micro_batch=8, zero_stage=3, ep=2, grad_dtype="bf16")
    found = [v.rule for v in _check(the_plan, model=model, cluster=FOUR_BY_TWO)]
    assert found == [
        "hidden_divisible_by_heads",
        "heads_divisible_by_kv_heads",
        "heads_divisible_by_tp",
        "ffn_divisible_by_tp",
        "pp_at_most_layers",
        "world_size_fits_cluster",
        "replicas_within_batch",
        "zero_with_pipeline",
        "experts_need_moe",
        "gradient_dtype_matches",
    ]


def test_require_raises_with_everything() -> None:
    with pytest.raises(
        PlanInfeasible, match=r"breaks 2 rules(?s:.*)pp_at_most_layers(?s:.*)zero_with_pipeline"
    ) as info:
        require(model=TINY, plan=plan(pp=5, zero_stage=2), batch=BATCH, cluster=None, precision="fp32")
    assert [violation.rule for violation in info.value.violations] == ["pp_at_most_layers", "zero_with_pipeline"]
    assert info.value.exit_code == 3
    require(model=TINY, plan=plan(), batch=BATCH, cluster=FOUR_BY_TWO, precision="fp32")


def test_rules_have_unique_names_and_docstrings() -> None:
    names = [rule.__name__ for rule in RULES]
    assert len(set(names)) == len(names)
    assert all(rule.__doc__ for rule in RULES)


@pytest.mark.parametrize("seed", range(400))
def test_rules_never_raise_and_name_themselves(seed: int) -> None:
    rng = random.Random(seed)

    def number() -> int:
        return rng.choice([-2, 0, 1, 1, 2, 3, 4, 6, 7, 16])

    sizes: dict[str, Any] = {
        name: number() for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq")
    }
    moe = MoeSpec(experts=number(), top_k=number(), ffn=number(), dense_layers=number(), shared_ffn=number())
    latent = LatentAttention(q_rank=0, kv_rank=number(), nope_width=number(), rope_width=number(), value_width=1)
    model = ModelSpec(
        name="random",
        flavour=rng.choice(["gpt3", "llama"]),
        **sizes,
        head_width=rng.choice([0, 0, 3, 8]),
        moe=rng.choice([None, moe]),
        latent=rng.choice([None, None, latent]),
    )
    batch = BatchSpec(global_batch=number(), seq=number())
    hardware = rng.choice([None, replace(V100, inter_bandwidth=float(number()))])
    cluster = replace(FOUR_BY_TWO, nodes=number(), slots_per_node=number(), spares=number(), hardware=hardware)
    degrees: dict[str, Any] = {
        name: number() for name in ("tp", "pp", "dp", "ep", "sp", "cp", "vpp", "micro_batch", "grad_accum")
    }
    the_plan = ParallelPlan(
        **degrees,
        zero_stage=number(),
        stages=tuple(number() for _ in range(rng.randint(0, 4))),
        schedule=rng.choice(["1f1b", "interleaved", "dualpipev"]),
        grad_dtype=rng.choice(["fp32", "bf16", "fp16"]),
        sequence_parallel=rng.random() < 0.5,
    )
    case = Case(
        model=model,
        plan=the_plan,
        batch=batch,
        cluster=cluster,
        precision=rng.choice(["fp32", "bf16", "fp8"]),
        engine=rng.random() < 0.5,
    )
    for rule in RULES:
        violation = rule(case)
        if violation is not None:
            assert violation.rule == rule.__name__
            assert violation.message
            assert violation.hint


@pytest.mark.parametrize("seed", range(100))
def test_the_nearest_legal_tp_is_legal(seed: int) -> None:
    rng = random.Random(seed)
    model, tp = random_model(rng), rng.randint(1, 40)
    tensor_rules = {f"{name}_divisible_by_tp" for name in ("heads", "kv_heads", "ffn", "hidden")}

    def breaks(degree: int) -> bool:
        return any(v.rule in tensor_rules for v in _check(plan(model=model, tp=degree), model=model))

    legal = legal_tp(model)
    assert breaks(tp) == (tp not in legal)
    assert not any(breaks(value) for value in nearest(tp, legal))


def test_nearest_and_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
    assert divisors(0) == divisors(-4) == []
    assert nearest(4, [1, 2, 3, 6]) == (3, 6)
    assert nearest(9, [1, 3, 6]) == (6,)
    assert nearest(0, [1, 3]) == (1,)
    assert nearest(5, []) == ()

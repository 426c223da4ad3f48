"""Seconds of steps: totals, what makes a step slower, and cases computed by hand."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any, cast

import pytest

from strategies import calibrated
from strategies.calibration import BEST, STRUCTURE, Calibration, assemble, generation, lookup
from strategies.collectives import all_reduce_s, gather_s
from strategies.errors import ConfigError
from strategies.model_state import model_state_bytes
from strategies.plan import ParallelPlan, accumulation, split_layers
from strategies.specs import LatentAttention, ModelSpec, MoeSpec
from strategies.timing import StepTime, Timing
from strategies.workload import Framework, Workload
from tests.strategies import runs

BLOCK_KINDS = StepTime._fields[:7]
DEEP = replace(
    runs.GPT3,
    name="deep",
    flavour="llama",
    tied=False,
    layers=12,
    hidden=4096,
    heads=32,
    kv_heads=32,
    ffn=2048,
    moe=MoeSpec(experts=64, top_k=6, ffn=1408, dense_layers=3, shared_ffn=2816),
    latent=LatentAttention(q_rank=1536, kv_rank=512, nope_width=128, rope_width=64, value_width=128),
)


def plan_of(work: Workload, **degrees: Any) -> ParallelPlan:
    """A plan whose stages and accumulation follow from the degrees; legality does not matter to time."""
    made = {"tp": 1, "pp": 1, "dp": 1, "micro_batch": 1, "zero_stage": 1} | degrees
    stages = split_layers(work.model.layers, made["pp"])
    made.setdefault("stages", stages)
    made.setdefault("grad_accum", accumulation(work.batch.global_batch, made["micro_batch"], made["dp"]))
    return ParallelPlan(**made)


def seconds(work: Workload, **degrees: Any) -> float:
    return sum(Timing(work).step(plan_of(work, **degrees)))


def random_plan(rng: random.Random, work: Workload) -> ParallelPlan:
    pp = rng.choice([1, 2, 3, 4, 8])
    schedule = rng.choice(["1f1b", "interleaved", "dualpipev"])
    return plan_of(
        work,
        tp=rng.choice([1, 2, 4, 8, 16]),
        pp=pp,
        dp=rng.choice([1, 2, 8, 32]),
        sp=rng.choice([1, 1, 2]),
        cp=rng.choice([1, 1, 2, 4]),
        ep=rng.choice([1, 2, 8]) if work.model.moe else 1,
        micro_batch=rng.choice([1, 2, 3, 8]),
        zero_stage=rng.choice([0, 1, 2, 3]),
        schedule=schedule,
        vpp=rng.choice([2, 3]) if schedule == "interleaved" else 1,
        recompute=rng.choice(["none", "selective", "full"]),
        flash=rng.random() < 0.5,
        sequence_parallel=rng.random() < 0.5,
        offload=rng.choice(["none", "none", "optimizer", "optimizer+params"]),
        grad_dtype=rng.choice(["fp32", "bf16"]),
    )


def test_a_cluster_without_hardware_has_no_time() -> None:
    work = runs.work()
    with pytest.raises(ConfigError, match="hardware"):
        Timing(replace(work, cluster=replace(work.cluster, hardware=None)))


@pytest.mark.parametrize("model", [runs.GPT3, runs.GPT4, DEEP], ids=lambda model: cast(ModelSpec, model).name)
@pytest.mark.parametrize("framework", ["megatron", "fsdp", "mcore"])
def test_every_kind_is_finite_and_explained(model: ModelSpec, framework: Framework) -> None:
    work = replace(runs.work(model), framework=framework)
    timing, rng = Timing(work), random.Random(3)
    for _ in range(60):
        plan = random_plan(rng, work)
        step = timing.step(plan)
        assert all(0.0 <= kind < 1e9 for kind in step), step
        assert Timing(work).step(plan) == step, "what is remembered must not change the answer"
        terms = timing.explain(plan)
        assert [term.kind for term in terms] == list(StepTime._fields)
        assert tuple(term.value for term in terms) == step
        assert all(term.unit == "s" and term.formula and term.numbers for term in terms)


def test_an_ideal_machine_takes_model_flops_over_peak() -> None:
    """Without communication, memory traffic and waits, a step of one rank is its operations over the peak."""
    work = runs.work(nodes=1, batch=4, memory_bandwidth=1e30)
    ideal = Calibration(linear=1, half=1, batched=1, flash=1, bandwidth=1, depth=0, wave=0, host_block_s=0)
    ideal = replace(ideal, host_step_s=0.0, blend=1.0)
    timing = Timing(replace(work, model=replace(work.model, vocab=50304)), ideal)
    plan = plan_of(work, flash=False, zero_stage=0)
    model_flops, hardware_flops = timing.flops(plan)
    assert model_flops == hardware_flops
    assert sum(timing.step(plan)) == pytest.approx(model_flops / 312e12, rel=1e-3)


def test_flops_follow_the_published_formula() -> None:
    """96 B s l h^2 (1 + s/6h + V/16h l) of arXiv 2104.04473 counts recomputation, 72 of 96 are the model's."""
    work = runs.work()
    m, b = work.model, work.batch
    plan = plan_of(work, tp=8, pp=16, dp=8, recompute="full", flash=False)
    useful, done = Timing(work).flops(plan)
    base = b.global_batch * b.seq * m.layers * m.hidden**2
    assert done == pytest.approx(
        96 * base * (1 + b.seq / (6 * m.hidden) + m.vocab / (16 * m.layers * m.hidden)), rel=1e-4
    )
    assert useful == pytest.approx(
        72 * base * (1 + b.seq / (6 * m.hidden) + m.vocab / (12 * m.layers * m.hidden)), rel=1e-4
    )


def test_flops_of_experts_count_those_that_are_visited() -> None:
    work = runs.work(runs.GPT4)
    useful, _ = Timing(work).flops(plan_of(work, ep=4, dp=8))
    m = work.model
    per_token = m.layers * (8 * m.hidden**2 + 2 * 4 * m.hidden * m.ffn + 4 * work.batch.seq * m.hidden)
    assert useful == pytest.approx(3 * (per_token + 2 * m.vocab * m.hidden) * work.batch.tokens, rel=1e-3)


def test_selene_trains_gpt3_in_about_34_days() -> None:
    """arXiv 2104.04473, section 5.1: 175 B, 300 G tokens, 1024 A100, batch 1536: 34 days with 140 TFLOP/s each."""
    work = runs.work(nodes=128)
    step = seconds(work, tp=8, pp=8, dp=16, recompute="full", flash=False, zero_stage=0, grad_dtype="bf16")
    assert 300e9 / work.batch.tokens * step / 86400 == pytest.approx(34, rel=0.1)


def test_recomputation_costs_a_forward_pass() -> None:
    work = runs.work()
    none, selective, full = (
        Timing(work).step(plan_of(work, tp=8, pp=8, dp=16, flash=False, recompute=kind))
        for kind in ("none", "selective", "full")
    )
    assert selective.attention == pytest.approx(full.attention)
    assert selective.gemm == none.gemm
    assert 1.3 < full.gemm / none.gemm < 1.36
    assert sum(none) < sum(selective) < sum(full)


def test_selective_recomputation_of_fused_attention_is_free() -> None:
    work = runs.work()
    shape: dict[str, Any] = {"tp": 8, "pp": 8, "dp": 16, "flash": True}
    assert seconds(work, **shape, recompute="selective") == seconds(work, **shape, recompute="none")


def test_bubbles_shrink_with_virtual_stages_and_dualpipev() -> None:
    timing = Timing(runs.work())
    shape: dict[str, Any] = {"tp": 8, "pp": 8, "dp": 16}
    plain = timing.step(plan_of(timing.work, **shape))
    virtual = timing.step(plan_of(timing.work, **shape, schedule="interleaved", vpp=3))
    assert virtual.bubble == pytest.approx(plain.bubble / 3)
    assert virtual.p2p > 2 * plain.p2p
    assert timing.step(plan_of(timing.work, **shape, schedule="dualpipev")).bubble == pytest.approx(plain.bubble / 3)
    stages = sum(plain[:7]) - timing.calibration.host_step_s
    assert plain.bubble == pytest.approx(7 / 96 * stages, rel=0.2), "(p - 1) / m of the work, for even stages"


def test_the_slowest_stage_rules() -> None:
    timing = Timing(runs.work(batch=64))
    even = plan_of(timing.work, tp=8, pp=4, dp=1)
    skewed = replace(even, stages=(20, 20, 36, 20))
    assert sum(timing.step(skewed)) > 1.3 * sum(timing.step(even))
    relieved = replace(even, stages=(25, 24, 24, 23))
    assert sum(timing.step(relieved)) != sum(timing.step(even))


def test_stages_with_leading_dense_blocks_differ() -> None:
    timing = Timing(runs.work(DEEP))
    first = timing.slowest(timing.unit_of(plan_of(timing.work)), plan_of(timing.work, pp=4))
    assert (first.dense, first.moe) != (0, 0)
    assert timing.slowest(timing.unit_of(plan_of(timing.work)), plan_of(timing.work)).dense == 3


def test_tensor_parallelism_over_nodes_is_a_cliff() -> None:
    work = runs.work()
    inside, outside = (Timing(work).step(plan_of(work, tp=tp, pp=8, dp=8)).tp for tp in (8, 16))
    assert outside > 1.5 * inside


def test_tensor_parallel_ranks_wait_for_each_other_under_deepspeed() -> None:
    ours, megatron = replace(runs.work(), deepspeed=True), runs.work()
    shape: dict[str, Any] = {"tp": 8, "pp": 8, "dp": 16, "zero_stage": 0}
    with_skew, without = (Timing(work).step(plan_of(work, **shape)) for work in (ours, megatron))
    sums = 96 * 12 * 4  # micro-batches, blocks and collectives of a block, each with a skew of all 8 ranks
    assert with_skew.tp - without.tp == pytest.approx(sums * 8 * Timing(ours).calibration.skew_s)
    assert Timing(ours).step(plan_of(ours, dp=16)).tp == 0.0


def test_sequence_parallelism_saves_memory_bound_work_only() -> None:
    timing = Timing(runs.work())
    without, within = (
        timing.step(plan_of(timing.work, tp=8, pp=8, dp=16, sequence_parallel=flag)) for flag in (False, True)
    )
    assert within.memory_bound < without.memory_bound
    assert (within.gemm, within.attention, within.tp) == (without.gemm, without.attention, without.tp)


def test_zero_stages_send_more_and_update_less() -> None:
    work = runs.work()
    steps = [Timing(work).step(plan_of(work, tp=8, dp=16, zero_stage=zero, micro_batch=4)) for zero in range(4)]
    assert steps[1].optimizer < steps[0].optimizer
    assert steps[1].dp <= steps[2].dp <= steps[3].dp
    narrow: dict[str, Any] = {"tp": 8, "dp": 16, "micro_batch": 4, "grad_dtype": "bf16"}
    whole, cut = (Timing(work).step(plan_of(work, **narrow, zero_stage=zero)).dp for zero in (0, 1))
    assert whole == pytest.approx(cut), "a sum is a reduction and a gathering"
    deepspeed = Timing(replace(work, deepspeed=True)).step(plan_of(work, **narrow, zero_stage=1)).dp
    assert deepspeed > 1.5 * cut, "whole gradients, in buckets"


def test_fully_sharded_small_micro_batches_are_a_cliff() -> None:
    work = replace(runs.work(nodes=48, batch=1536), framework="fsdp")
    large, small = (seconds(work, dp=384, zero_stage=3, micro_batch=size) for size in (4, 1))
    assert small > 1.2 * large


def test_offloading_replaces_the_update() -> None:
    timing = Timing(runs.work())
    shape: dict[str, Any] = {"tp": 8, "pp": 8, "dp": 16}
    kept, half, all_ = (
        timing.step(plan_of(timing.work, **shape, offload=kind)) for kind in ("none", "optimizer", "optimizer+params")
    )
    assert kept.offload == half.optimizer == 0.0
    assert 0.0 < half.offload < all_.offload


def test_disks_read_and_write_the_state_once_a_step() -> None:
    """4 tensors of fp32 both ways, over the disks that the ranks of a node share; parameters in every pass, too."""
    work = runs.work(nodes=16)
    shape: dict[str, Any] = {"tp": 8, "dp": 16, "zero_stage": 3}
    for kind, size in (("optimizer", 32.0), ("optimizer+params", 32.0 + 2.0)):
        plan = plan_of(work, **shape, offload=kind)
        swapped = replace(plan, offload_path="/nvme")
        if kind == "optimizer+params":
            size += 2 * 2.0 * plan.grad_accum
        timing = Timing(work)
        added = timing.step(swapped).offload - timing.step(plan).offload
        local = timing.stage_weights(timing.unit_of(plan), timing.slowest(timing.unit_of(plan), plan), plan) / 16
        assert added == pytest.approx(size * local / (work.hardware.disk_bandwidth / 8))
    faster = replace(work.hardware, disk_bandwidth=2 * work.hardware.disk_bandwidth)
    fast = Timing(replace(work, cluster=replace(work.cluster, hardware=faster)))
    assert fast.step(swapped).offload - fast.step(plan).offload == pytest.approx(added / 2)


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("ep", [1, 4, 16])
def test_what_is_updated_is_the_state_that_a_rank_has(ep: int, zero: int) -> None:
    """Experts' state is shared by the replicas that hold the same experts, which are fewer."""
    work = runs.work(runs.GPT4)
    plan = plan_of(work, tp=8, dp=64, ep=ep, zero_stage=zero)
    (state,) = model_state_bytes(work.model, plan, work.precision)
    step, away = Timing(work).step(plan), Timing(work).step(replace(plan, offload="optimizer"))
    bandwidth = Timing(work).device.bandwidth
    assert step.optimizer * bandwidth / 40 == pytest.approx(state["optimizer"] / 12, rel=1e-2)
    assert away.offload * work.hardware.host_bandwidth / 34 == pytest.approx(state["optimizer"] / 12, rel=1e-2)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("ep", [1, 4])
def test_shards_of_experts_gather_what_visits_them(ep: int, split: bool) -> None:
    """As phalanx runs them; Megatron-Core's experts are whole, so their tokens stay where attention left them."""
    work = runs.work(runs.GPT4)
    plan = plan_of(work, tp=8, dp=4, ep=ep, sequence_parallel=split)
    timing, others = Timing(work), Timing(replace(work, framework="mcore"))
    net, stream = timing.network, 2 * 8192 * 10752
    sums = 2 * all_reduce_s(net, stream, 8)  # of attention
    if ep == 1:
        routed = 2 * all_reduce_s(net, stream, 8) + split * 2 * gather_s(net, stream, 8)
    else:
        routed = 2 * all_reduce_s(net, 2 * 1.1 * stream, 8) + gather_s(net, 4 * 8192 * 16, 8)
        routed += (not split) * 2 * gather_s(net, stream, 8)
    assert timing.unit_of(plan).moe.tp == pytest.approx(sums + routed)
    assert others.unit_of(plan).moe.tp == pytest.approx(
        4 * others.calibration.tp_exposed * all_reduce_s(others.network, stream, 8)
    )


def test_a_context_ring_hides_under_attention() -> None:
    work = replace(runs.work(replace(runs.GPT3, seq=131072), batch=8))
    step = Timing(work).step(plan_of(work, tp=8, cp=8))
    assert step.cp == 0.0
    short = Timing(runs.work()).step(plan_of(runs.work(), tp=8, cp=8))
    assert short.cp > 0.0


def test_small_models_wait_for_the_host() -> None:
    small = replace(runs.GPT3, layers=24, hidden=1024, heads=16, kv_heads=16, ffn=4096, seq=1024, position_rows=1024)
    step = Timing(runs.work(small, nodes=1, batch=8)).step(plan_of(runs.work(small, nodes=1, batch=8), dp=8))
    assert step.launch > step.gemm
    large = Timing(runs.work()).step(plan_of(runs.work(), tp=8, pp=8, dp=16))
    assert large.launch < 0.01 * large.gemm


def test_exchanges_between_experts_grow_over_nodes() -> None:
    work = runs.work(runs.GPT4)
    none, inside, outside = (Timing(work).step(plan_of(work, dp=64, ep=ep)).ep for ep in (1, 8, 16))
    assert none == 0.0 < inside < outside


def test_rows_of_heads_that_are_not_aligned_are_slow() -> None:
    """BLOOM: hidden 14400 is slower than 13824 by more than its operations (8.5 %)."""
    times = []
    for hidden, heads in ((13824, 108), (14400, 96)):
        model = replace(runs.GPT3, hidden=hidden, heads=heads, kv_heads=heads, ffn=4 * hidden, layers=80)
        times.append(seconds(runs.work(model), tp=8, pp=10, dp=4, micro_batch=2, recompute="full", flash=False))
    assert 1.15 < times[1] / times[0] < 1.5


@pytest.mark.parametrize(
    "change",
    [
        {"flops_16": 624e12},
        {"memory_bandwidth": 4e12},
        {"intra_bandwidth": 600e9},
        {"inter_bandwidth": 50e9},
        {"inter_latency_s": 1e-6},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_better_machine_is_never_slower(change: dict[str, Any]) -> None:
    rng = random.Random(5)
    for _ in range(20):
        plan = random_plan(rng, runs.work())
        assert sum(Timing(runs.work(**change)).step(plan)) <= sum(Timing(runs.work()).step(plan)) * (1 + 1e-12)


def test_tokens_get_cheaper_in_larger_micro_batches() -> None:
    timing = Timing(runs.work())
    per_row = [
        sum(timing.step(plan_of(timing.work, tp=8, micro_batch=size, grad_accum=1))[:7]) / size for size in (1, 2, 4, 8)
    ]
    assert per_row == sorted(per_row, reverse=True)


# --- calibration -----------------------------------------------------------------------------------------------------


def test_constants_are_few_and_within_physics() -> None:
    assert len(calibrated.CONSTANTS) <= calibrated.ROWS / 10
    assert len({constant[:4] for constant in calibrated.CONSTANTS}) == len(calibrated.CONSTANTS)
    for constant in calibrated.CONSTANTS:
        assert constant.field in Calibration.__dataclass_fields__
        assert constant.least <= constant.value <= constant.most
        assert {constant.device} <= {"*", "V100", "A100", "H100", "B200"}
        assert {constant.framework} <= {"*", *STRUCTURE}
        assert {constant.precision} <= {"*", "16", "fp8"}


def test_the_most_special_constant_wins() -> None:
    base = calibrated.Constant("traffic", "*", "*", "*", 1.0, 0.5, 9.0)
    constants = [base, base._replace(framework="megatron", value=2.0), base._replace(device="A100", value=3.0)]
    assert assemble("A100", "megatron", "16", constants).traffic == 3.0
    assert assemble("H100", "megatron", "16", constants).traffic == 2.0
    assert assemble("H100", "fsdp", "16", constants).traffic == 1.0
    assert assemble("H100", "mcore", "16", constants).traffic == 1.0


def test_relatives_stand_in_with_a_warning() -> None:
    work = runs.work()
    assert lookup(work).warnings == ()
    new = replace(work, cluster=replace(work.cluster, device="MI300X"))
    found = lookup(new)
    assert found.linear == BEST["MI300X"] < lookup(work).linear, "no faster than the best measured product"
    assert any("MI300X" in warning for warning in found.warnings)
    low, high, warnings = Timing(new).band(plan_of(work, tp=8, pp=8, dp=16), 10.0)
    assert low < 10.0 < high
    assert warnings
    assert high / low > Timing(work).band(plan_of(work, tp=8, pp=8, dp=16), 10.0)[1] / 10.0


def test_generations_share_their_processor() -> None:
    pairs = {"A100-80GB": "A100", "A100-40GB": "A100", "H200": "H100", "GB200": "B200", "cpu": "CPU"}
    assert {name: generation(name) for name in pairs} == pairs


def test_precision_without_runs_warns() -> None:
    work = replace(runs.work(), precision="fp32")
    assert any("fp32" in warning for warning in lookup(work).warnings)
    assert any("fp8" in warning for warning in lookup(replace(work, precision="fp8")).warnings)


def test_outside_of_the_calibrated_range_warns() -> None:
    work = runs.work(replace(runs.GPT3, hidden=49152, heads=384, kv_heads=384, ffn=4 * 49152))
    _, _, warnings = Timing(work).band(plan_of(work, tp=8, pp=8, dp=16), 1.0)
    assert any("hidden 49,152" in warning for warning in warnings)
    assert Timing(runs.work()).band(plan_of(runs.work(), tp=8, pp=8, dp=16), 1.0)[2] == ()


def test_experts_get_a_range_instead_of_a_point() -> None:
    dense, experts = lookup(runs.work()), lookup(runs.work(runs.GPT4))
    assert experts.high - experts.low > dense.high - dense.low


@pytest.mark.parametrize(("framework", "precision"), [*itertools.product(STRUCTURE, ["bf16", "fp8", "fp32", "fp16"])])
def test_every_combination_has_a_calibration(framework: Framework, precision: Any) -> None:
    for device in ("V100-32GB", "A100-80GB", "H100-80GB", "B200", "TPU-v4", "cpu"):
        work = runs.work()
        work = replace(work, framework=framework, precision=precision, cluster=replace(work.cluster, device=device))
        assert seconds(work, tp=8, pp=8, dp=16) > 0.0


@pytest.mark.parametrize("degrees", [{"tp": 16}, {"tp": 8, "cp": 2}, {"tp": 8, "ep": 2}], ids=str)
def test_ways_to_cut_that_few_runs_used_widen_the_band(degrees: dict[str, int]) -> None:
    timing = Timing(runs.work())
    low, high, warnings = timing.band(plan_of(timing.work, dp=8, **degrees), 1.0)
    new_low, new_high = calibrated.BANDS["new"]
    assert low == pytest.approx(math.exp(new_low))
    assert high == pytest.approx(math.exp(new_high))
    name, value = list(degrees.items())[-1]
    assert any(f"{name}={value}" in warning for warning in warnings)
    usual = timing.band(plan_of(timing.work, dp=8, tp=8), 1.0)
    assert (low, high) != usual[:2]
    assert not usual[2]


def test_no_share_is_taken_of_measured_figures() -> None:
    sheet, measured = runs.work(), runs.work(measured=True)
    device, network = Timing(measured).device, Timing(measured).network
    assert (device.linear, device.half, device.bandwidth) == (312e12, 312e12, 2.0e12)
    assert (network.intra.bandwidth, network.inter.bandwidth, network.ring) == (300e9, 25e9, 1.0)
    ratio = lookup(sheet).flash / lookup(sheet).linear
    assert device.flash == pytest.approx(312e12 * ratio), "attention is slower than products, measured or not"
    cpu = replace(measured, cluster=replace(measured.cluster, device="CPU"))
    step = Timing(cpu).step(plan_of(cpu, dp=8))
    assert step.launch == 0.0
    assert Timing(replace(sheet, cluster=replace(sheet.cluster, device="CPU"))).step(plan_of(cpu, dp=8)).launch > 0.0


def test_nothing_fitted_is_faster_than_the_best_measured_product() -> None:
    for constant in calibrated.CONSTANTS:
        if constant.field == "linear":
            assert constant.value <= BEST.get(constant.device, 1.0)

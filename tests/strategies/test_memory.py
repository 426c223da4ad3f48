"""Memory of ranks: what it is made of, what it must be larger than, and where published accounts say it stands."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from strategies.memory import OVERHEADS, Memory, StageMemory
from strategies.model_state import model_state_bytes
from strategies.plan import ParallelPlan, Recompute, Schedule, split_layers
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec, MoeSpec, Precision
from strategies.workload import Framework, Workload
from tests.strategies.support import LLAMA2_7B, LLAMA3_8B, TINY
from tests.strategies.test_counts import any_model

GIB = 2**30
A100 = ClusterSpec(
    name="a100", kind="existing", nodes=16, slots_per_node=8, device="A100-80GB", device_memory_bytes=80 * GIB
)


def memory(model: ModelSpec, precision: Precision = "bf16", framework: Framework = "megatron", **more: Any) -> Memory:
    """Memory of plans of a model on A100."""
    batch = BatchSpec(global_batch=2048, seq=model.seq)
    cluster = more.get("cluster", A100)
    return Memory(Workload(model=model, batch=batch, cluster=cluster, precision=precision, framework=framework))


def spread(model: ModelSpec, pp: int = 1, **more: Any) -> ParallelPlan:
    """A plan with what a test does not care about filled in."""
    given: dict[str, Any] = {"micro_batch": 1, "grad_accum": 32, "stages": split_layers(model.layers, pp)}
    return ParallelPlan(pp=pp, **(given | more))


def any_case(seed: int) -> tuple[Memory, ParallelPlan]:
    """A random model on a random framework, and a random plan of it."""
    rng = random.Random(seed)
    model = any_model(rng)
    framework: Framework = rng.choice(["megatron", "mcore", "fsdp"])
    precision: Precision = rng.choice(["fp32", "bf16", "fp16"])
    schedule: Schedule = rng.choice(["1f1b", "interleaved", "dualpipev"])
    plan = spread(
        model,
        pp=rng.randint(1, model.layers),
        tp=rng.choice([1, 2, 3]),
        dp=rng.choice([1, 2, 4, 6]),
        cp=rng.choice([1, 1, 2]),
        sp=rng.choice([1, 1, 2]),
        ep=rng.choice([1, 2, 4]),
        zero_stage=rng.randint(0, 3),
        schedule=schedule,
        vpp=2 if schedule == "interleaved" else 1,
        micro_batch=rng.choice([1, 2, 4]),
        grad_accum=rng.choice([1, 4, 16]),
        grad_dtype=rng.choice(["fp32", precision]),
        recompute=rng.choice(["none", "selective", "full"]),
        offload=rng.choice(["none", "none", "optimizer", "optimizer+params"]),
        flash=rng.random() < 0.5,
        sequence_parallel=rng.random() < 0.5,
    )
    return memory(model, precision, framework), plan


@pytest.mark.parametrize(("recompute", "kept", "once"), [("none", 2, 1), ("selective", 0, 3), ("full", 0, 3)])
def test_masks_that_keep_documents_apart_are_counted(recompute: Recompute, kept: int, once: int) -> None:
    """``kept`` bytes for each pair of tokens and micro-batch in flight, ``once`` while a block works; never cut."""
    plain = memory(LLAMA3_8B)
    packed = Memory(replace(plain.work, packing=True))
    pairs = 2 * LLAMA3_8B.seq**2
    for degrees in ({}, {"tp": 4}, {"sp": 2}):
        plan = spread(LLAMA3_8B, pp=4, micro_batch=2, recompute=recompute, **degrees)
        more = packed.stage(plan, 0).activations - plain.stage(plan, 0).activations
        assert more == pytest.approx((4 * kept + once) * pairs), "four micro-batches are in flight on the first stage"
        assert sum(term.value for term in packed.explain(plan, 0)) == pytest.approx(sum(packed.stage(plan, 0)))


@pytest.mark.parametrize("seed", range(200))
def test_the_peak_is_that_of_the_stage_that_needs_most(seed: int) -> None:
    """Looking at one stage of each kind misses nothing."""
    of, plan = any_case(seed)
    stages = [of.stage(plan, stage) for stage in range(plan.pp)]
    assert of.peak(plan) == max(sum(stage) for stage in stages)
    assert all(kind >= 0 for stage in stages for kind in stage)


@pytest.mark.parametrize("seed", range(200))
def test_the_floor_is_below_the_peak(seed: int) -> None:
    of, plan = any_case(seed)
    ranks = plan.dp * plan.sp * plan.cp
    common: dict[str, Any] = {"tp": plan.tp, "pp": plan.pp, "replicas": ranks, "ep": plan.ep}
    floors = [
        of.floor(**common, zero_stage=plan.zero_stage, grad_dtype=plan.grad_dtype, offload=plan.offload),
        of.floor(**common, zero_stage=plan.zero_stage, offload=plan.offload),
        of.floor(**common, offload="optimizer+params"),
    ]
    assert floors == sorted(floors, reverse=True)
    assert floors[-1] > 0
    assert floors[0] <= of.peak(plan)


@pytest.mark.parametrize("seed", range(50))
def test_the_floor_never_grows_with_more_ranks(seed: int) -> None:
    of, plan = any_case(seed)
    common: dict[str, Any] = {"tp": plan.tp, "zero_stage": plan.zero_stage}
    for low, high in ((1, 2), (2, 6), (6, 12)):
        assert of.floor(pp=high, replicas=4, **common) <= of.floor(pp=low, replicas=4, **common)
        assert of.floor(pp=2, replicas=high, **common) <= of.floor(pp=2, replicas=low, **common)


@pytest.mark.parametrize("seed", range(50))
def test_model_state_is_what_the_table_says(seed: int) -> None:
    of, plan = any_case(seed)
    plan = replace(plan, offload="none")
    state = model_state_bytes(of.work.model, plan, of.work.precision, of.work.framework)
    for stage in range(plan.pp):
        found = of.stage(plan, stage)
        assert found[:3] == (state[stage]["weights"], state[stage]["gradients"], state[stage]["optimizer"])


@pytest.mark.parametrize("seed", range(100))
def test_every_kind_explains_itself(seed: int) -> None:
    of, plan = any_case(seed)
    stage = seed % plan.pp
    terms = of.explain(plan, stage)
    assert tuple(term.kind for term in terms) == StageMemory._fields
    assert tuple(term.value for term in terms) == tuple(of.stage(plan, stage))
    assert all(term.unit == "bytes" and term.formula and term.numbers for term in terms)


def test_the_arithmetic_in_words_and_numbers() -> None:
    of = memory(LLAMA2_7B)
    plan = spread(LLAMA2_7B, pp=2, dp=4, zero_stage=1, recompute="full")
    lines = {term.kind: (term.formula, term.numbers) for term in of.explain(plan, 0)}
    assert lines["weights"] == (
        "parameters of the rank x bytes of a weight, whole on every replica",
        "3,369,205,760 x 2",
    )
    assert lines["optimizer"] == (
        "parameters of the rank x bytes of moments and master copy, cut over 4 replicas",
        "3,369,205,760 x 3",
    )
    assert lines["activations"][1].startswith("2 x (16 x 0.0312 GiB + 0.0313 GiB) + ")


def test_recomputation_flash_and_sequence_parallelism_save_memory() -> None:
    model = replace(LLAMA3_8B, seq=4096)
    of = memory(model)
    common: dict[str, Any] = {"tp": 8, "pp": 4, "dp": 4, "zero_stage": 1}
    eager, fused, parallel, full = (
        of.peak(spread(model, **common, **choice))
        for choice in (
            {"flash": False},
            {"flash": True},
            {"flash": True, "sequence_parallel": True},
            {"flash": True, "sequence_parallel": True, "recompute": "full"},
        )
    )
    assert full < parallel < fused < eager


def test_the_first_stage_holds_most_micro_batches_and_the_last_one_the_logits() -> None:
    of = memory(LLAMA3_8B)
    plan = spread(LLAMA3_8B, pp=8, dp=2, zero_stage=1)
    first, last = of.stage(plan, 0), of.stage(plan, 7)
    assert first.activations > 5 * last.activations
    assert first.logits == 0 < last.logits
    # Llama-3's vocabulary, not its layers, decides when micro-batches are not many
    flat = replace(plan, grad_accum=1, micro_batch=4, recompute="full")
    assert of.peak(flat) == sum(of.stage(flat, 7))


def test_uneven_stages_are_told_apart() -> None:
    of = memory(LLAMA2_7B)
    plan = spread(LLAMA2_7B, pp=4, stages=(8, 7, 10, 7), dp=2, zero_stage=1, grad_accum=1)
    assert of.kinds(plan) == (0, 1, 2, 3)
    assert of.stage(plan, 2).weights > of.stage(plan, 1).weights
    assert of.kinds(spread(LLAMA2_7B, pp=16)) == (0, 1, 15)


def test_offloading_leaves_the_device() -> None:
    of = memory(LLAMA2_7B)
    plan = spread(LLAMA2_7B, dp=8, zero_stage=3)
    kept, optimizer, both = (
        of.stage(replace(plan, offload=offload), 0) for offload in ("none", "optimizer", "optimizer+params")
    )
    assert (kept.optimizer > 0, optimizer.optimizer, both.optimizer) == (True, 0, 0)
    assert (optimizer.weights, both.weights) == (kept.weights, 0)
    assert both.gathered == kept.gathered > 0
    assert (kept.gradients > 0, optimizer.gradients, both.gradients) == (True, 0, 0)


def test_zero_2_offloads_gradients_as_they_are_made_and_zero_1_at_the_end() -> None:
    of = memory(LLAMA2_7B)
    plan = spread(LLAMA2_7B, dp=1, zero_stage=2, offload="optimizer", recompute="full")
    second, first = of.stage(plan, 0), of.stage(replace(plan, zero_stage=1), 0)
    assert (second.gradients, second.optimizer) == (0, 0)
    assert second.buffers < 11e9, "buckets, not another copy of all gradients"
    assert first.gradients >= 4 * 6.7e9


def test_zero_3_gathers_less_than_everything_unless_it_pipelines() -> None:
    model = LLAMA2_7B
    of = memory(model, framework="fsdp")
    alone = of.stage(spread(model, dp=8, zero_stage=3), 0)
    assert alone.gathered < model.parameters
    piped = of.stage(spread(model, pp=2, dp=8, zero_stage=3), 0)
    assert piped.gathered > 6 * model.parameters / 2 * 0.99


def test_a_cpu_has_no_context_and_no_known_limit() -> None:
    cpu = ClusterSpec(name="here", kind="process", nodes=1, slots_per_node=4)
    of = memory(TINY, precision="fp32", cluster=cpu)
    found = of.stage(spread(TINY), 0)
    assert (found.context, found.fragmentation) == (0, 0)
    assert of.budget() == math.inf
    assert memory(TINY).budget() == 80 * GIB
    assert memory(TINY).stage(spread(TINY), 0).context == OVERHEADS["megatron"].context


GPT4 = ModelSpec(
    name="gpt4",
    layers=120,
    hidden=10752,
    heads=84,
    kv_heads=84,
    ffn=43008,
    vocab=100256,
    seq=8192,
    moe=MoeSpec(experts=16, top_k=2, ffn=43008),
)


@pytest.mark.parametrize("framework", ["megatron", "mcore"])
def test_gpt4_fits_with_expert_parallelism_only(framework: Framework) -> None:
    """About 1.8 T parameters on 24,960 A100: 91 GB a rank in weights, fp32 gradients and optimizer without EP."""
    of = memory(GPT4, framework=framework)
    plan = spread(GPT4, tp=8, pp=15, dp=208, zero_stage=1, recompute="full", grad_accum=35)
    middle = of.stage(plan, 7)
    assert sum(middle[:3]) == pytest.approx(91e9, rel=0.03)
    assert of.peak(plan) > of.budget()
    assert of.peak(replace(plan, ep=16)) < of.budget()


@pytest.mark.parametrize("seed", range(200))
def test_larger_and_more_micro_batches_never_take_less(seed: int) -> None:
    """What searching relies on to leave out plans that need more than one that is too large already."""
    of, plan = any_case(seed)
    assert of.peak(plan) <= of.peak(replace(plan, micro_batch=2 * plan.micro_batch))
    assert of.peak(plan) <= of.peak(replace(plan, grad_accum=2 * plan.grad_accum))


@pytest.mark.parametrize("seed", range(200))
def test_more_replicas_never_take_more_but_for_padding(seed: int) -> None:
    """Of plans that DeepSpeed has: without ZeRO, 16-bit training accumulates in 16 bit."""
    of, plan = any_case(seed)
    narrow = of.work.precision
    if plan.zero_stage == 0 and narrow != "fp8":
        plan = replace(plan, grad_dtype=narrow)
    most = replace(plan, dp=2 * plan.dp, ep=plan.ep if plan.ep <= plan.dp * plan.sp * plan.cp else 1)
    few = replace(plan, ep=most.ep)
    ranks = most.dp * most.sp * most.cp
    padding = 4.0 * 30 * (max(plan.stages) + 2) * ranks + 1000 * plan.pp
    assert of.peak(most) <= of.peak(few) + 6 * padding

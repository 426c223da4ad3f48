"""Advice keeps its promises: what it names is legal, fits, and is as good as it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from strategies import rules
from strategies.advice import WORTH_SAYING, advise, bottleneck, neighbours
from strategies.estimate import CostEstimate, Estimator
from strategies.hardware import Hardware
from strategies.plan import ParallelPlan
from strategies.resolve import resolve_plan
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec, MoeSpec
from strategies.timing import StepTime
from strategies.workload import Workload

A100 = Hardware(
    flops_fp32=156e12,
    flops_16=312e12,
    processors=108,
    memory_bandwidth=2.0e12,
    intra_bandwidth=300e9,
    intra_latency_s=2e-6,
    inter_bandwidth=25e9,
    inter_latency_s=5e-6,
    host_memory_bytes=2 * 10**12,
    storage_total_bandwidth=100e9,
    price_per_device_hour=2.0,
    failures_per_node_day=0.0065,
)
CLUSTER = ClusterSpec(
    name="a100",
    kind="existing",
    nodes=16,
    slots_per_node=8,
    device="A100-80GB",
    device_memory_bytes=85_094_039_552,
    hardware=A100,
)
MODEL = ModelSpec(name="gpt", layers=48, hidden=8192, heads=64, kv_heads=64, ffn=32768, vocab=51200, seq=2048)
WORK = Workload(
    model=MODEL, batch=BatchSpec(global_batch=512, seq=2048), cluster=CLUSTER, precision="bf16", tokens=300e9
)


def plan_of(work: Workload = WORK, **asked: Any) -> ParallelPlan:
    return resolve_plan(work.model, work.batch, work.cluster, work.precision, **asked)


def estimated(work: Workload, plan: ParallelPlan) -> tuple[Estimator, CostEstimate]:
    estimator = Estimator(work)
    return estimator, estimator.estimate(plan)


PLANS = [
    {"tp": 8, "pp": 4, "recompute": "full"},
    {"tp": 4, "pp": 8, "micro_batch": 4, "recompute": "full"},
    {"tp": 8, "pp": 1, "zero_stage": 3, "recompute": "full"},
    {"tp": 8, "pp": 16, "recompute": "full", "schedule": "interleaved", "vpp": 3},
]


@pytest.mark.parametrize("asked", PLANS)
def test_changes_of_the_plan_are_legal_fit_and_gain_what_they_promise(asked: dict[str, Any]) -> None:
    plan = plan_of(**asked)
    estimator, now = estimated(WORK, plan)
    assert now.fits
    found = advise(estimator, now).plan
    assert len(found) <= 3
    assert list(found) == sorted(found, key=lambda one: -one.gain)
    for one in found:
        broken = rules.check(
            model=MODEL, plan=one.plan, batch=WORK.batch, cluster=CLUSTER, precision="bf16", modelled=True
        )
        assert not broken
        better = estimator.estimate(one.plan)
        assert better.fits
        assert better.runnable or not now.runnable, "what runs stays runnable"
        assert one.gain >= WORTH_SAYING
        assert better.surviving_tokens_per_s == pytest.approx(now.surviving_tokens_per_s * (1 + one.gain), rel=1e-6)
        assert one.step_s == pytest.approx(better.step_s)
        assert one.peak_bytes == pytest.approx(better.peak_bytes)


_FLAGS = {"true": True, "false": False}


def test_overrides_lead_to_the_changed_plan() -> None:
    plan = plan_of(tp=8, pp=4, recompute="full")
    estimator, now = estimated(WORK, plan)
    found = advise(estimator, now, limit=20).plan
    assert found
    base: dict[str, Any] = {"tp": 8, "pp": 4, "recompute": "full", "dp": plan.dp, "zero_stage": plan.zero_stage}
    for one in found:
        words = dict(word.removeprefix("strategy.").split("=") for word in one.overrides.split())
        values = {key: int(value) if value.isdigit() else _FLAGS.get(value, value) for key, value in words.items()}
        assert plan_of(**base | values) == one.plan


def test_each_change_is_another_idea() -> None:
    estimator, now = estimated(WORK, plan_of(tp=8, pp=4, recompute="full"))
    ideas = [one.change.split(" ")[0] + str(one.change.count(",")) for one in advise(estimator, now, limit=20).plan]
    changed = [
        tuple(part.split()[0] for part in one.change.split(", ")) for one in advise(estimator, now, limit=20).plan
    ]
    assert len(changed) == len(set(changed)), ideas


def test_a_plan_that_does_not_fit_gets_neighbours_that_do() -> None:
    estimator, now = estimated(WORK, plan_of(tp=8, pp=1, micro_batch=4))
    assert not now.fits
    found = advise(estimator, now).plan
    assert found
    assert all(one.peak_bytes <= estimator.memory.budget() for one in found)
    assert all(one.gain == 0.0 for one in found)


def test_better_machines_never_hurt_and_spares_are_asked_for() -> None:
    frail = replace(WORK, cluster=replace(CLUSTER, hardware=replace(A100, failures_per_node_day=0.5)))
    estimator, now = estimated(frail, plan_of(tp=8, pp=4, recompute="full"))
    found = advise(estimator, now, limit=20).hardware
    assert all(one.gain >= WORTH_SAYING for one in found)
    assert all(one.plan == now.plan and not one.overrides for one in found)
    assert any("matrix units" in one.change for one in found)
    assert any("failures" in one.change for one in found)
    if now.outlook.spares < now.outlook.spares_wanted:
        assert any("in spare" in one.change for one in found)


def test_experts_are_spread_in_neighbours() -> None:
    work = replace(WORK, model=replace(MODEL, moe=MoeSpec(experts=8, top_k=2, ffn=8192)))
    plan = plan_of(work, tp=4, pp=4)
    assert {one.ep for one in neighbours(work, plan)} >= {1, 2, 8}
    estimator, now = estimated(work, plan)
    assert now.runnable
    assert advise(estimator, now).bottleneck.share > 0


@pytest.mark.parametrize(
    ("kinds", "kind", "words"),
    [
        ({"bubble": 5.0, "gemm": 1.0}, "bubble", "The pipeline stands still for 83 % of the step: 4 stages share"),
        ({"gemm": 8.0, "dp": 2.0}, "gemm", "the largest loss: gradients and parameters of the replicas take 20 %"),
        ({"gemm": 8.0}, "gemm", "Matrix multiplications take 100 % of the step: compute is the bottleneck."),
        ({"tp": 4.0, "gemm": 3.0}, "tp", "Tensor-parallel collectives take 57 % of the step: 8 ranks share"),
    ],
)
def test_bottleneck_is_named(kinds: dict[str, float], kind: str, words: str) -> None:
    _, now = estimated(WORK, plan_of(tp=8, pp=4, recompute="full"))
    step = StepTime(**dict.fromkeys(StepTime._fields, 0.0) | kinds)
    found = bottleneck(replace(now, step=step, step_s=sum(step)))
    assert found.kind == kind
    assert words in found.sentence

"""Utilisation of every model of the configuration: never above the peak, by operations that its parameters explain."""

from __future__ import annotations

from functools import cache

import pytest

from launcher import build
from launcher.config import choices_of, compose
from strategies.plan import ParallelPlan
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec
from strategies.timing import Timing
from strategies.workload import Workload

MODELS = choices_of("model")


@cache
def model_of(name: str) -> ModelSpec:
    return build.model_spec(compose([f"model={name}"]))


@cache
def machine_of(name: str) -> ClusterSpec:
    return build.cluster_spec(compose([f"cluster={name}"]))


def plans(model: ModelSpec) -> list[ParallelPlan]:
    """Plans of eight devices whose work nothing hides or slows down; whether they fit does not matter to time."""
    return [
        ParallelPlan(
            dp=8, ep=ep, micro_batch=size, grad_accum=8, zero_stage=1, stages=(model.layers,), recompute=recompute
        )
        for ep in ((1, 8) if model.moe else (1,))
        for size in (1, 4)
        for recompute in ("none", "full")
    ]


def timing_of(name: str, cluster: str, rows: int) -> Timing:
    model, machine = model_of(name), machine_of(cluster)
    batch = BatchSpec(global_batch=rows, seq=model.seq)
    return Timing(Workload(model=model, batch=batch, cluster=machine, precision="bf16", tokens=1e9))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cluster", ["a100_80", "h100"])
def test_no_device_does_more_than_its_peak(name: str, cluster: str) -> None:
    for plan in plans(model_of(name)):
        timing = timing_of(name, cluster, plan.dp * plan.micro_batch * plan.grad_accum)
        peak = plan.world_size * timing.hardware.flops_16 * sum(timing.step(plan))
        useful, done = (one / peak for one in timing.flops(plan))
        assert 0 < useful <= done <= 1


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_six_per_active_parameter_and_attention(name: str) -> None:
    model = model_of(name)
    useful, _ = timing_of(name, "a100_80", 8).flops(plans(model)[0])
    # rows of the embedding are looked up, not multiplied; tied ones are the output projection too
    looked_up = model.embedding_parameters - (model.vocab * model.hidden if model.tied else 0)
    query = value = model.head_dim
    if model.latent is not None:
        query, value = model.latent.nope_width + model.latent.rope_width, model.latent.value_width
    attention = 2 * model.layers * model.seq * model.heads * (query + value)
    expected = 6 * (model.active_parameters - looked_up) + 3 * attention
    assert useful / (8 * model.seq) == pytest.approx(expected, rel=0.02)

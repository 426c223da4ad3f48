"""Machines and published runs for the tests of reliability, simulation and replanning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from strategies.hardware import Hardware
from strategies.plan import ParallelPlan
from strategies.resolve import resolve_plan
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec, MoeSpec
from strategies.workload import Workload

A100 = Hardware(
    flops_fp32=156e12,
    flops_16=312e12,
    processors=108,
    memory_bandwidth=2.0e12,
    intra_bandwidth=300e9,
    intra_latency_s=5e-6,
    inter_bandwidth=25e9,
    inter_latency_s=5e-6,
    host_bandwidth=32e9,
    host_memory_bytes=2 << 40,
    storage_total_bandwidth=273e9,
    price_per_device_hour=1.0,
    failures_per_node_day=0.0065,
    detect_s=30.0,
    restart_s=300.0,
)
GPT3 = ModelSpec(
    name="gpt3_175b",
    layers=96,
    hidden=12288,
    heads=96,
    kv_heads=96,
    ffn=49152,
    vocab=50257,
    seq=2048,
    position_rows=2048,
)
GPT4 = ModelSpec(
    name="gpt4",
    layers=120,
    hidden=10752,
    heads=96,
    kv_heads=96,
    ffn=43008,
    vocab=100256,
    seq=8192,
    moe=MoeSpec(experts=16, top_k=2, ffn=43008),
)


def work(
    model: ModelSpec = GPT3, nodes: int = 128, batch: int = 1536, tokens: float = 300e9, **hardware: Any
) -> Workload:
    """A workload on nodes of 8 A100; further arguments replace figures of the hardware."""
    cluster = ClusterSpec(
        name="a100",
        kind="existing",
        nodes=nodes,
        slots_per_node=8,
        device="A100-80GB",
        hardware=replace(A100, **hardware),
    )
    size = BatchSpec(global_batch=batch, seq=model.seq)
    return Workload(model=model, batch=size, cluster=cluster, precision="bf16", tokens=tokens)


def plan_of(what: Workload, **degrees: Any) -> ParallelPlan:
    """A plan with the rest filled in."""
    return resolve_plan(what.model, what.batch, what.cluster, what.precision, **degrees)

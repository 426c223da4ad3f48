"""Workloads for tests of the planner: small models on small clusters of real hardware."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from strategies.hardware import Hardware
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec, MoeSpec, Precision
from strategies.workload import Framework, Workload

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
    price_per_device_hour=2.0,
    failures_per_node_day=0.0065,
)

DENSE = ModelSpec(name="dense", layers=4, hidden=256, heads=4, kv_heads=4, ffn=1024, vocab=1000, seq=64)
LLAMA = ModelSpec(
    name="llama", flavour="llama", layers=6, hidden=192, heads=6, kv_heads=2, ffn=512, vocab=9000, seq=128, tied=False
)
SPARSE = replace(DENSE, name="sparse", moe=MoeSpec(experts=4, top_k=2, ffn=512, dense_layers=1))


def work_of(model: ModelSpec = DENSE, *, batch: int = 8, nodes: int = 1, slots: int = 4, **changes: Any) -> Workload:
    """A workload on A100s; ``changes`` are those of the cluster."""
    cluster = ClusterSpec(
        name="test", kind="existing", nodes=nodes, slots_per_node=slots, device="A100-80GB", hardware=A100
    )
    return Workload(
        model=model,
        batch=BatchSpec(global_batch=batch, seq=model.seq),
        cluster=replace(cluster, device_memory_bytes=85 * 10**9, **changes),
        precision="bf16",
        tokens=1e9,
    )


def random_work(rng: random.Random, model: ModelSpec | None = None) -> Workload:
    """A small workload; its space has at most some thousand plans."""
    base = model or rng.choice([DENSE, LLAMA, SPARSE])
    layers = rng.choice([2, 3, 4, 6])
    hidden = base.heads * rng.choice([16, 64, 128])
    made = replace(base, layers=layers, hidden=hidden, seq=rng.choice([16, 64, 256]), vocab=rng.choice([300, 50000]))
    slots = rng.choice([1, 2, 4])
    hardware = replace(
        A100, inter_bandwidth=rng.choice([1e9, 25e9, 200e9]), failures_per_node_day=rng.choice([0.0, 0.01, 5.0])
    )
    work = work_of(made, batch=rng.choice([1, 3, 4, 6]), nodes=rng.choice([1, 2, 3]), slots=slots, hardware=hardware)
    precisions: tuple[Precision, ...] = ("bf16", "bf16", "fp32")
    frameworks: tuple[Framework, ...] = ("megatron", "megatron", "mcore", "fsdp")
    return replace(work, precision=rng.choice(precisions), framework=rng.choice(frameworks))


def wide_work(rng: random.Random) -> Workload:
    """A workload with more of what makes stages differ: large vocabularies, tied or not, dense blocks."""
    work = random_work(rng)
    made = replace(
        work.model, vocab=rng.choice([300, 50000, 250000]), tied=rng.random() < 0.5, layers=rng.choice([3, 5])
    )
    if made.moe is not None:
        experts = replace(made.moe, dense_layers=rng.choice([0, 1, 2]), ffn=rng.choice([512, 4096]))
        made = replace(made, moe=experts)
    batch = replace(work.batch, global_batch=rng.choice([4, 7, 8, 12]))
    hardware = replace(work.hardware, processors=rng.choice([2, 80, 108]))
    cluster = replace(work.cluster, nodes=rng.choice([1, 2, 4, 5]), hardware=hardware)
    return replace(work, model=made, batch=batch, cluster=cluster)

"""Models, clusters and plans of the tests in this folder."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from strategies.plan import ParallelPlan
from strategies.resolve import resolve_plan
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec

TINY = ModelSpec(name="tiny", layers=4, hidden=64, heads=4, kv_heads=4, ffn=256, vocab=259, seq=32)
LLAMA_TINY = ModelSpec(
    name="llama_tiny", flavour="llama", layers=6, hidden=48, heads=6, kv_heads=2, ffn=96, vocab=101, seq=16, tied=False
)
GPT2 = ModelSpec(name="gpt2", layers=12, hidden=768, heads=12, kv_heads=12, ffn=3072, vocab=50257, seq=1024)
GPT2_XL = replace(GPT2, name="gpt2_xl", layers=48, hidden=1600, heads=25, kv_heads=25, ffn=6400)
LLAMA2_7B = ModelSpec(
    name="llama2_7b",
    flavour="llama",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    ffn=11008,
    vocab=32000,
    seq=4096,
    tied=False,
)
LLAMA2_70B = replace(LLAMA2_7B, name="llama2_70b", layers=80, hidden=8192, heads=64, kv_heads=8, ffn=28672)
LLAMA3_8B = replace(LLAMA2_7B, name="llama3_8b", kv_heads=8, ffn=14336, vocab=128256, seq=8192)

BATCH = BatchSpec(global_batch=16, seq=32)
FOUR_BY_TWO = ClusterSpec(name="local", kind="local", nodes=4, slots_per_node=2, spares=1)


def plan(model: ModelSpec = TINY, batch: BatchSpec = BATCH, precision: Any = "fp32", **degrees: Any) -> ParallelPlan:
    """A plan with what follows from the degrees filled in; dp is 1 unless given."""
    return resolve_plan(model, batch, None, precision, **({"dp": 1} | degrees))


def random_model(rng: random.Random) -> ModelSpec:
    """A consistent model of random sizes."""
    kv_heads = rng.choice([1, 2, 3, 4])
    heads = kv_heads * rng.choice([1, 2, 4])
    return ModelSpec(
        name="random",
        flavour=rng.choice(["gpt3", "llama"]),
        layers=rng.randint(1, 9),
        hidden=heads * rng.choice([2, 8, 14]),
        heads=heads,
        kv_heads=kv_heads,
        ffn=rng.randint(1, 20) * 12,
        vocab=rng.randint(2, 500),
        seq=rng.randint(1, 64),
        tied=rng.random() < 0.5,
    )

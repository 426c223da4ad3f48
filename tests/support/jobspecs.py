"""Small jobs for tests: a model, a plan and a recipe in one line each."""

from __future__ import annotations

import dataclasses
from typing import Any

from jobs.spec import CheckpointSpec, DataSpec, JobSpec, TrainSpec, engine_config
from strategies.plan import ParallelPlan, accumulation, split_layers
from strategies.specs import BatchSpec, ModelSpec

GPT = ModelSpec(
    name="test", flavour="gpt3", layers=4, hidden=64, heads=4, kv_heads=4, ffn=256, vocab=128, seq=32, tied=True
)
LLAMA = ModelSpec(
    name="test", flavour="llama", layers=4, hidden=64, heads=8, kv_heads=4, ffn=192, vocab=128, seq=32, tied=False
)


def make_plan(model: ModelSpec, global_batch: int, *, micro_batch: int = 1, **degrees: Any) -> ParallelPlan:
    """A plan with the stages and the accumulation that follow from the rest, unless given."""
    dp, pp = degrees.get("dp", 1), degrees.get("pp", 1)
    derived: dict[str, Any] = {
        "stages": split_layers(model.layers, pp),
        "grad_accum": accumulation(global_batch, micro_batch, dp),
        "micro_batch": micro_batch,
    }
    return ParallelPlan(**(derived | degrees))


def make_job(
    model: ModelSpec = GPT, plan: ParallelPlan | None = None, *, global_batch: int = 8, **train: Any
) -> JobSpec:
    """A pretraining job with the DeepSpeed config that belongs to it; keywords go to :class:`TrainSpec`."""
    recipe = dataclasses.replace(TrainSpec(steps=20, lr=1e-3, min_lr=1e-4), **train)
    plan, batch = plan or make_plan(model, global_batch), BatchSpec(global_batch=global_batch, seq=model.seq)
    return JobSpec(
        run_id="test",
        kind="pretrain",
        model=model,
        plan=plan,
        batch=batch,
        train=recipe,
        data=DataSpec(kind="text"),
        checkpoint=CheckpointSpec(),
        deepspeed=engine_config(plan, recipe, batch),
    )

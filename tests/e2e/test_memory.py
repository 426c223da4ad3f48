"""The model-state bytes of strategies.memory against what DeepSpeed's engines really hold, and the names of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from strategies.codec import to_json
from strategies.memory import model_state_bytes
from strategies.specs import ModelSpec
from tests.support.gang import WarmPool
from tests.support.jobspecs import make_job, make_plan

GPT = ModelSpec(name="odd", flavour="gpt3", layers=3, hidden=36, heads=6, kv_heads=6, ffn=52, vocab=61, seq=15)
WIDE = ModelSpec(
    name="wide", flavour="llama", layers=1, hidden=512, heads=4, kv_heads=2, ffn=516, vocab=255, seq=8, tied=False
)


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as pool:
        yield pool


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("model", "precision", "degrees"),
    [
        (GPT, "fp32", {}),
        (GPT, "fp32", {"dp": 2, "zero_stage": 1}),
        (GPT, "fp32", {"dp": 3, "zero_stage": 2}),
        (WIDE, "fp32", {"dp": 3, "zero_stage": 3}),
        (WIDE, "bf16", {"dp": 2, "zero_stage": 3}),
        (GPT, "bf16", {"dp": 3, "zero_stage": 1}),
        (GPT, "bf16", {"dp": 2, "zero_stage": 2}),
        (GPT, "bf16", {"zero_stage": 0, "grad_dtype": "bf16"}),
        (GPT, "bf16", {"pp": 2, "dp": 2, "zero_stage": 0, "grad_dtype": "bf16"}),
        (GPT, "fp32", {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1}),
        (GPT, "bf16", {"tp": 2, "pp": 3, "zero_stage": 1}),
        (WIDE, "bf16", {"tp": 2, "zero_stage": 1, "grad_dtype": "bf16"}),
    ],
    ids=lambda value: getattr(value, "name", None) or str(value),
)
def test_bytes_are_what_deepspeed_holds(
    pool: WarmPool, model: ModelSpec, precision: Any, degrees: dict[str, Any]
) -> None:
    plan = make_plan(model, 6, **degrees)
    job = make_job(model, plan, global_batch=6, precision=precision)
    expected = model_state_bytes(model, plan, precision)
    ranks = pool.run("tests.support.memory_ranks:weigh", world_size=plan.world_size, arguments={"job": to_json(job)})
    assert {rank["pipe"] for rank in ranks} == set(range(plan.pp))
    for rank in ranks:
        wanted = expected[rank["pipe"]]
        kinds = ["weights", "optimizer", *(["gradients"] if rank["gradients"] else [])]
        assert {kind: rank[kind] for kind in kinds} == {kind: wanted[kind] for kind in kinds}, rank

"""Packed documents under every plan, and evaluation that leaves no trace in the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jobs.spec import DataSpec
from strategies.codec import to_json
from strategies.specs import ModelSpec, MoeSpec
from tests.support.gang import WarmPool
from tests.support.jobspecs import GPT, LLAMA, make_job, make_plan

STEPS, BATCH = 6, 8
MODEL = dataclasses.replace(GPT, layers=4, hidden=32, ffn=128, vocab=29, seq=24)
ROTARY = dataclasses.replace(LLAMA, layers=4, hidden=32, ffn=88, vocab=29, seq=24)
TIGHT = dataclasses.replace(
    MODEL,
    ffn=64,
    init_std=0.1,
    moe=MoeSpec(experts=4, top_k=2, ffn=32, capacity_factor=0.5, balance_weight=0.02, z_weight=0.002),
)
PLANS: dict[str, dict[str, Any]] = {
    "pp2": {"pp": 2, "zero_stage": 1, "micro_batch": 2},
    "pp4-recompute": {"pp": 4, "zero_stage": 1, "recompute": "full"},
    "tp2-pp2-dp2": {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1},
    "dp2-zero3-selective": {"dp": 2, "zero_stage": 3, "recompute": "selective"},
    "sp2": {"sp": 2, "zero_stage": 2},
    "sp2-pp2-recompute": {"sp": 2, "pp": 2, "zero_stage": 1, "recompute": "full"},
    "sp2-tp2-split": {"sp": 2, "tp": 2, "sequence_parallel": True, "zero_stage": 1},
    "pp2-dualpipev": {"pp": 2, "zero_stage": 1, "schedule": "dualpipev"},
    "pp2-dualpipev-recompute": {"pp": 2, "zero_stage": 0, "schedule": "dualpipev", "recompute": "full"},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


def run(
    pool: WarmPool,
    model: ModelSpec,
    degrees: dict[str, Any],
    *,
    packing: bool = False,
    every: int = 0,
    target: str = "train",
    steps: int = STEPS,
    **recipe: Any,
) -> Any:
    plan = make_plan(model, BATCH, **degrees)
    job = make_job(model, plan, global_batch=BATCH, clip=0.5, eps=1e-6, **recipe)
    job = dataclasses.replace(job, data=DataSpec(kind="text", packing=packing, end_id=7))
    document = to_json(job)
    if plan.zero_stage == 3:
        document["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    arguments = {"job": document, "steps": steps} | ({"evaluate_every": every} if target == "train" else {})
    target = f"tests.support.data_ranks:{target}"
    return pool.run(target, world_size=plan.world_size, arguments=arguments, timeout_s=240)


def numbers(texts: list[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([float.fromhex(text) for text in texts])


@pytest.fixture(scope="module")
def packed(pool: WarmPool) -> dict[str, Any]:
    return {name: run(pool, model, {}, packing=True)[0] for name, model in (("gpt", MODEL), ("llama", ROTARY))}


full = pytest.mark.full


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        ("gpt", "pp2"),
        pytest.param("gpt", "pp4-recompute", marks=full),
        pytest.param("gpt", "tp2-pp2-dp2", marks=full),
        pytest.param("gpt", "dp2-zero3-selective", marks=full),
        pytest.param("llama", "pp2", marks=full),
        ("llama", "tp2-pp2-dp2"),
        ("gpt", "sp2-pp2-recompute"),
        pytest.param("gpt", "sp2-tp2-split", marks=full),
        pytest.param("llama", "sp2", marks=full),
        ("llama", "pp2-dualpipev"),
        pytest.param("gpt", "pp2-dualpipev-recompute", marks=full),
    ],
)
def test_packed_documents_train_the_same_under_every_plan(
    pool: WarmPool, packed: dict[str, Any], model: str, plan: str
) -> None:
    ranks = run(pool, {"gpt": MODEL, "llama": ROTARY}[model], PLANS[plan], packing=True)
    for key, tolerance in (("loss", 2e-6), ("grad_norm", 1e-5)):
        assert len({tuple(rank[key]) for rank in ranks}) == 1
        difference = np.abs(numbers(ranks[0][key]) / numbers(packed[model][key]) - 1).max()
        assert difference < tolerance, (key, difference)
    if PLANS[plan].get("pp", 1) > 1:
        assert all(rank["needs_data"] for rank in ranks), "every stage has to see where documents end"


WITH_EXPERTS: dict[str, dict[str, Any]] = {
    "sp2-pp2-ep2-recompute": {"sp": 2, "pp": 2, "ep": 2, "zero_stage": 1, "recompute": "full"},
    "dp2-ep2-tp2-split": {"dp": 2, "ep": 2, "tp": 2, "sequence_parallel": True, "zero_stage": 1},
    "sp2-tp2-split": PLANS["sp2-tp2-split"],
    "dp2-ep2-pp2-dualpipev": {"dp": 2, "ep": 2, "pp": 2, "zero_stage": 1, "schedule": "dualpipev"},
}


@full
@pytest.mark.parametrize("plan", WITH_EXPERTS)
def test_the_room_that_documents_have_does_not_depend_on_the_plan(pool: WarmPool, plan: str) -> None:
    alone, spread = (run(pool, TIGHT, degrees, packing=True)[0] for degrees in ({}, WITH_EXPERTS[plan]))
    for key, tolerance in (("loss", 5e-6), ("grad_norm", 1e-5)):
        difference = np.abs(numbers(spread[key]) / numbers(alone[key]) - 1).max()
        assert difference < tolerance, (key, difference)


def test_the_oracle_sees_whether_documents_are_packed(pool: WarmPool, packed: dict[str, Any]) -> None:
    plain = run(pool, MODEL, {})[0]
    assert np.abs(numbers(plain["loss"]) / numbers(packed["gpt"]["loss"]) - 1).max() > 1e-4


EVALUATED = {
    "1": {"micro_batch": 2},
    "tp2-pp2-dp2": PLANS["tp2-pp2-dp2"],
    "pp2-zero0": {"pp": 2, "zero_stage": 0, "micro_batch": 4},
    "dp2-zero3": {"dp": 2, "zero_stage": 3},
    "dp3-zero2": {"dp": 3, "zero_stage": 2, "micro_batch": 1},
    "sp2-dualpipev": {"sp": 2, "pp": 2, "zero_stage": 1, "schedule": "dualpipev"},
}


@pytest.mark.parametrize(
    ("plan", "precision"),
    [
        ("tp2-pp2-dp2", "fp32"),
        ("dp2-zero3", "fp32"),
        *(pytest.param(name, "fp32", marks=full) for name in ("1", "pp2-zero0", "dp3-zero2")),
        pytest.param("tp2-pp2-dp2", "bf16", marks=full),
        pytest.param("sp2-dualpipev", "fp32", marks=full),
    ],
)
def test_evaluation_leaves_no_trace(pool: WarmPool, plan: str, precision: str) -> None:
    """Losses, norms and final weights are those of a training without evaluation, bit by bit."""
    packing = plan in ("tp2-pp2-dp2", "sp2-dualpipev")
    without, within = (
        run(pool, MODEL, EVALUATED[plan], every=every, packing=packing, precision=precision) for every in (0, 2)
    )
    assert [rank.pop("eval") for rank in without] == [[]] * len(without)
    told = [rank.pop("eval") for rank in within]
    assert within == without
    assert len({tuple(one) for one in told}) == 1
    assert len(told[0]) == 2 * STEPS // 2


@pytest.mark.parametrize("plan", [pytest.param("1", marks=full), "tp2-pp2-dp2", pytest.param("dp3-zero2", marks=full)])
def test_an_evaluation_is_the_loss_that_a_step_would_have(pool: WarmPool, plan: str) -> None:
    degrees = EVALUATED[plan]
    found = numbers(run(pool, MODEL, degrees, every=2, steps=2)[0]["eval"])
    wanted = numbers(run(pool, MODEL, {}, target="judge", steps=2)[0])
    assert abs(found[0] / wanted[0] - 1) < 2e-6
    assert abs(found[1] / wanted[0] - 1) > 1e-4, "other samples have another loss"

"""Checkpoints of experts: bit-identical under the plan that wrote them, and the same weights under any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.checkpoint.digest import weights_digest
from strategies.specs import MoeSpec
from tests.e2e.test_checkpoint import (
    RESTORE,
    SAVE,
    TIMEOUT_S,
    check_bit_identical,
    check_read_once,
    check_stored_once,
    job_of,
)
from tests.support.gang import WarmPool
from tests.support.jobspecs import GPT

# A block of the first stage of two is dense; vocabulary padded, biases in every expert.
EXPERTS = MoeSpec(
    experts=4, top_k=2, ffn=24, dense_layers=1, shared_ffn=16, router_bias=True, balance_weight=0.02, z_weight=0.002
)
MODEL = dataclasses.replace(GPT, layers=3, hidden=32, ffn=48, vocab=125, seq=16, init_std=0.1, moe=EXPERTS)
RESHAPE = "tests.support.checkpoint_ranks:reshape"
TOLERANCE = 5e-6

ONE: dict[str, Any] = {"micro_batch": 2}
EP2: dict[str, Any] = {"dp": 2, "ep": 2, "zero_stage": 1}
EP4: dict[str, Any] = {"dp": 4, "ep": 4, "zero_stage": 1}
EP2_TP2: dict[str, Any] = {"dp": 2, "ep": 2, "tp": 2}


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


def numbers(rows: list[dict[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Losses and norms per step; every rank tells the same."""
    assert all(row["results"] == rows[0]["results"] for row in rows)
    return np.array([[float.fromhex(value) for value in step[:2]] for step in rows[0]["results"]])


def check_reshapes(pool: WarmPool, tmp_path: Path, first: dict[str, Any], *others: dict[str, Any]) -> None:
    """Save under one plan; under others, the weights are the same and training goes on as it would have."""
    job, world = job_of(first, model=MODEL)
    saved = pool.run(
        SAVE,
        world_size=world,
        timeout_s=TIMEOUT_S,
        arguments={"job": job, "steps": 3, "more": 3},
        run_dir=str(tmp_path / "first"),
    )
    path = saved[0]["path"]
    check_stored_once(Path(path))
    for number, plan in enumerate(others):
        job, world = job_of(plan, model=MODEL)
        arguments = {"job": job, "manifest": path}
        where = str(tmp_path / f"other-{number}")
        rows = pool.run(RESHAPE, world_size=world, timeout_s=TIMEOUT_S, arguments=arguments, run_dir=where)
        assert weights_digest(Path(rows[0]["path"])) == weights_digest(Path(path))
        check_stored_once(Path(rows[0]["path"]))
        check_read_once(Path(path), rows)
        rows = pool.run(RESTORE, world_size=world, timeout_s=TIMEOUT_S, arguments=arguments | {"more": 3})
        assert np.abs(numbers(rows) / numbers(saved) - 1).max() < TOLERANCE


def test_experts_go_on_under_another_plan(pool: WarmPool, tmp_path: Path) -> None:
    check_reshapes(pool, tmp_path, EP2, {"tp": 2})


@pytest.mark.full
@pytest.mark.timeout(900)
def test_experts_go_on_under_many_plans(pool: WarmPool, tmp_path: Path) -> None:
    check_reshapes(pool, tmp_path, EP4, EP2_TP2, ONE, {"dp": 2, "ep": 2, "pp": 2, "zero_stage": 1}, {"dp": 3})


@pytest.mark.full
@pytest.mark.timeout(900)
def test_experts_go_on_from_a_plan_without_zero(pool: WarmPool, tmp_path: Path) -> None:
    """Without ZeRO, the replicas with the same experts share in saving them."""
    check_reshapes(pool, tmp_path, {"dp": 4, "ep": 2}, EP4, {"dp": 2, "zero_stage": 3})


@pytest.mark.full
@pytest.mark.parametrize(
    ("plan", "precision"),
    [
        pytest.param({"dp": 2, "ep": 2, "zero_stage": 0}, "fp32", id="ep2-zero0"),
        pytest.param({"dp": 4, "ep": 2, "zero_stage": 0}, "fp32", id="ep2-dp4-zero0"),
        pytest.param(EP4, "fp32", id="ep4"),
        pytest.param({"dp": 4, "ep": 2, "zero_stage": 1}, "fp32", id="ep2-dp4-zero1"),
        pytest.param({"dp": 2, "ep": 2, "zero_stage": 2}, "fp32", id="ep2-zero2"),
        pytest.param({"dp": 2, "ep": 2, "tp": 2, "zero_stage": 1}, "fp32", id="ep2-tp2-zero1"),
        pytest.param({"dp": 2, "ep": 2, "pp": 2, "zero_stage": 1}, "fp32", id="ep2-pp2-zero1"),
        pytest.param({"dp": 2, "ep": 2, "zero_stage": 1}, "bf16", id="ep2-zero1-bf16"),
        pytest.param({"dp": 4, "ep": 2, "zero_stage": 2, "grad_dtype": "bf16"}, "bf16", id="ep2-dp4-zero2-bf16"),
    ],
)
def test_training_goes_on_bit_identically(pool: WarmPool, tmp_path: Path, plan: dict[str, Any], precision: str) -> None:
    check_bit_identical(pool, tmp_path, *job_of(plan, precision=precision, model=MODEL))

"""Checkpoints of runs whose sequences are split over ranks: exact under the same plan, and other plans read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_checkpoint import RESTORE, SAVE, TIMEOUT_S, TINY, TINY_LLAMA, check_bit_identical, job_of
from tests.support.gang import WarmPool

MEGATRON: dict[str, Any] = {"tp": 2, "pp": 2, "sequence_parallel": True, "zero_stage": 1}
SAME = [
    pytest.param({"sp": 2, "dp": 2, "zero_stage": 1}, "fp32", TINY, id="sp2-dp2-zero1-fp32"),
    pytest.param({"sp": 4, "zero_stage": 3}, "bf16", TINY_LLAMA, id="sp4-zero3-bf16-llama"),
    pytest.param({"sp": 2, "pp": 2, "zero_stage": 0}, "fp32", TINY, id="sp2-pp2-zero0-fp32"),
    pytest.param(MEGATRON, "bf16", TINY, id="tp2-pp2-split-zero1-bf16"),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


@pytest.mark.full
@pytest.mark.parametrize(("plan", "precision", "model"), SAME)
def test_training_goes_on_bit_identically(
    pool: WarmPool, tmp_path: Path, plan: dict[str, Any], precision: str, model: Any
) -> None:
    check_bit_identical(pool, tmp_path, *job_of(plan, precision=precision, model=model))


@pytest.mark.full
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({"sp": 2, "dp": 2, "zero_stage": 3}, MEGATRON, id="sp2-dp2-to-tp2-pp2-split"),
        pytest.param(MEGATRON, {"sp": 4, "zero_stage": 1}, id="tp2-pp2-split-to-sp4"),
        pytest.param({"sp": 4, "zero_stage": 2}, {}, id="sp4-to-one-rank"),
    ],
)
def test_another_plan_trains_on(pool: WarmPool, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    job, world = job_of(before)
    arguments: dict[str, Any] = {"job": job, "steps": 3, "more": 3}
    first = pool.run(SAVE, world_size=world, timeout_s=TIMEOUT_S, arguments=arguments, run_dir=str(tmp_path))
    job, world = job_of(after)
    arguments = {"job": job, "manifest": first[0]["path"], "more": 3}
    second = pool.run(RESTORE, world_size=world, timeout_s=TIMEOUT_S, arguments=arguments)
    there, here = (
        [[float.fromhex(value) for value in step] for step in rows[0]["results"]] for rows in (first, second)
    )
    for wanted, found in zip(there, here, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)

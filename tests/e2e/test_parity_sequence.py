"""Sequences that are split over ranks train the same model: losses, norms and weights agree with plain torch.

The reference and the tolerances are those of :mod:`tests.e2e.test_parity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e import test_parity as parity
from tests.e2e.test_parity import MODELS, Curve
from tests.support.gang import WarmPool

reference = parity.reference

MEGATRON: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2, "micro_batch": 4},
    "tp2-pp2": {"tp": 2, "pp": 2, "micro_batch": 4},
}
MORE_MEGATRON: dict[str, dict[str, Any]] = {
    "tp4": {"tp": 4, "micro_batch": 4},
    "tp2-pp2-dp2-zero1": {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1, "micro_batch": 2},
    "tp2-dp2-zero1": {"tp": 2, "dp": 2, "zero_stage": 1, "micro_batch": 2},
    "tp2-dp2-zero2": {"tp": 2, "dp": 2, "zero_stage": 2, "micro_batch": 2},
    "tp2-dp2-zero3": {"tp": 2, "dp": 2, "zero_stage": 3, "micro_batch": 2},
    "tp2-dp2-zero3-recompute": {"tp": 2, "dp": 2, "zero_stage": 3, "recompute": "full", "micro_batch": 2},
    "tp2-pp2-recompute": {"tp": 2, "pp": 2, "recompute": "full", "micro_batch": 4},
    "tp2-selective": {"tp": 2, "recompute": "selective", "micro_batch": 4},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


@pytest.mark.parametrize("plan", MEGATRON)
def test_megatron(pool: WarmPool, reference: Callable[..., Curve], plan: str) -> None:
    parity.check_parity(pool, reference, MODELS["tied"], MEGATRON[plan] | {"sequence_parallel": True})


@pytest.mark.full
@pytest.mark.parametrize("plan", MEGATRON | MORE_MEGATRON)
@pytest.mark.parametrize("model", MODELS)
def test_megatron_everything(pool: WarmPool, reference: Callable[..., Curve], model: str, plan: str) -> None:
    degrees = (MEGATRON | MORE_MEGATRON)[plan] | {"sequence_parallel": True}
    parity.check_parity(pool, reference, MODELS[model], degrees)

"""Sequences that are split over ranks train the same model: losses, norms and weights agree with plain torch.

The reference and the tolerances are those of :mod:`tests.e2e.test_parity`.
"""

from __future__ import annotations

import dataclasses
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
ULYSSES: dict[str, dict[str, Any]] = {
    "sp2-dp2-zero3": {"sp": 2, "dp": 2, "zero_stage": 3, "micro_batch": 2},
    "sp2-pp2": {"sp": 2, "pp": 2, "micro_batch": 4},
}
MORE_ULYSSES: dict[str, dict[str, Any]] = {
    "sp2": {"sp": 2, "micro_batch": 4},
    "sp4": {"sp": 4, "micro_batch": 4},
    "sp4-zero2-recompute": {"sp": 4, "zero_stage": 2, "recompute": "full", "micro_batch": 4},
    "sp2-dp2-zero0": {"sp": 2, "dp": 2, "micro_batch": 2},
    "sp2-dp2-zero1": {"sp": 2, "dp": 2, "zero_stage": 1, "micro_batch": 2},
    "sp2-dp3": {"sp": 2, "dp": 3, "zero_stage": 1},
    "sp2-tp2": {"sp": 2, "tp": 2, "micro_batch": 4},
    "sp2-tp2-split": {"sp": 2, "tp": 2, "sequence_parallel": True, "micro_batch": 4},
    "sp2-tp2-pp2-split-zero1": {"sp": 2, "tp": 2, "pp": 2, "sequence_parallel": True, "zero_stage": 1},
    "sp2-pp2-dp2-zero1": {"sp": 2, "pp": 2, "dp": 2, "zero_stage": 1, "micro_batch": 2},
    "sp2-selective": {"sp": 2, "recompute": "selective", "micro_batch": 4},
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


@pytest.mark.parametrize("plan", ULYSSES)
def test_ulysses(pool: WarmPool, reference: Callable[..., Curve], plan: str) -> None:
    parity.check_parity(pool, reference, MODELS["tied"], ULYSSES[plan])


def test_key_and_value_heads_are_copied_if_there_are_too_few(pool: WarmPool, reference: Callable[..., Curve]) -> None:
    model = dataclasses.replace(MODELS["llama"], kv_heads=2)
    parity.check_parity(pool, reference, model, {"sp": 4, "micro_batch": 4})


@pytest.mark.full
@pytest.mark.parametrize("plan", ULYSSES | MORE_ULYSSES)
@pytest.mark.parametrize("model", MODELS)
def test_ulysses_everything(pool: WarmPool, reference: Callable[..., Curve], model: str, plan: str) -> None:
    parity.check_parity(pool, reference, MODELS[model], (ULYSSES | MORE_ULYSSES)[plan])

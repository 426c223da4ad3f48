"""The arithmetic of a step that is shown closes: what stands before the last equals sign comes to what follows."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from strategies.plan import Offload
from strategies.timing import Timing
from strategies.workload import Framework
from tests.strategies import runs
from tests.strategies.test_timing import plan_of

UNITS = {"G parameters": 1e9, "GB/s": 1e9, "GB": 1e9, "B": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
WORDS = r" (of experts|parameters per pass|gradients|parameters|update|state|tied embeddings|one replica \\+)"


def amount(text: str) -> float:
    """Seconds."""
    number, unit = text.split(" ", 1)
    return float(number) * UNITS[unit]


def closes(numbers: str) -> tuple[float, float]:
    """What the arithmetic comes to, in seconds, and what it is said to come to."""
    said, _, result = numbers.rpartition(" = ")
    if said.startswith("C = "):  # the sum of all collectives first, then what of it is exposed
        collectives, _, exposed = said.removeprefix("C = ").partition("; ")
        computed, told = closes(collectives)
        assert computed == pytest.approx(told, rel=2e-3)
        said = re.sub(r"\bC\b", repr(told), exposed)
    for unit, factor in UNITS.items():
        said = re.sub(rf"([\d.]+(?:e[+-]\d+)?) {unit}(?![\w/])", rf"(\1 * {factor})", said)
    said = re.sub(r"\) B\b", ")", re.sub(WORDS.replace("\\\\", "\\"), "", said))
    found = eval(said.removeprefix("one replica + ").replace(" x ", " * "), {"max": max})
    return float(found), amount(result)


@pytest.mark.parametrize("framework", ["megatron", "fsdp", "mcore"])
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("offload", ["none", "optimizer", "optimizer+params"])
@pytest.mark.parametrize("path", ["", "/nvme"])
def test_communication_update_and_offload_add_up(framework: Framework, zero: int, offload: Offload, path: str) -> None:
    work = replace(runs.work(), framework=framework, deepspeed=framework == "megatron")
    many: list[dict[str, Any]] = [{"tp": 8, "dp": 16}, {"tp": 8, "pp": 8, "dp": 16}, {"dp": 64}, {"tp": 8, "pp": 8}]
    for degrees in many:
        plan = plan_of(work, **degrees, zero_stage=zero, offload=offload, offload_path=path)
        terms = {term.kind: term for term in Timing(work).explain(plan)}
        for kind in ("dp", "optimizer" if offload == "none" else "offload"):
            computed, said = closes(terms[kind].numbers)
            assert computed == pytest.approx(said, rel=2e-3), terms[kind].numbers
            assert said == pytest.approx(terms[kind].value, rel=1e-3)


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("ep", [1, 4, 16])
def test_state_of_experts_adds_up(ep: int, offload: Offload) -> None:
    work = runs.work(runs.GPT4)
    plan = plan_of(work, tp=8, dp=16, ep=ep, offload=offload)
    kind = "optimizer" if offload == "none" else "offload"
    term = next(term for term in Timing(work).explain(plan) if term.kind == kind)
    computed, said = closes(term.numbers)
    assert computed == pytest.approx(said, rel=2e-3), term.numbers
    assert (f"of experts / {16 // ep}" in term.numbers) == (ep > 1)


def test_what_does_not_happen_is_named() -> None:
    work = runs.work()
    terms = {term.kind: term.numbers for term in Timing(work).explain(plan_of(work, tp=8))}
    assert terms["dp"] == "one replica = 0 s"
    assert terms["offload"] == "nothing offloaded = 0 s"

"""What a rule judges, and the arithmetic of nearest legal values that the rules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from strategies.errors import Violation
from strategies.plan import ParallelPlan
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec, Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One plan for one job.

    Attributes:
        model: The model.
        plan: The plan.
        batch: The global batch.
        cluster: Where it shall run; None leaves the rules about the cluster out.
        precision: Arithmetic of forward and backward.
        engine: The plan is for our own engine; False leaves out what only that one refuses.
        left_open: Knobs of the plan that nobody asked for: they follow from the other values.
        judge: Names of the rules that a case breaks, so that a rule proposes only what is legal
            (:mod:`strategies.remedy`); None while such a proposal is judged.
    """

    model: ModelSpec
    plan: ParallelPlan
    batch: BatchSpec
    cluster: ClusterSpec | None
    precision: Precision
    engine: bool = True
    left_open: frozenset[str] = frozenset()
    judge: Judge | None = None


Rule = Callable[[Case], Violation | None]
Judge = Callable[[Case], frozenset[str]]


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending; none of any other."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0] if number > 0 else []
    return sorted({*small, *(number // d for d in small)})


def legal_tp(model: ModelSpec) -> list[int]:
    """Tensor-parallel degrees that cut every tensor of the model evenly, ascending."""
    experts = () if model.moe is None else (model.moe.ffn, model.moe.shared_ffn)
    return divisors(math.gcd(model.heads, model.kv_heads, model.ffn, model.hidden, *experts))


def nearest(value: int, legal: Iterable[int]) -> tuple[int, ...]:
    """The largest legal value up to ``value`` and the smallest above it (one of them at the ends, or none)."""
    values = sorted(set(legal))
    return (*[v for v in values if v <= value][-1:], *[v for v in values if v > value][:1])


def either(values: Iterable[int]) -> str:
    """``3 or 6``."""
    return " or ".join(str(value) for value in values)

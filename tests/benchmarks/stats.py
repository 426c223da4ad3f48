"""What benchmarks print: medians with their spread, and figures beside what they must be."""

from __future__ import annotations

import math
import operator
import os
import statistics
from collections.abc import Mapping, Sequence

QUICK = "PHALANX_BENCH_QUICK"
"""Environment variable: set it for one repeat of everything; a figure that is missed is printed and fails nothing."""

_COMPARED = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}


def repeats(full: int) -> int:
    """How often something is measured."""
    return 1 if os.environ.get(QUICK) else full


def show(title: str, samples: Mapping[str, Sequence[float]], unit: str = "s") -> None:
    """Print one line per contender: the median, the smallest and the largest."""
    print(f"\n{title}")
    width = max(map(len, samples))
    for name, values in samples.items():
        median, low, high = statistics.median(values), min(values), max(values)
        print(f"  {name:{width}}  median {median:8.3f} {unit}  ({low:.3f} to {high:.3f}, {len(values)} of them)")
    print(f"  load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


class Musts:
    """The figures of one benchmark that have to be reached. Each is printed at once; the fixture of the same name fails
    the benchmark for those that were missed, after everything was measured."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def hold(self, what: str, value: float, sign: str, bound: float, form: str = ".3f") -> float:
        """Print a figure beside its bound, note it if it is missed, and return it.

        Args:
            what: What it is.
            value: The figure; one that is no number is missed.
            sign: What it has to be to the bound: ``<=``, ``<``, ``>=`` or ``>``.
            bound: The bound.
            form: How both are written.
        """
        met = _COMPARED[sign](value, bound)
        row = f"{what}: {value:{form}} (must: {sign} {bound:{form}})"
        print(f"  {row} {'met' if met else 'MISSED'}", flush=True)
        if not met:
            self.missed.append(row)
        return value

    def ratio(self, ours: Sequence[float], theirs: Sequence[float], *, what: str, must: float) -> float:
        """The ratio of two medians, which may be ``must`` at most."""
        return self.hold(what, statistics.median(ours) / statistics.median(theirs), "<=", must)

    def verdict(self) -> str:
        """What fails the benchmark, row by row; empty where nothing was missed, or where one repeat was asked for."""
        if not self.missed or os.environ.get(QUICK):
            return ""
        return "\n".join([f"missed: {len(self.missed)}", *(f"  {row}" for row in self.missed)])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median with at least 95 % confidence, whatever the distribution (order statistics).

    With fewer than six values no interval is that sure: the smallest and the largest are given.
    """
    ordered, count = sorted(values), len(values)
    drop = 0
    while drop + 1 < count / 2:
        outside = 2 * sum(math.comb(count, below) for below in range(drop + 1 + 1)) / 2**count
        if outside > 0.05:
            break
        drop += 1
    return ordered[drop], ordered[count - 1 - drop]

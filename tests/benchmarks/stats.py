"""What benchmarks print: medians with their spread, and ratios beside what they must be."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence

QUICK = "PHALANX_BENCH_QUICK"
"""Environment variable: set it for one repeat of everything."""


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


def ratio(ours: Sequence[float], theirs: Sequence[float], *, what: str, must: float) -> float:
    """Print and return the ratio of two medians, beside the most that it may be."""
    value = statistics.median(ours) / statistics.median(theirs)
    verdict = "met" if value <= must else "MISSED"
    print(f"  {what}: {value:.3f} (must: <= {must:.3g}) {verdict}")
    return value


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

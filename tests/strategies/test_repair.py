"""Nodes under repair, where some failures break a whole rack."""

from __future__ import annotations

import heapq
import math
import random
from itertools import islice

import pytest

from strategies.repair import SINGLE, Breaks, Scarcity, broken_nodes, scarcity, under_repair

RACKS: Breaks = ((4, 0.1), (1, 0.7), (0, 0.2))


def played(spares: int, failures: float, breaks: Breaks, calls: int = 200_000) -> Scarcity:
    """The same from a seeded run, with repairs of one second."""
    rng, now_s, short_s, found, left = random.Random(f"{spares}/{failures}/{breaks}"), 0.0, 0.0, 0, 0
    sizes, shares = zip(*breaks, strict=True)
    busy: list[float] = []
    for _ in range(calls):
        at_s = now_s + rng.expovariate(failures)
        while busy and busy[0] <= at_s:
            short_s += (busy[0] - now_s) * (len(busy) > spares)
            now_s = heapq.heappop(busy)
        short_s += (at_s - now_s) * (len(busy) > spares)
        now_s, enough = at_s, len(busy) <= spares
        for _ in range(rng.choices(sizes, shares)[0]):
            heapq.heappush(busy, now_s + 1.0)
        found += enough
        left += enough and len(busy) > spares
    return Scarcity(short_s / now_s, left / max(1, found))


@pytest.mark.parametrize("spares", [0, 1, 4, 8, 12])
@pytest.mark.parametrize("breaks", [SINGLE, RACKS], ids=["single", "racks"])
def test_the_lack_of_nodes_is_the_played_one(spares: int, breaks: Breaks) -> None:
    found, truth = scarcity(spares, 3.755, breaks), played(spares, 3.755, breaks)
    assert found.lost == pytest.approx(truth.lost, abs=0.005)
    assert found.chance == pytest.approx(truth.chance, abs=0.01)


def test_single_failures_are_poisson() -> None:
    poisson = [math.exp(-3.4) * 3.4**nodes / math.factorial(nodes) for nodes in range(30)]
    assert list(islice(under_repair(3.4), 30)) == pytest.approx(poisson, rel=1e-9)


def test_racks_have_the_moments_of_a_compound_poisson_distribution() -> None:
    chances = list(islice(under_repair(3.4, RACKS), 200))
    mean = sum(nodes * chance for nodes, chance in enumerate(chances))
    assert sum(chances) == pytest.approx(1)
    assert mean == pytest.approx(3.4 * broken_nodes(RACKS)) == pytest.approx(3.4 * 1.1)
    variance = sum((nodes - mean) ** 2 * chance for nodes, chance in enumerate(chances))
    assert variance == pytest.approx(3.4 * (0.1 * 16 + 0.7))


def test_more_spares_are_never_worse() -> None:
    shares = [scarcity(spares, 3.755, RACKS).lost for spares in range(60)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(-math.expm1(-3.755 * 0.8)), "any broken node is one too many"


@pytest.mark.parametrize("spares", [0, 450, 480, 500, 520, 560, 700])
def test_many_nodes_are_counted_by_the_normal_limit(spares: int) -> None:
    few, many = scarcity(spares, 499.99), scarcity(spares, 500.01)
    assert many.lost == pytest.approx(few.lost, abs=0.02)
    assert many.chance == pytest.approx(few.chance, abs=0.02)

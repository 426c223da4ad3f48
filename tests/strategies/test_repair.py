"""Nodes under repair, where some failures break a whole rack."""

from __future__ import annotations

import heapq
import random

import pytest

from strategies.repair import blocked, erlang_b


def played(places: int, load: float, rack: int, share: float, calls: int = 200_000) -> float:
    """Share of the failures that find no place, one node at a time, with repairs of one second."""
    rng, now_s, refused, nodes = random.Random(f"{places}/{load}/{rack}"), 0.0, 0, 0
    rate = load / (1 - share + share * rack)
    busy: list[float] = []
    for _ in range(calls):
        now_s += rng.expovariate(rate)
        while busy and busy[0] <= now_s:
            heapq.heappop(busy)
        for _ in range(rack if rng.random() < share else 1):
            nodes += 1
            if len(busy) < places:
                heapq.heappush(busy, now_s + 1.0)
            else:
                refused += 1
    return refused / nodes


def peak(rack: int, share: float) -> float:
    return (1 - share + share * rack**2) / (1 - share + share * rack)


def test_single_failures_are_erlangs() -> None:
    assert blocked(9, 3.4) == erlang_b(9, 3.4)
    assert played(9, 3.4, 1, 0.0) == pytest.approx(erlang_b(9, 3.4), rel=0.1)


@pytest.mark.parametrize("places", [5, 9, 13, 17])
def test_racks_count_as_hayward_says(places: int) -> None:
    found, truth = blocked(places, 4.9, peak(4, 0.1)), played(places, 4.9, 4, 0.1)
    assert found == pytest.approx(truth, abs=0.01), "within one percent of the time"
    assert erlang_b(places, 4.9) < 0.9 * truth, "single failures alone would promise too much"


def test_more_places_are_never_worse() -> None:
    shares = [blocked(places, 4.9, 1.92) for places in range(40)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0

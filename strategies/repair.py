"""Nodes under repair: how many there are, and how often too many. Pure arithmetic.

A node breaks as often while its gang waits as while it works, and a broken one is repaired at once: an infinite-server
queue. The failures whose nodes are under repair are then Poisson, whatever the distribution of the repair time, and the
nodes are as many as these failures broke: a compound Poisson distribution, by the recursion of H. H. Panjer,
"Recursive evaluation of a family of compound distributions" (ASTIN Bulletin 1981).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from itertools import islice
from statistics import NormalDist
from typing import NamedTuple

SPARES_PROBABILITY = 0.99
"""Chance that a failure finds a spare, which the number of spares is chosen for."""

Breaks = tuple[tuple[int, float], ...]
"""How many nodes a failure breaks at once, and the share of the failures that break so many."""

SINGLE: Breaks = ((1, 1.0),)
"""Every failure breaks one node."""

_TAIL = 1e-12  # smaller probabilities are dropped
_MANY = 500.0  # nodes under repair from which the normal limit serves
_FAR = 20.0  # standard deviations from which the normal distribution is its tail


class Scarcity(NamedTuple):
    """How often more nodes are under repair than stand by.

    Attributes:
        lost: Share of the time.
        chance: Of one failure that finds enough nodes: that it leaves too few.
    """

    lost: float
    chance: float


def broken_nodes(breaks: Breaks) -> float:
    """Nodes that one failure breaks, on average."""
    return sum(size * share for size, share in breaks)


def under_repair(failures: float, breaks: Breaks = SINGLE) -> Iterator[float]:
    """The chances that 0, 1, 2, ... nodes are under repair, without end.

    Args:
        failures: Failures in the time of one repair, on average; at most some 700.
        breaks: How many nodes each of them breaks.
    """
    weights = [(size, failures * size * share) for size, share in breaks if size]
    recent = deque(
        [math.exp(-failures * sum(share for size, share in breaks if size))], max((s for s, _ in weights), default=1)
    )
    nodes = 0
    while True:
        yield recent[-1]
        nodes += 1
        recent.append(sum(weight * recent[-size] for size, weight in weights if size <= len(recent)) / nodes)


def scarcity(spares: int, failures: float, breaks: Breaks = SINGLE) -> Scarcity:
    """How often ``spares`` are too few; see :func:`under_repair`."""
    mean = failures * broken_nodes(breaks)
    if mean > _MANY:
        spread = math.sqrt(failures * sum(size * size * share for size, share in breaks))
        z, normal = (spares + 0.5 - mean) / spread, NormalDist()
        enough = normal.cdf(z)
        ratio = -z if z < -_FAR else normal.pdf(z) / enough  # Mills: so it is in the tail
        return Scarcity(1 - enough, min(1.0, broken_nodes(breaks) * ratio / spread))
    enough = crossing = 0.0
    for nodes, chance in enumerate(islice(under_repair(failures, breaks), spares + 1)):
        enough += chance
        crossing += chance * sum(share for size, share in breaks if size > spares - nodes)
        if nodes > mean and 1 - enough < _TAIL:
            return Scarcity(0.0, 0.0)
    return Scarcity(max(0.0, 1 - enough), crossing / enough)


def spares_for(load: float, probability: float = SPARES_PROBABILITY) -> int:
    """The fewest spares that are enough with ``probability``, when ``load`` nodes are under repair on average."""
    if load > _MANY:
        return math.ceil(load + NormalDist().inv_cdf(probability) * math.sqrt(load))
    total = 0.0
    for spares, chance in enumerate(under_repair(load)):
        total += chance
        if total >= probability:
            return spares
    raise AssertionError("the chances add up to 1")

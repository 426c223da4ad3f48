"""Nodes under repair: how many there are, and how often too many. Pure arithmetic."""

from __future__ import annotations

import math
from statistics import NormalDist

SPARES_PROBABILITY = 0.99
"""Chance that a failure finds a spare, which the number of spares is chosen for."""

_TAIL = 1e-12  # smaller probabilities are dropped
_MANY = 500.0  # a load from which the normal limit serves


def erlang_b(places: int, load: float) -> float:
    """Erlang's B formula: the share of time in which all ``places`` are taken, ``load`` being offered."""
    if places > 100_000:  # its normal limit (Jagerman, 1974) agrees within 1 %, and takes no time
        z, normal = (places - load) / math.sqrt(load), NormalDist()
        return 1 - places / load if z < -20 else normal.pdf(z) / normal.cdf(z) / math.sqrt(load)
    taken = 1.0
    for place in range(1, places + 1):
        taken = load * taken / (place + load * taken)
        if taken < _TAIL:
            return 0.0
    return taken


def spares_for(load: float, probability: float = SPARES_PROBABILITY) -> int:
    """The fewest spares that are enough with ``probability``, when ``load`` nodes are under repair on average.

    The number under repair is Poisson (M/G/infinity), whatever the distribution of the repair time.
    """
    if load > _MANY:
        return math.ceil(load + NormalDist().inv_cdf(probability) * math.sqrt(load))
    spares, term = 0, math.exp(-load)
    total = term
    while total < probability:
        spares += 1
        term *= load / spares
        total += term
    return spares


def blocked(places: int, load: float, peak: float = 1.0) -> float:
    """The share of time in which all ``places`` are taken, where calls come in batches.

    Hayward's approximation (A. A. Fredericks, "Congestion in blocking systems - a simple approximation technique", BSTJ
    1980): calls that come in batches load a system as single calls load one that is smaller by their peakedness.

    Args:
        places: Nodes that may be under repair at a time.
        load: Nodes under repair on average, if there were places for all.
        peak: Mean square of the size of a batch over its mean, 1 for single calls.
    """
    size, offered = places / peak, load / peak
    low = math.floor(size)
    below = erlang_b(low, offered)
    if size == low or not below:
        return below
    above = max(erlang_b(low + 1, offered), _TAIL)
    return below * math.pow(above / below, size - low)

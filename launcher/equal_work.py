"""Own times of ranks beside those of the ranks that do equal work. Pure, and quick for tens of thousands of ranks.

The ranks of a pipeline stage do equal work, and each is compared with those on other nodes. So what most ranks of a
stage are compared with differs by a few ranks only: a gang of 24,960 ranks has 3,120 such groups, of 1,656 ranks each.
A stage is put in order once for a step, and the median without the ranks of a node is found by their places in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence


class Peers:
    """Who is compared with whom.

    Args:
        peers: For each rank, the other ranks that do equal work; empty where there are none. Ranks that have the same
            may share the list, which makes it quick.

    Attributes:
        compared: Ranks that have peers.
    """

    def __init__(self, peers: Sequence[Sequence[int]]) -> None:
        self.compared = [rank for rank, others in enumerate(peers) if others]
        sharing: dict[int, list[int]] = defaultdict(list)  # by identity: to compare lists would take longer
        for rank in self.compared:
            sharing[id(peers[rank])].append(rank)
        self._apart: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)  # ranks -> those compared with the rest
        for ranks in sharing.values():
            self._apart[tuple(sorted((*peers[ranks[0]], *ranks)))].append(ranks)

    def ratios(self, own_s: Sequence[float]) -> list[float]:
        """Own time of every rank over the median of its peers; 0 for a rank that has none."""
        found = [0.0] * len(own_s)
        for whole, groups in self._apart.items():
            ordered = sorted(whole, key=own_s.__getitem__)
            place = dict(zip(ordered, range(len(ordered)), strict=True))
            for ranks in groups:
                median = _median_without(sorted(place[rank] for rank in ranks), ordered, own_s)
                for rank in ranks:
                    found[rank] = own_s[rank] / median
        return found


def _median_without(places: Sequence[int], ordered: Sequence[int], own_s: Sequence[float]) -> float:
    """The median time of ordered ranks, but for those at some places of the order."""
    count = len(ordered) - len(places)
    low, high = (count - 1) // 2, count // 2
    for place in places:
        low += place <= low
        high += place <= high
    return (own_s[ordered[low]] + own_s[ordered[high]]) / 2 if low < high else own_s[ordered[low]]

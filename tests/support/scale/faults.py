"""A seeded trace of failures: when, of what kind, and where. It does not know how many nodes are simulated.

Places are shares of the gang, so that one trace strikes a large gang and a small one alike.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from strategies.repair import Breaks
from tests.support.scale.clock import DAY_S

FaultKind = Literal["dead", "silent", "crash", "rack", "spare"]
RACK_NODES = 4  # nodes of eight devices behind one switch


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One failure.

    Attributes:
        at_s: When, seconds since the start.
        kind: ``dead``: node and agent are gone, their connections end; ``silent``: they say nothing any more, and no
            connection ends; ``crash``: a rank is killed, the node is well; ``rack``: neighbours die at once, and with
            them what memory held; ``spare``: a node dies that stands by.
        place: Where in the gang (or among the spares), from 0 to 1.
    """

    at_s: float
    kind: FaultKind
    place: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """How often things fail, and how.

    Attributes:
        per_node_day: Failures of single nodes, per node and day.
        correlated: Share of all failures of the gang that are racks.
        silent: Share of the single failures that end no connection.
        crash: Share of the single failures that break no node.
        repair_s: Until a broken node is back.
        apart: Replicas lie in another rack, so that one rack takes nobody's memory and replica both.
    """

    per_node_day: float = 0.0065
    correlated: float = 0.1
    silent: float = 0.1
    crash: float = 0.0
    repair_s: float = 14400.0
    apart: bool = True

    def gang_per_s(self, nodes: int) -> float:
        """Failures of a gang of ``nodes`` per second."""
        return nodes * self.per_node_day / DAY_S / (1 - self.correlated)

    @property
    def breaks(self) -> Breaks:
        """Nodes that one failure breaks, and the share of the failures that break so many."""
        single = 1 - self.correlated
        return ((RACK_NODES, self.correlated), (1, single * (1 - self.crash)), (0, single * self.crash))


def trace(rates: Rates, *, nodes: int, spares: int, days: float, seed: int) -> list[Fault]:
    """Everything that fails, in order.

    Args:
        rates: How often.
        nodes: Nodes of the gang.
        spares: Nodes that stand by.
        days: For how long.
        seed: Of the random numbers.
    """
    gang, idle = random.Random(f"gang/{seed}"), random.Random(f"spares/{seed}")
    found, at_s = [], gang.expovariate(rates.gang_per_s(nodes))
    while at_s < days * DAY_S:
        found.append(Fault(at_s=at_s, kind=_kind(rates, gang.random(), gang.random()), place=gang.random()))
        at_s += gang.expovariate(rates.gang_per_s(nodes))
    at_s = idle.expovariate(spares * rates.per_node_day / DAY_S) if spares else days * DAY_S
    while at_s < days * DAY_S:
        found.append(Fault(at_s=at_s, kind="spare", place=idle.random()))
        at_s += idle.expovariate(spares * rates.per_node_day / DAY_S)
    return sorted(found, key=lambda fault: fault.at_s)


def _kind(rates: Rates, correlated: float, single: float) -> FaultKind:
    if correlated < rates.correlated:
        return "rack"
    if single < rates.silent:
        return "silent"
    return "crash" if single < rates.silent + rates.crash else "dead"

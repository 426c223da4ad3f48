"""How the event log names the nodes of a gang: all of them once, later only the places that changed hands. Pure.

A log must grow with what is decided and saved, not with nodes: a gang of 3,120 nodes that lost one of them a few
thousand times would otherwise write their names a few thousand times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHORT = 64
"""Gangs of fewer nodes are always written out: that is easier to read."""


def fields(before: Sequence[str], nodes: Sequence[str]) -> dict[str, Any]:
    """What to record.

    Args:
        before: Nodes of the attempt before, in gang order; empty at the first start.
        nodes: Nodes of the attempt, in gang order.
    """
    moved = {str(place): node for place, node in enumerate(nodes) if place >= len(before) or before[place] != node}
    if len(nodes) < SHORT or len(nodes) != len(before) or 2 * len(moved) > len(nodes):
        return {"nodes": list(nodes)}
    return {"moved": moved}


def read(before: Sequence[str], data: Mapping[str, Any]) -> tuple[str, ...]:
    """The nodes that :func:`fields` recorded, in gang order."""
    if "nodes" in data:
        return tuple(str(node) for node in data["nodes"])
    nodes = list(before)
    for place, node in data["moved"].items():
        nodes[int(place)] = str(node)
    return tuple(nodes)

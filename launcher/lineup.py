"""Which nodes form the gang, and in which order. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def line_up(before: Sequence[str], up: Collection[str], need: int) -> list[str]:
    """Nodes in gang order: who was there keeps its place, others fill the gaps.

    Keeping places keeps what a node has in memory useful to its ranks, and makes the log easy to read.

    Args:
        before: Nodes of the last attempt, in gang order; empty at the first start.
        up: Nodes that can be used now, at least ``need``.
        need: Nodes that the plan takes.
    """
    kept = [node if node in up else None for node in before[:need]]
    kept += [None] * (need - len(kept))
    fresh = [node for node in sorted(up) if node not in before]
    late = [node for node in before[need:] if node in up]
    fill = iter([*fresh, *late])
    return [node if node is not None else next(fill) for node in kept]

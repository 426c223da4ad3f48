"""Nodes that fail again and again are left out for a while. Pure.

Only what speaks against a node counts: a traceback of the user's code would come on any other node as well, and a node
that was lost or taken away is not there to be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.recovery import FailureKind
from launcher.request import RecoverySpec
from launcher.run import Run

AGAINST_THE_NODE = frozenset(
    {FailureKind.RANK_KILLED, FailureKind.HANG, FailureKind.NODE_LOST, FailureKind.PARTITIONED}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exclusion:
    """One node that is left out.

    Attributes:
        node: The node.
        until: UTC seconds.
        reason: One sentence for people.
    """

    node: str
    until: float
    reason: str

    @property
    def fields(self) -> dict[str, Any]:
        """What the event log keeps of it."""
        return {"node": self.node, "until": self.until, "reason": self.reason}


def after_failure(run: Run, spec: RecoverySpec) -> Exclusion | None:
    """Whether the newest failure of a run has been one too many for its node.

    Args:
        run: The run, its newest failure already folded in.
        spec: How many are too many, and for how long.
    """
    if not run.failures or spec.exclude_after is None:
        return None
    newest = run.failures[-1]
    if not newest.node or newest.kind not in AGAINST_THE_NODE or run.excluded.get(newest.node, 0.0) > newest.time:
        return None
    held_against = [
        one
        for one in run.failures
        if one.node == newest.node and one.kind in AGAINST_THE_NODE and newest.time - one.time <= spec.exclude_window_s
    ]
    if len(held_against) < spec.exclude_after:
        return None
    why = f"{len(held_against)} failures within {newest.time - held_against[0].time:.0f} s, the last: {newest.kind}"
    return Exclusion(node=newest.node, until=newest.time + spec.exclude_for_s, reason=why)


def usable(
    up: Collection[str], excluded: Mapping[str, float], now: float, legal: Callable[[int], bool]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Which nodes may carry ranks.

    Args:
        up: Nodes that answer.
        excluded: Node -> until when it is left out (UTC seconds).
        now: UTC seconds.
        legal: Whether so many nodes carry a plan.

    Returns:
        The nodes, and those of them that are taken back because there is no plan without them: the run is worth more
        than the suspicion. The one whose time is over first comes first.
    """
    out = sorted((node for node in up if excluded.get(node, 0.0) > now), key=lambda node: (excluded[node], node))
    rest = frozenset(up) - frozenset(out)
    if legal(len(rest)) or not legal(len(up)):
        return rest, ()
    count = next(count for count in range(1, len(out) + 1) if legal(len(rest) + count))
    return rest | frozenset(out[:count]), tuple(out[:count])

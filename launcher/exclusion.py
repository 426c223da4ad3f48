"""Nodes that carry no ranks for a while. Pure.

A node that fails again and again is left out. Only what speaks against a node counts: a traceback of the user's code
would come on any other node as well, and a node that was lost or taken away is not there to be left out.

A node whose device is gone is left out at once if another one stands by, and else when that has happened twice: a
device may only have been busy. And an error that comes again before the first step may be the node's, whatever it says:
one other node is tried before it is called the code's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.attempts import Fall
from launcher.recovery import FailureKind
from launcher.request import RecoverySpec
from launcher.run import Run

AGAINST_THE_NODE = frozenset(
    {
        FailureKind.RANK_KILLED,
        FailureKind.HANG,
        FailureKind.NODE_LOST,
        FailureKind.PARTITIONED,
        FailureKind.DEVICE_LOST,
        FailureKind.DEVICE_FAULT,
        FailureKind.LINK_FAULT,
        FailureKind.START_TIMEOUT,
    }
)
_LOST_TWICE = 2


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


def after_failure(run: Run, spec: RecoverySpec, *, spare: bool = False) -> Exclusion | None:
    """Whether the newest failure of a run has been one too many for its node.

    Args:
        run: The run, its newest failure already folded in.
        spec: How many are too many, and for how long.
        spare: Another node stands by.
    """
    if not run.failures:
        return None
    newest = run.failures[-1]
    if not newest.node or run.excluded.get(newest.node, 0.0) > newest.time:
        return None
    before = [
        one for one in run.failures if one.node == newest.node and newest.time - one.time <= spec.exclude_window_s
    ]
    why = (
        _without_device(before, spare)
        or _suspect_device(run, spec)
        or _at_the_start(run, spec, spare)
        or _too_often(before, spec)
    )
    return Exclusion(node=newest.node, until=newest.time + spec.exclude_for_s, reason=why) if why else None


def _without_device(before: Sequence[Fall], spare: bool) -> str:
    lost = sum(one.kind == FailureKind.DEVICE_LOST for one in before)
    if before[-1].kind != FailureKind.DEVICE_LOST or not (spare or lost >= _LOST_TWICE):
        return ""
    return "a device of it is gone or cannot be taken" + (", and another node stands by" if spare else ", once more")


def _suspect_device(run: Run, spec: RecoverySpec) -> str:
    """It may be the device as well as the program: without the node that shows."""
    newest = run.failures[-1]
    alike = [one for one in run.failures if newest.signature and one.signature == newest.signature]
    if newest.kind != FailureKind.DEVICE_FAULT or len(alike) != spec.same_error_limit:
        return ""
    if {one.node for one in alike} != {newest.node}:
        return ""
    return f"a device of it has failed at the same step {len(alike)} times: whether it is the device shows elsewhere"


def _at_the_start(run: Run, spec: RecoverySpec, spare: bool) -> str:
    """The same error again, before anything was trained, and only ever on this node."""
    newest, attempt = run.failures[-1], run.attempt
    if spare and newest.kind == FailureKind.START_TIMEOUT:
        return "the others have waited for it in vain before the first step, and another node stands by"
    if not (spare and newest.signature) or attempt is None or attempt.trained is not None:
        return ""
    alike = [one for one in run.failures if one.signature == newest.signature]
    if len(alike) < spec.same_error_limit or {one.node for one in alike} != {newest.node}:
        return ""
    return f"the same error {len(alike)} times before the first step, and another node stands by: that one is tried"


def _too_often(before: Sequence[Fall], spec: RecoverySpec) -> str:
    held_against = [one for one in before if one.kind in AGAINST_THE_NODE]
    newest, limit = before[-1], spec.exclude_after
    if limit is None or len(held_against) < limit or newest.kind not in AGAINST_THE_NODE:
        return ""
    seconds = newest.time - held_against[0].time
    return f"{len(held_against)} failures within {seconds:.0f} s, the last: {newest.kind}"


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

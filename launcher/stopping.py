"""How long the end of a gang is waited for, and which node is given up over it.

A node whose agent says what it waits for (a driver that tears a device down, a mount that is stuck) has
``recovery.kill_patience_s``: a node that is healthy, its warm pool and what it holds in memory are worth more than the
time. One that says nothing has :data:`UNCONFIRMED_S`. No rank of the next attempt starts anywhere before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from launcher.exclusion import Exclusion
from launcher.request import RecoverySpec
from launcher.run import EventKind, RunEvent

if TYPE_CHECKING:
    from launcher.gang_state import GangState  # status needs nothing of it

UNCONFIRMED_S = 10.0
STILL_TRUE = (
    EventKind.CHECKPOINT_COMMITTED,
    EventKind.CHECKPOINT_FAILED,
    EventKind.POOL_UNSAFE,
    EventKind.RANKS_DYING,
)
"""What may still be told of an attempt that is being stopped."""
_OVER = (EventKind.GANG_STOPPED, EventKind.ATTEMPT_PLANNED, EventKind.RUN_CANCELLED, EventKind.RUN_FAILED)


class Gang(Protocol):
    """What is needed of :class:`launcher.gang.Gang`."""

    def drop(self, node: str, why: str) -> None:
        """Give a node up."""


def words(left: Iterable[Mapping[str, Any]]) -> str:
    """What has not ended, for people.

    Args:
        left: Rows of ``rank`` (-1: of none), ``pid`` and ``state``.
    """
    return ", ".join(f"{_name(int(row['rank']))} (pid {row['pid']}, {row['state'] or 'ending'})" for row in left)


def _name(rank: int) -> str:
    return "a process" if rank < 0 else f"rank {rank}"


def awaited(events: Iterable[RunEvent]) -> list[dict[str, Any]]:
    """What the end of the newest attempt is waiting for; nothing once it is over."""
    found: list[dict[str, Any]] = []
    for event in events:
        if event.kind is EventKind.RANKS_DYING:
            found.append(dict(event.data))
        elif event.kind in _OVER:
            found = []
    return found


def patience_s(spec: RecoverySpec, *, dying: bool) -> float:
    """Seconds from SIGKILL to the word that no rank is left; ``dying``: the node has said what it waits for."""
    return spec.kill_patience_s if dying else UNCONFIRMED_S


def give_up_late(gang: Gang, state: GangState, waited_s: float, spec: RecoverySpec, now: float) -> list[Exclusion]:
    """Give up nodes that have not confirmed the end of their ranks in time; that they are lost is seen after that.

    Args:
        gang: Its agents.
        state: What is known of it.
        waited_s: Since its ranks were killed.
        spec: How patient to be.
        now: UTC seconds.

    Returns:
        The nodes that are left out because devices are still held there.
    """
    left_out = []
    for node, reason in overdue(state, waited_s, spec).items():
        gang.drop(node, reason)
        state.give_up(node)
        if node in state.dying:
            left_out.append(Exclusion(node=node, until=now + spec.exclude_for_s, reason=reason))
    return left_out


def overdue(state: GangState, waited_s: float, spec: RecoverySpec) -> dict[str, str]:
    """Nodes that are given up, with the reason.

    Args:
        state: The gang.
        waited_s: Since its ranks were killed.
        spec: How patient to be.
    """
    waiting = [node for node in state.placement if node not in state.stopped]
    late = [node for node in waiting if waited_s > patience_s(spec, dying=node in state.dying)]
    return {node: why(state.dying.get(node), spec) for node in late}


def why(left: Iterable[Mapping[str, Any]] | None, spec: RecoverySpec) -> str:
    """Why a node is given up; ``left`` is what it has told of its processes, None for nothing."""
    if left is None:
        return "it did not confirm the end of its ranks"
    within = f"within {spec.kill_patience_s:g} s (recovery.kill_patience_s)"
    return f"SIGKILL has not ended {words(left)} {within}, which still hold its devices"

"""Do the clocks of the nodes agree with the controller's? An agent tells its time when it is greeted. Pure.

Nothing that decides compares clocks of two machines. But the times in metrics.jsonl are those of rank 0's node, and the
ledger sets them beside those of the event log: a clock that is off would move seconds from one class to another, so
what is known of it is taken off (:class:`Offset`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from launcher import roster
from launcher.observation import Observation
from launcher.run import EventKind, RunEvent

SKEW_S = 1.0  # about what a recovery takes; clocks that are kept by NTP differ by far less
MAX_NAMED = 8  # by one controller: if all differ, it is its own, and the log grows with decisions


def difference(asked: float, took_s: float, told: float) -> dict[str, float]:
    """How far a clock is ahead of ours, and within what.

    Args:
        asked: When it was asked, by our clock (UTC seconds).
        took_s: How long the answer took.
        told: What it said (UTC seconds).
    """
    return {"ahead_s": told - asked - took_s / 2, "within_s": took_s / 2}


class Clocks:
    """Names the nodes whose clock is off, each once.

    Args:
        record: Writes an event.
    """

    def __init__(self, record: Callable[..., None]) -> None:
        self._record = record
        self._named: set[str] = set()

    def note(self, seen: Observation) -> None:
        """A node has come."""
        data: dict[str, Any] = dict(seen.data)
        if "ahead_s" not in data or seen.node in self._named or len(self._named) >= MAX_NAMED:
            return
        ahead_s, within_s = float(data["ahead_s"]), float(data["within_s"])
        if abs(ahead_s) - within_s > SKEW_S:
            self._named.add(seen.node)
            told = {"ahead_s": round(ahead_s, 3), "within_s": round(within_s, 3)}
            self._record(EventKind.CLOCK_SKEWED, node=seen.node, **told)


class Offset:
    """How far the clock of rank 0's node is ahead of that of the log, as events tell it."""

    def __init__(self) -> None:
        self._ahead: dict[str, float] = {}
        self._nodes: Sequence[str] = ()
        self._host: object = None  # whose clock is that of the log

    def enter(self, event: RunEvent) -> None:
        """Something has happened."""
        if event.kind is EventKind.CONTROLLER_STARTED:
            if event.data.get("host") != self._host:  # it compares with a clock of its own
                self._ahead.clear()
            self._host = event.data.get("host")
        elif event.kind is EventKind.CLOCK_SKEWED:
            self._ahead[str(event.data["node"])] = float(event.data["ahead_s"])
        elif event.kind is EventKind.ATTEMPT_PLANNED and not event.data.keys().isdisjoint(("nodes", "moved")):
            self._nodes = roster.read(self._nodes, event.data)

    @property
    def ahead_s(self) -> float:
        """Seconds; 0 where nothing is known."""
        return self._ahead.get(self._nodes[0], 0.0) if self._nodes else 0.0


def ahead_s(events: Iterable[RunEvent]) -> float:
    """How far the clock of rank 0's node is ahead of that of the log, at its end."""
    offset = Offset()
    for event in events:
        offset.enter(event)
    return offset.ahead_s


def words(ahead_s: float, within_s: float) -> str:
    """For people."""
    side = "ahead of" if ahead_s > 0 else "behind"
    about = f" (to {within_s:.1f} s)" if within_s >= 0.1 else ""
    return f"its clock is {abs(ahead_s):,.1f} s {side} the controller's{about}, and so are the times of its ranks"

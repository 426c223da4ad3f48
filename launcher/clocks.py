"""Do the clocks of the nodes agree with the controller's? An agent tells its time when it is greeted. Pure.

Nothing that decides compares clocks of two machines, but for the one that refuses a resume
(:mod:`launcher.resume_checks`). But the times in metrics.jsonl are those of rank 0's node, and
those of failures of the node that tells of them, and the ledger sets both beside those of the event log: a clock that
is off would move seconds from one class to another, so what is known of it is taken off (:class:`Offset`,
:meth:`Clocks.ours`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from launcher import roster
from launcher.observation import Observation
from launcher.run import EventKind, RunEvent

SKEW_S = 1.0  # about what a recovery takes; clocks that are kept by NTP differ by far less
MAX_NAMED = 8  # and rank 0's: if all differ, it is the controller's own, and the log must not grow with nodes


def difference(asked: float, took_s: float, told: float) -> dict[str, float]:
    """How far a clock is ahead of ours, and within what.

    Args:
        asked: When it was asked, by our clock (UTC seconds).
        took_s: How long the answer took.
        told: What it said (UTC seconds).
    """
    return {"ahead_s": told - asked - took_s / 2, "within_s": took_s / 2}


def is_off(ahead_s: float, within_s: float) -> bool:
    """Whether a clock surely differs by more than :data:`SKEW_S`."""
    return abs(ahead_s) - within_s > SKEW_S


class Clocks:
    """Names the nodes whose clock is off, each once, and once more when it has changed or agrees again.

    Args:
        record: Writes an event.
    """

    def __init__(self, record: Callable[..., None]) -> None:
        self._record = record
        self._begun = False
        self._named: dict[str, float] = {}  # as the log has it: node -> ahead
        self._untold: dict[str, dict[str, float]] = {}  # before we have begun, or too many
        self._first = ""

    def begin(self, events: Iterable[RunEvent]) -> None:
        """The log says that this controller has begun: what was found before is its own, and may be told.

        Args:
            events: The log.
        """
        offset = Offset.of(events)
        self._named = {str(one["node"]): float(one["ahead_s"]) for one in offset.off}
        untold, self._untold, self._begun, self._first = self._untold, {}, True, offset.first
        for node, told in untold.items():
            self._weigh(node, told)

    def first(self, node: str) -> None:
        """This node has rank 0, and so the clock of the steps: it is named however many are."""
        self._first = node
        if node in self._untold:
            self._weigh(node, self._untold.pop(node))

    def note(self, seen: Observation) -> None:
        """A node has come."""
        if "ahead_s" in seen.data:
            self._weigh(seen.node, {name: round(float(seen.data[name]), 3) for name in ("ahead_s", "within_s")})

    def ahead_s(self, node: str) -> float:
        """How far the clock of a node is ahead of ours, in seconds; 0 where it is not off."""
        return self._named.get(node, self._untold.get(node, {}).get("ahead_s", 0.0))

    def ours(self, seen: Observation) -> Observation:
        """The same by our clock, where its node has said by its own when it was."""
        ahead_s = self.ahead_s(seen.node)
        if not ahead_s or "time" not in seen.data or seen.kind == "agent_lost":
            return seen
        return replace(seen, time=seen.time - ahead_s)

    def _weigh(self, node: str, told: dict[str, float]) -> None:
        if not self._begun:
            self._untold[node] = told
            return
        self._untold.pop(node, None)
        before, off = self._named.get(node), is_off(**told)
        if before is not None:
            changed = is_off(told["ahead_s"] - before, told["within_s"])
            if not changed and abs(told["ahead_s"]) + told["within_s"] > SKEW_S / 2:
                return
            del self._named[node]
        elif off and node != self._first and len(self._named) >= MAX_NAMED:
            self._untold[node] = told
            return
        if off:
            self._named[node] = told["ahead_s"]
        if off or before is not None:
            self._record(EventKind.CLOCK_SKEWED, node=node, **told)


class Offset:
    """How far the clock of rank 0's node is ahead of that of the log, as events tell it."""

    def __init__(self) -> None:
        self._off: dict[str, dict[str, Any]] = {}
        self._nodes: Sequence[str] = ()
        self._host: object = None  # whose clock is that of the log

    @classmethod
    def of(cls, events: Iterable[RunEvent]) -> Offset:
        """At the end of a log."""
        offset = cls()
        for event in events:
            offset.enter(event)
        return offset

    def enter(self, event: RunEvent) -> None:
        """Something has happened."""
        if event.kind is EventKind.CONTROLLER_STARTED:
            if event.data.get("host") != self._host:  # it compares with a clock of its own
                self._off.clear()
            self._host = event.data.get("host")
        elif event.kind is EventKind.CLOCK_SKEWED:
            self._off.pop(str(event.data["node"]), None)
            if is_off(float(event.data["ahead_s"]), float(event.data.get("within_s", 0.0))):
                self._off[str(event.data["node"])] = dict(event.data)
        elif event.kind is EventKind.ATTEMPT_PLANNED and not event.data.keys().isdisjoint(("nodes", "moved")):
            self._nodes = roster.read(self._nodes, event.data)

    @property
    def off(self) -> list[dict[str, Any]]:
        """What was told last of every node whose clock is off."""
        return list(self._off.values())

    @property
    def first(self) -> str:
        """Rank 0's node; "" before there is one."""
        return self._nodes[0] if self._nodes else ""

    @property
    def ahead_s(self) -> float:
        """Seconds; 0 where nothing is known."""
        return float(self._off[self.first]["ahead_s"]) if self.first in self._off else 0.0


def words(ahead_s: float, within_s: float) -> str:
    """For people."""
    if not is_off(ahead_s, within_s):
        return "its clock agrees with the controller's again"
    side = "ahead of" if ahead_s > 0 else "behind"
    about = f" (to {within_s:.1f} s)" if within_s >= 0.1 else ""
    return f"its clock is {abs(ahead_s):,.1f} s {side} the controller's{about}, and so are the times of its ranks"

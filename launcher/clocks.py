"""Do the clocks of the nodes agree with the controller's? An agent tells its time when it is greeted. Pure.

Nothing that decides compares clocks of two machines. But the times in metrics.jsonl are those of rank 0's node, and the
ledger sets them beside those of the event log: a clock that is off moves seconds from one class to another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher.observation import Observation
from launcher.run import EventKind

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


def words(ahead_s: float, within_s: float) -> str:
    """For people."""
    side = "ahead of" if ahead_s > 0 else "behind"
    about = f" (to {within_s:.1f} s)" if within_s >= 0.1 else ""
    return f"its clock is {abs(ahead_s):,.1f} s {side} the controller's{about}: the times of its ranks are as wrong"

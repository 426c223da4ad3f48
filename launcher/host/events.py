"""What an agent remembers of the current attempt, so that a controller that comes later has missed nothing.

Bounded: a newer step report of a rank replaces the older one, and of the rest the newest few thousand stay.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from typing import Any

from launcher.host import wire

AGENT_KINDS = frozenset({"exit", "reserved", "spawned", "killed", "dying", "leaving", "notice", "pool", "stack"})
"""Kinds of events that the agent itself makes; every other kind is the report of a rank."""

_MAX_EVENTS = 4096


class EventLog:
    """Events in the order of their numbers, which count from 1 and are never used twice."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._lines: dict[int, bytes] = {}
        self._newest_step: dict[Any, int] = {}
        self._last = 0

    @property
    def last(self) -> int:
        """Number of the newest event; 0 before the first."""
        return self._last

    def append(self, event: dict[str, Any]) -> None:
        """Add an event; ``time`` (UTC seconds) is filled in when it has none."""
        self._last += 1
        event = {"time": time.time()} | event
        self._lines[self._last] = wire.encode({"op": "event", "seq": self._last, "event": event})
        self._numbers.append(self._last)
        if event.get("kind") == "step":
            self._drop(self._newest_step.get(event.get("rank")))
            self._newest_step[event.get("rank")] = self._last
        if len(self._numbers) > _MAX_EVENTS:
            self._drop(self._numbers[0])

    def begin_attempt(self) -> None:
        """Forget everything: a new attempt begins."""
        self._numbers.clear()
        self._lines.clear()
        self._newest_step.clear()

    def after(self, number: int) -> tuple[int, bytes] | None:
        """The first remembered event after ``number``, with its number, encoded for the wire."""
        index = bisect_right(self._numbers, number)
        if index == len(self._numbers):
            return None
        found = self._numbers[index]
        return found, self._lines[found]

    def _drop(self, number: int | None) -> None:
        if number is not None and self._lines.pop(number, None) is not None:
            del self._numbers[bisect_right(self._numbers, number) - 1]

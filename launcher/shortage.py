"""Since when nodes are missing while a gang is gathered: what is not there is waited for from the beginning."""

from __future__ import annotations

from typing import Any

from launcher.clock import Clock

NOTICE_S = 3.0  # waiting for nodes shorter than this is not worth a line in the log


class Shortage:
    """Of one gathering after the other.

    Args:
        clock: Source of time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since: float | None = None  # monotonic
        self._possible: float | None = None  # since when a smaller plan could run (monotonic)
        self._told = False

    def end(self) -> None:
        """Whatever comes next is another gathering."""
        self._since = self._possible = None
        self._told = False

    def idle_s(self, possible: bool) -> float:
        """For how long some plan could have run on what is there, now that one can or cannot (``possible``)."""
        now = self._clock.monotonic()
        self._possible = (now if self._possible is None else self._possible) if possible else None
        return 0.0 if self._possible is None else now - self._possible

    @property
    def told(self) -> dict[str, Any]:
        """What the event log keeps of it: ``waited_s``; empty where none was missing."""
        return {} if self._since is None else {"waited_s": round(self._clock.monotonic() - self._since, 3)}

    def note(self) -> bool:
        """There are too few; returns whether people should hear of it now, which they do once."""
        now = self._clock.monotonic()
        self._since = now if self._since is None else self._since
        news = not self._told and now - self._since > NOTICE_S
        self._told = self._told or news
        return news

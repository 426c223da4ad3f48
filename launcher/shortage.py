"""Since when nodes are missing while a gang is gathered: what is not there is waited for from the beginning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.clock import Clock

NOTICE_S = 3.0  # waiting for nodes shorter than this is not worth a line in the log


@dataclass(frozen=True, kw_only=True, slots=True)
class Lapse:
    """How long a gathering has taken so far (s).

    Attributes:
        waited_s: From its beginning.
        idle_s: For how long of that a smaller plan could have run, and none that is larger: nothing else is lost by
            waiting.
        barren_s: Since any plan could run that may be used, or from the beginning.
    """

    waited_s: float
    idle_s: float
    barren_s: float


class Shortage:
    """Of one gathering after the other.

    Args:
        clock: Source of time.
        blip_s: Who is gone for no longer has been there all the time.
    """

    def __init__(self, clock: Clock, *, blip_s: float) -> None:
        self._clock, self._blip_s = clock, blip_s
        self.end()

    def end(self) -> None:
        """Whatever comes next is another gathering."""
        self._began = self._clock.monotonic()
        self._gone: float | None = self._began  # since when no plan can run, if none can (monotonic)
        self._since: float | None = None  # monotonic
        self._possible: float | None = None  # since when a smaller plan could run (monotonic)
        self._told = False

    def lapse(self, *, possible: bool, enough: bool) -> Lapse:
        """How long it has taken by now.

        Args:
            possible: Some plan can run on what is there.
            enough: No node is missing: what is waited for is something else.
        """
        now = self._clock.monotonic()
        if not possible:
            self._gone = now if self._gone is None else self._gone
            return Lapse(waited_s=now - self._began, idle_s=0.0, barren_s=now - self._gone)
        if enough or self._possible is None or (self._gone is not None and now - self._gone > self._blip_s):
            self._possible = now
        self._gone = None
        return Lapse(waited_s=now - self._began, idle_s=now - self._possible, barren_s=0.0)

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

"""Where the controller takes its time from; tests have one that stands still."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """The module :mod:`time` fits."""

    def time(self) -> float:
        """UTC seconds."""

    def monotonic(self) -> float:
        """Seconds that never jump."""

"""Time that jumps, and the selector that lets it.

The gang waits in its selector, so this is where simulated time passes: first the agents read and answer all that was
sent, over real sockets; only when no byte is under way and nobody has anything to say does the clock move.
"""

from __future__ import annotations

import selectors
from typing import Protocol

DAY_S = 86400.0
EPOCH_S = 1_750_000_000.0  # UTC seconds at the start


class SimClock:
    """Fits :class:`launcher.clock.Clock`; moves only when the world moves it."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds since the start

    def time(self) -> float:
        """UTC seconds."""
        return EPOCH_S + self.now

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return self.now


class Clockwork(Protocol):
    """What is needed of :class:`tests.support.scale.world.World`."""

    def serve(self) -> None:
        """Let the agents read what has come for them, and answer."""

    def settled(self) -> bool:
        """No byte is under way in either direction."""

    def rest(self) -> None:
        """Give the kernel a moment to deliver."""

    def advance(self, at_most_s: float) -> None:
        """Move the clock to what happens next."""


class JumpSelector(selectors.DefaultSelector):
    """Waits in simulated time.

    Args:
        world: The other side of the sockets.
    """

    def __init__(self, world: Clockwork) -> None:
        super().__init__()
        self._world = world

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; while nothing is and all is quiet, time passes."""
        moved = False
        while True:
            self._world.serve()
            ready = super().select(0)
            if ready:
                return ready
            if not self._world.settled():
                self._world.rest()
            elif moved or (timeout is not None and timeout <= 0):
                return []
            else:
                self._world.advance(timeout if timeout is not None else DAY_S)
                moved = True

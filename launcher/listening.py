"""How a controller waits for thousands of agents without waking up for each of them."""

from __future__ import annotations

import selectors
import time

MANY = 256
PAUSE_S = 0.01


class HandfulSelector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]  # mypy: it differs by platform
    """Looks at most every ``PAUSE_S`` where there are ``MANY`` connections, on which something is nearly always ready.

    So beats are heard by handfuls, and the turn that costs as much as a few of them is made for all. What is urgent
    waits for 10 ms at most; a small cluster is heard at once.
    """

    _looked_at = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See :meth:`selectors.BaseSelector.select`."""
        if len(self.get_map()) > MANY:
            early = self._looked_at + PAUSE_S - time.monotonic()
            pause = early if timeout is None else min(early, timeout)
            if pause > 0:
                time.sleep(pause)
                timeout = None if timeout is None else timeout - pause
        found = super().select(timeout)
        self._looked_at = time.monotonic()
        return found

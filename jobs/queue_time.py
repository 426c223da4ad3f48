"""How long a thread was ready to run and had no core, as the kernel counts it. Pure.

Where ranks outnumber cores that is part of every time that a clock shows, and says nothing about the rank.
"""

from __future__ import annotations

import contextlib
import os
import weakref

_STAT = "/proc/thread-self/schedstat"  # nanoseconds that it ran, nanoseconds that it waited for a core, how often


class QueueTime:
    """The counter of the thread that makes it. Looking costs about a microsecond.

    Args:
        path: Where the kernel shows it; one that does not leaves it at 0.
    """

    def __init__(self, path: str = _STAT) -> None:
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._fd)

    def seconds(self) -> float:
        """Since the thread began."""
        if self._fd < 0:
            return 0.0
        try:
            return int(os.pread(self._fd, 128, 0).split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0

"""What a dead pool leaves behind is ended, and waited for, without the agent waiting with it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable

from launcher.host import process

_FIRST_S, _LONGEST_S = 0.01, 0.5  # between two looks; each reads the environment of every process of the machine


class Sweep:
    """Ends every process that carries a mark, again and again until none is left.

    In a thread of its own: a process may take minutes to die, and the kernel may make those wait who look at one.

    Args:
        mark: Of the pool.
        known: (process id, birth) of ranks that had not ended. One that is dying carries no mark any more.

    Attributes:
        left: Process ids of those that are still there.
        done: Nothing is left.
    """

    def __init__(self, mark: str, known: Iterable[tuple[int, int]]) -> None:
        self._mark = mark
        self._known = tuple(known)
        self._stopped = threading.Event()
        self.left = tuple(pid for pid, _ in self._known)
        self.done = False
        threading.Thread(target=self._run, name="phalanx-sweep", daemon=True).start()

    def stop(self) -> None:
        """Leave what is left."""
        self._stopped.set()

    def _run(self) -> None:
        pause_s = _FIRST_S
        while not self.done and not self._stopped.is_set():
            known = (pid for pid, born in self._known if not process.has_ended(pid, born))
            self.left = tuple(sorted({*process.marked(self._mark), *known}))
            for pid in self.left:
                process.send(pid, signal.SIGKILL)
            self.done = not self.left
            self._stopped.wait(0.0 if self.done else pause_s)
            pause_s = min(2 * pause_s, _LONGEST_S)

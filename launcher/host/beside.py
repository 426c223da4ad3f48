"""What an agent does in the run directory, beside its loop: a share that does not answer must not hold that up.

The loop keeps the lease, beats and ends ranks. A ``stat`` of a file on a hard-mounted share waits for as long as the
link is down, and whoever has called it does, too.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

PATIENCE_S = 1.0  # at most; always less than the time between two beats of the agent

T = TypeVar("T")


class _Piece:
    """A piece of work and what became of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.done = threading.Event()
        self.answer: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.answer = self._work()
        except Exception as error:  # raised where it was asked for
            self.error = error
        self.done.set()


class Beside:
    """Does one piece of work after the other in a thread of its own, which holds up nobody's end.

    Args:
        patience_s: How long the loop waits for a piece where nothing else is said.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._pieces: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        self._newest: _Piece | None = None
        self._thread: threading.Thread | None = None

    def do(self, work: Callable[[], T], otherwise: T, *, patience_s: float | None = None) -> T:
        """The answer of ``work``, waited for at most ``patience_s``.

        Args:
            work: What may take for ever; raises what it raises. Goes on when it is not waited for any more, and its
                answer is lost then.
            otherwise: The answer when it takes too long. While an earlier piece does, nothing is begun, and this is the
                answer at once.
            patience_s: How long it may take.
        """
        if self._newest is not None and not self._newest.done.is_set():
            return otherwise
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="phalanx-beside", daemon=True)
            self._thread.start()
        piece = self._newest = _Piece(work)
        self._pieces.put(piece)
        if not piece.done.wait(self._patience_s if patience_s is None else patience_s):
            return otherwise
        if piece.error is not None:
            raise piece.error
        answer: T = piece.answer
        return answer

    def _serve(self) -> None:
        while True:
            self._pieces.get().run()

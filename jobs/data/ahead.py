"""Reading ahead: what a step needs is read by a thread of its own while the step before it runs. Pure.

One step is ready at most, so that memory holds the samples of two. Whatever is read is read in this thread, the first
step's samples, too: an error has the same traceback at whichever step a restart began.

Looking samples up is mostly Python, which needs the interpreter's lock. A thread that has it is asked to give it back
only after 5 ms, and a loop that feeds a device wants it back after every call. So a reader takes a breath now and then,
in which the loop may have the lock; it stops breathing as soon as a step waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
BREATH_S = 50e-6
CLOSE_S = 5.0
_AT_A_TIME_S = 500e-6  # of reading between two breaths


class Closed(Exception):
    """The reading is over; never leaves the thread that reads."""


class ReadAhead(Generic[T]):
    """Steps ``first`` to ``last``, read one after the other, each while the one before it is being used.

    Starts a thread, so it must not be made in a process that forks others later. The thread ends with the process.

    Args:
        read: Reads a step, given its number and what to call after each sample.
        first: The step to begin with.
        last: The step to end with; may be smaller than ``first`` where nothing is left.
    """

    def __init__(self, read: Callable[[int, Callable[[], None]], T], first: int, last: int) -> None:
        self._read = read
        self._steps = range(first, last + 1)
        self._turn = threading.Condition()
        self._ready: list[tuple[int, T]] = []
        self._error: BaseException | None = None
        self._wanted = threading.Event()
        self._closed = False
        self._breathed = 0.0
        self._thread = threading.Thread(target=self._serve, name="read-ahead", daemon=True)
        self._thread.start()

    def take(self, step: int) -> T:
        """What was read for a step; waits for it. From then on the next one is read.

        Args:
            step: The one after the step that was taken last.

        Raises:
            Exception: What reading this step has raised, every time it is asked for.
            ValueError: It is not this step's turn.
        """
        with self._turn:
            if not self._ready and self._error is None:
                self._wanted.set()
                self._turn.wait_for(lambda: self._ready or self._error is not None)
                self._wanted.clear()
            if not self._ready:
                assert self._error is not None
                raise self._error
            (found, item), *_ = self._ready
            if found != step:
                raise ValueError(f"step {step} was asked for, the turn is that of step {found}")
            self._ready.clear()
            self._turn.notify_all()
            return item

    def close(self) -> None:
        """Read no further; returns when the sample at hand is read, or when that takes too long.

        A mount that hangs may hold the reader for good. Nobody needs what it reads any more.
        """
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        self._wanted.set()
        self._thread.join(CLOSE_S)

    def _serve(self) -> None:
        try:
            for step in self._steps:
                with self._turn:
                    self._turn.wait_for(lambda: not self._ready or self._closed)
                    if self._closed:
                        raise Closed
                item = self._read(step, self._breathe)
                with self._turn:
                    self._ready.append((step, item))
                    self._turn.notify_all()
            self._end(IndexError(f"nothing is read after step {self._steps.stop - 1}"))
        except Closed:
            self._end(RuntimeError("the reading was closed"))
        except BaseException as error:  # for the step that needs it
            self._end(error)

    def _end(self, error: BaseException) -> None:
        with self._turn:
            self._error = error
            self._turn.notify_all()

    def _breathe(self) -> None:
        if self._closed:
            raise Closed
        if time.perf_counter() - self._breathed > _AT_A_TIME_S:
            self._wanted.wait(BREATH_S)
            self._breathed = time.perf_counter()

"""One call at a time to what may not answer, in a thread: whoever asks waits for a moment, and never for longer.

A file system or a store that is away holds its callers up, some for minutes, and some for good.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

SLOW_S = 1.0  # a call that fails sooner may be made again at once
MAX_PAUSE_S = 15.0  # from one that fails later to the next


class Silent(Exception):
    """There is no answer; the message is half a sentence that says so."""


class Errand:
    """Runs calls aside. The answer to a call for which nobody has waited to the end is nobody's."""

    def __init__(self) -> None:
        self._call: Future[Any] | None = None
        self._since = 0.0
        self._not_before = 0.0
        self._refused = ""

    @property
    def busy(self) -> bool:
        """A call has not come back."""
        return self._call is not None and not self._call.done()

    def send(self, work: Callable[[], T]) -> Future[T]:
        """Begin a call; whoever waits for it calls :meth:`result`. Raises Silent as :meth:`run`."""
        if self.busy:
            raise Silent(f"has not answered for {time.monotonic() - self._since:.0f} s")
        if time.monotonic() < self._not_before:
            raise Silent(self._refused)
        call: Future[T] = Future()
        self._call, self._since = call, time.monotonic()
        threading.Thread(target=self._serve, args=(call, work), daemon=True, name="errand").start()
        return call

    def run(self, work: Callable[[], T], answer_s: float) -> T:
        """The answer of ``work``, or what it raises.

        Args:
            work: It may come to its end long after this has returned, and must do no harm then.
            answer_s: How long to wait for it.

        Raises:
            Silent: It has not come back; or the one before has not; or that one has failed, slowly and less long ago
                than it took.
        """
        call = self.send(work)
        try:
            return call.result(answer_s)
        except TimeoutError:
            if call.done():
                raise  # of the work itself
            raise Silent(f"has not answered within {answer_s:.0f} s") from None

    def _serve(self, call: Future[T], work: Callable[[], T]) -> None:
        try:
            answer = work()
        except Exception as error:  # told to whoever waits
            now = time.monotonic()
            self._refused = f"has failed ({error})"
            took_s = now - self._since
            self._not_before = now + (min(took_s, MAX_PAUSE_S) if took_s > SLOW_S else 0.0)
            call.set_exception(error)
        else:
            call.set_result(answer)

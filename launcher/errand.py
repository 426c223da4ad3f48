"""One call at a time to what may not answer, in a thread: whoever asks waits for a moment, and never for longer.

A file system or a store that is away holds its callers up, some for minutes, and some for good.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

T = TypeVar("T")

SLOW_S = 1.0  # a call that fails sooner may be made again at once
MAX_PAUSE_S = 15.0  # from one that fails later to the next
AGAIN_S = 0.5  # who asks the same again waits only so long


class Silent(Exception):
    """There is no answer; the message is half a sentence that says so."""


class Errand:
    """Runs calls aside. An answer that comes late is for whoever asks the same question again, and for nobody else."""

    def __init__(self) -> None:
        self._call: Future[Any] | None = None  # begun, and its answer not fetched yet
        self._question: Hashable = None
        self._since = 0.0
        self._not_before = 0.0
        self._refused = ""

    @property
    def busy(self) -> bool:
        """A call has not come back."""
        return self._call is not None and not self._call.done()

    def run(self, question: Hashable, work: Callable[[], T], answer_s: float) -> T:
        """The answer of ``work``, or what it raises.

        Args:
            question: Calls of one question have one answer, whichever of them is made.
            work: It may come to its end long after this has returned, and must do no harm then.
            answer_s: How long to wait for it.

        Raises:
            Silent: It has not come back; or one to another question has not; or it has failed, slowly and less long
                ago than it took.
        """
        known = self._call if question == self._question else None
        if known is None:
            self._send(question, work)
        call: Future[T] | None = self._call
        assert call is not None
        wait([call], min(answer_s, AGAIN_S) if known is not None else answer_s)
        if not call.done():
            raise Silent(f"has not answered for {time.monotonic() - self._since:.0f} s")
        self._call = None
        return call.result()

    def _send(self, question: Hashable, work: Callable[[], Any]) -> None:
        now = time.monotonic()
        if self.busy:
            raise Silent(f"has not answered for {now - self._since:.0f} s")
        if now < self._not_before:
            raise Silent(self._refused)
        self._call, self._question, self._since = Future(), question, now
        threading.Thread(target=self._serve, args=(self._call, work), daemon=True, name="errand").start()

    def _serve(self, call: Future[Any], work: Callable[[], Any]) -> None:
        began = time.monotonic()
        try:
            answer = work()
        except Exception as error:  # told to whoever waits
            now = time.monotonic()
            self._refused = f"has failed ({error})"
            self._not_before = now + (min(now - began, MAX_PAUSE_S) if now - began > SLOW_S else 0.0)
            call.set_exception(error)
        else:
            call.set_result(answer)

"""How long a rank computed in a step, without waiting for other ranks. Imports torch.

In synchronous training every rank takes equally long for a step, so the step's time says nothing about who is slow.
What does is the time that a rank did not spend in communication. It is measured where every engine has to pass: in the
functions of :mod:`torch.distributed`. On CPUs that is the clock of the host around each call, and around the wait of a
call that returned at once. Devices work behind the host's back; there an event before and one after each call, on the
stream that computes, enclose what that stream waited for. Either costs about a microsecond a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.distributed as dist

FUNCTIONS = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)
"""Functions that wait, or that return something to wait for; torch compares ``isend`` and ``irecv`` by identity."""


class OwnTime:
    """Clock of one rank; from :meth:`install` on it sees every wait of this process.

    Args:
        make_event: Makes an event of the device with ``record`` and ``elapsed_time`` (milliseconds); None where
            computing is done when a call returns.
    """

    def __init__(self, make_event: Callable[[], Any] | None = None) -> None:
        self._make_event = make_event
        self._began = time.perf_counter()
        self._waited_s = 0.0
        self._depth = 0
        self._spare: list[Any] = []
        self._pairs: list[tuple[Any, Any]] = []

    def install(self) -> None:
        """Pass every communication of this process through this clock, for good."""
        for name in FUNCTIONS:
            setattr(dist, name, self._timed(getattr(dist, name)))

    def begin(self) -> None:
        """A step begins."""
        self._settle()
        self._waited_s = 0.0
        self._began = time.perf_counter()

    def end(self) -> tuple[float, float]:
        """A step ends, and the device has done its part of it.

        Returns:
            Seconds of the step that were this rank's own, and all of them.
        """
        seconds = time.perf_counter() - self._began
        self._settle()
        return max(0.0, seconds - self._waited_s), seconds

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            result = self.wait(lambda: function(*arguments, **options))
            if isinstance(result, list):
                return [_Pending(self, one) for one in result]
            return _Pending(self, result) if isinstance(result, dist.Work) else result

        return timed

    def wait(self, call: Callable[[], Any]) -> Any:
        """Run something that may wait for other ranks; what it calls in turn is not counted twice."""
        if self._depth:
            return call()
        self._depth = 1
        before, began = self._mark(), time.perf_counter()
        try:
            return call()
        finally:
            self._depth = 0
            if before is None:
                self._waited_s += time.perf_counter() - began
            else:
                self._pairs.append((before, self._mark()))

    def _mark(self) -> Any:
        if self._make_event is None:
            return None
        event = self._spare.pop() if self._spare else self._make_event()
        event.record()
        return event

    def _settle(self) -> None:
        for before, after in self._pairs:
            after.synchronize()
            self._waited_s += before.elapsed_time(after) / 1000
            self._spare += (before, after)
        self._pairs.clear()


class _Pending:
    """A communication that was begun; waiting for it is seen by the clock."""

    def __init__(self, clock: OwnTime, work: Any) -> None:
        self._clock = clock
        self._work = work

    def wait(self, *arguments: Any, **options: Any) -> Any:
        """See :class:`torch.distributed.Work`."""
        return self._clock.wait(lambda: self._work.wait(*arguments, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

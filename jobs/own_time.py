"""How long a rank computed in a step, without waiting for other ranks. Imports torch.

In synchronous training every rank takes equally long for a step, so the step's time says nothing about who is slow.
What does is the time that a rank did not spend in communication. It is measured where every engine has to pass: in the
functions of :mod:`torch.distributed`. On CPUs that is the clock of the host around each call, and around the wait of a
call that returned at once. Devices work behind the host's back; there an event before and one after each call, on the
stream that computes, enclose what that stream waited for. Either costs a few microseconds a call.

Of that time, what the rank spent ready to run and without a core (:mod:`jobs.queue_time`) is told beside it.

The same functions keep the rank's course (:mod:`jobs.course`): what it has entered and what is over. A device is over
with an entry when the event after it has come; a thread looks at the events, for the process may be waiting for the
device anywhere, and nothing in its stack would say so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch.distributed as dist

from jobs.course import BEAT_S, Course, Entry
from jobs.lanes import Lanes
from jobs.queue_time import QueueTime

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

_AHEAD = 32  # so many entries after the last that is over are looked at: streams that reduce gradients run beside


class OwnTime:
    """Clock of one rank; from :meth:`install` on it sees every wait of this process.

    Args:
        make_event: Makes an event of the device with ``record``, ``query`` and ``elapsed_time`` (milliseconds); None
            where computing is done when a call returns.
        set_device: Makes a thread use this rank's device.
    """

    def __init__(
        self, make_event: Callable[[], Any] | None = None, *, set_device: Callable[[], None] = lambda: None
    ) -> None:
        self._make_event = make_event
        self._set_device = set_device
        self._began = time.perf_counter()
        self._waited_s = 0.0
        self.stalled_s = 0.0
        """Seconds of the newest step that has ended in which this rank stood still in :meth:`stall`."""
        self._queue: QueueTime | None = None  # of the thread that trains
        self._queued_s = 0.0
        self._depth = 0
        self._spare: list[Any] = []
        self._pairs: list[tuple[Any, Any, Sequence[Entry]]] = []
        self._stalls: list[tuple[Any, Any]] = []
        self._over = 0  # so many of the pairs are over
        self._lock = threading.Lock()  # of the pairs, but for new ones at their end
        self._course = Course(device=make_event is not None)
        self._lanes = Lanes(self._course)

    def install(self) -> None:
        """Pass every communication of this process through this clock, for good."""
        for name in FUNCTIONS:
            setattr(dist, name, self._timed(name, getattr(dist, name)))
        if self._make_event is not None:
            threading.Thread(target=self._look_for_ever, name="course", daemon=True).start()

    def begin(self, micro_batches: int = 0) -> None:
        """A step of so many micro-batches begins."""
        self._settle()
        self._course.begin(micro_batches)
        self._waited_s = self.stalled_s = 0.0
        if self._queue is None and self._make_event is None:
            self._queue = QueueTime()
        self._queued_s = -self._queueing()
        self._began = time.perf_counter()

    def end(self) -> tuple[float, float]:
        """A step ends, and the device has done its part of it.

        Returns:
            Seconds of the step that were this rank's own, and all of them.
        """
        seconds = time.perf_counter() - self._began
        self._queued_s += self._queueing()
        self._course.end()
        self._settle()
        return max(0.0, seconds - self._waited_s), seconds

    @property
    def queued_s(self) -> float:
        """Seconds of this rank's own in the last step for which it had no core; 0 where a device computes."""
        return max(0.0, self._queued_s)

    def _queueing(self) -> float:
        return self._queue.seconds() if self._queue is not None else 0.0

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        enter = self._lanes.of(name, function)

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._depth:
                return function(*arguments, **options)
            entries = enter(arguments, options)
            result = self.wait(lambda: function(*arguments, **options), entries)
            if isinstance(result, list):
                each = len(result) == len(entries)  # else one of them stands for all
                return [_Pending(self, one, entries[i : i + 1] if each else entries) for i, one in enumerate(result)]
            return _Pending(self, result, entries) if isinstance(result, dist.Work) else result

        return timed

    def wait(self, call: Callable[[], Any], entries: Sequence[Entry] = ()) -> Any:
        """Run something that may wait for other ranks; what it calls in turn is not counted twice.

        Args:
            call: That.
            entries: Of the course, which it waits in; they are over when it returns, unless it returns work.
        """
        if self._depth:
            return call()
        self._depth = 1
        before, began, over = self._mark(), time.perf_counter(), entries
        self._queued_s += self._queueing()
        self._course.wait(entries)
        try:
            result = call()
            if isinstance(result, (list, dist.Work)):
                over = ()
            return result
        finally:
            self._depth = 0
            self._course.wait(())
            if before is None:
                self._queued_s -= self._queueing()
                self._waited_s += time.perf_counter() - began
                self._course.leave(over)
            else:
                self._pairs.append((before, self._mark(), over))

    def stall(self, call: Callable[[], None]) -> None:
        """Run something that the step waits for. What a device still computes meanwhile is no standing still."""
        before, began = self._mark(), time.perf_counter()
        try:
            call()
        finally:
            if before is None:
                self.stalled_s += time.perf_counter() - began
            else:
                self._stalls.append((before, self._mark()))

    def _mark(self) -> Any:
        if self._make_event is None:
            return None
        event = self._spare.pop() if self._spare else self._make_event()
        event.record()
        return event

    def _settle(self) -> None:
        for before, after, _ in self._pairs:
            after.synchronize()
            self._waited_s += before.elapsed_time(after) / 1000
        for before, after in self._stalls:
            after.synchronize()
            self.stalled_s += before.elapsed_time(after) / 1000
        self.look()
        with self._lock:
            self._spare += [event for before, after, _ in self._pairs for event in (before, after)]
            self._spare += [event for pair in self._stalls for event in pair]
            self._pairs.clear()
            self._stalls.clear()
            self._over = 0

    def look(self) -> None:
        """See how far the device has come; each of its streams does one thing after the other."""
        if self._make_event is None:
            return
        with self._lock:
            while self._over < len(self._pairs) and self._pairs[self._over][1].query():
                self._course.leave(self._pairs[self._over][2])
                self._over += 1
            waits: list[Entry] = []
            for before, after, entries in self._pairs[self._over : self._over + _AHEAD]:
                if before.query() and not after.query():  # else it computes, or stands still, before it comes there
                    waits += entries
            self._course.wait_on_device(waits)

    def _look_for_ever(self) -> None:
        self._set_device()
        while True:
            time.sleep(BEAT_S)
            self.look()


class _Pending:
    """A communication that was begun; waiting for it is seen by the clock."""

    def __init__(self, clock: OwnTime, work: Any, entries: Sequence[Entry]) -> None:
        self._clock = clock
        self._work = work
        self._entries = entries

    def wait(self, *arguments: Any, **options: Any) -> Any:
        """See :class:`torch.distributed.Work`."""
        return self._clock.wait(lambda: self._work.wait(*arguments, **options), self._entries)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

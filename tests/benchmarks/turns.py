"""Two contenders that run by turns of seconds: how fast each computes, whatever the machine does in the long run.

The speed of a machine that others share drifts by tens of percent within minutes, so runs one after the other meet
different machines. Here both are started, and then one is stopped with SIGSTOP, all its processes, while the other
runs. Rates are in seconds of one's own turns.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from launcher.embedded import descendants
from launcher.host import process
from tests.benchmarks.contenders import Running

TURN_S = 2.0
"""Shorter than any silence that counts as a failure, and several steps long."""


class Turns:
    """The turns of one contender that is at work already.

    Args:
        run: Who.

    Attributes:
        spans: Begin and end of each turn that is over (UTC seconds).
    """

    def __init__(self, run: Running) -> None:
        self.run = run
        self.spans: list[tuple[float, float]] = []
        self._stopped: list[int] = []
        self._began = 0.0

    def stop(self) -> None:
        """End a turn, if there is one."""
        self._stopped = [self.run.process.pid, *descendants(self.run.process.pid)]  # who directs before who is directed
        for pid in self._stopped:
            process.send(pid, signal.SIGSTOP)
        if self._began:
            self.spans.append((self._began, time.time()))

    def go(self) -> None:
        """Begin a turn."""
        self._began = time.time()
        for pid in self._stopped:
            process.send(pid, signal.SIGCONT)

    @property
    def step(self) -> int:
        """The last one."""
        return int(self.run.lines(1)[-1]["step"])

    def rate(self) -> float:
        """Steps per second of its turns, from the first step that ended in them to the last."""
        begin, end = self.spans[0][0], self.spans[-1][1]
        steps = [line for line in self.run.lines(1) if begin <= line["time"] <= end]
        first, last = steps[0], steps[-1]
        return float(last["step"] - first["step"]) / (self._own_s(last["time"]) - self._own_s(first["time"]))

    def _own_s(self, at: float) -> float:
        """Seconds of its turns before a moment. A step ends in a turn, or is seen to right after it."""
        return sum(min(end, at) - begin for begin, end in self.spans if begin < at)


def take_turns(runs: Sequence[Running], steps: int, turn_s: float = TURN_S) -> list[float]:
    """Let them run by turns until all have done ``steps``, then all at once again.

    Returns:
        Steps per second of each, in its own turns.
    """
    turns = [Turns(run) for run in runs]
    try:
        for one in turns:
            one.stop()
        while min(one.step for one in turns) < steps:
            for one in turns:
                one.go()
                time.sleep(turn_s)
                one.stop()
                assert one.run.process.poll() is None, f"{one.run.contender.name} has ended\n{one.run.tail()}"
    finally:
        for one in turns:
            one.go()
    return [one.rate() for one in turns]

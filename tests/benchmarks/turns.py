"""Two contenders that run by turns of seconds: how fast each computes, whatever the machine does in the long run.

The speed of a machine that others share drifts by tens of percent within minutes, so runs one after the other meet
different machines. Here both are started, and then one is stopped with SIGSTOP, all its processes, while the other
runs. Rates are in seconds of one's own turns.

Clocks run on for whom is stopped. So what is due every so many seconds, as beats are, is due up to twice as often in
seconds of one's own, to the disadvantage of phalanx. Copies in memory are not, though they may take a share of the
time: that follows from the median of the steps, few of which meet a stop. How many there were is told beside the rates.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import Any

from launcher.embedded import descendants
from launcher.host import process
from tests.benchmarks.contenders import PATIENCE_S, Running

OWN_S = 2.0
"""Seconds of a turn: shorter than any silence that counts as a failure, and several steps long."""


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
        self._stopped: set[int] = set()
        self._began: float | None = None  # None: no turn of its own is under way

    def stop(self) -> None:
        """Stop all its processes, which ends its turn; returns when none of them runs any more."""
        root = self.run.process.pid
        self._stopped = set()
        while found := {root, *descendants(root)} - self._stopped:
            for pid in found:
                process.send(pid, signal.SIGSTOP)
            assert process.wait_until(lambda: all(process.state(pid) in ("T", "Z", "") for pid in found), 10.0)
            self._stopped |= found
        if self._began is not None:
            self.spans.append((self._began, time.time()))
        self._began = None

    def go(self) -> None:
        """Begin a turn."""
        self._began = time.time()
        for pid in self._stopped:
            process.send(pid, signal.SIGCONT)

    @property
    def step(self) -> int:
        """The last one."""
        return int(self.run.lines(1)[-1]["step"])

    def steps(self) -> list[dict[str, Any]]:
        """Those that ended in its turns."""
        begin, end = self.spans[0][0], self.spans[-1][1]
        return [line for line in self.run.lines(1) if begin <= line["time"] <= end]

    def rate(self) -> float:
        """Steps per second of its turns, from the first step that ended in them to the last."""
        first, *_, last = self.steps()
        return float(last["step"] - first["step"]) / (self._own_s(last["time"]) - self._own_s(first["time"]))

    def _own_s(self, at: float) -> float:
        """Seconds of its turns before a moment."""
        return sum(min(end, at) - begin for begin, end in self.spans if begin < at)


def take_turns(runs: Sequence[Running], steps: int, own_s: float = OWN_S) -> list[Turns]:
    """Let them run by turns until each has done so many steps in its own, then all at once again."""
    turns = [Turns(run) for run in runs]
    deadline = time.monotonic() + 2 * PATIENCE_S
    try:
        for one in turns:
            one.stop()
        until = {one: one.step + steps for one in turns}
        while any(one.step < until[one] for one in turns):
            for one in turns:
                one.go()
                time.sleep(own_s)
                one.stop()
                assert one.run.process.poll() is None, f"{one.run.contender.name} has ended\n{one.run.tail()}"
            assert time.monotonic() < deadline, "it takes too long; or one has begun again, or stands still"
    finally:
        for one in turns:
            one.go()
    return turns

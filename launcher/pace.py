"""How long steps take, by how much there is to do in them: a batch that grows makes them longer, and so may a restart.

The *work* of a step is what the busiest rank has to do in it (:func:`strategies.shrink.work`); no work, 0, means that
nobody has said. A step is at most as many times as long as another as it has more work, since part of every step takes
as long whatever the batch: so what steps of one size took bounds what steps of another may take.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

LEARNED_STEPS = 5  # so many steps must have been seen before it is known how long they take
_REMEMBERED = 1000  # newest steps of each size


def scale(before: float, work: float) -> float:
    """How many times longer a step of ``work`` may be than one of ``before``."""
    return max(1.0, work / before) if before > 0 else 1.0


class Pace:
    """The steps of one attempt."""

    def __init__(self) -> None:
        self._seconds: dict[float, deque[float]] = {}
        self._p99: dict[float, float] = {}
        self._newest: deque[float] = deque(maxlen=LEARNED_STEPS)  # the work of each
        self.early_s: tuple[float, ...] = ()
        """How long each of the first steps took."""

    def note(self, work: float, seconds: float) -> None:
        """A step of ``work`` took so many seconds."""
        self._seconds.setdefault(work, deque(maxlen=_REMEMBERED)).append(seconds)
        self._p99.pop(work, None)
        self._newest.append(work)
        if len(self.early_s) < LEARNED_STEPS:
            self.early_s = (*self.early_s, seconds)

    @property
    def learned(self) -> bool:
        """Enough steps were seen."""
        return len(self._newest) == LEARNED_STEPS

    def most_s(self, work: float) -> float:
        """What a step of ``work`` takes at most, 99 times of 100; 0 while no step was seen.

        Goes by the steps of that size or, while there are too few, by the newest ones of any size.
        """
        if len(self._seconds.get(work, ())) >= LEARNED_STEPS:
            return self._p99_s(work)
        return max((self._p99_s(one) * scale(one, work) for one in set(self._newest)), default=0.0)

    def _p99_s(self, work: float) -> float:
        if work not in self._p99:
            ordered = sorted(self._seconds[work])
            self._p99[work] = ordered[math.ceil(0.99 * len(ordered)) - 1]
        return self._p99[work]

    @property
    def typical_s(self) -> float:
        """Median time of the newest steps of one size; 0 while too few were seen."""
        return statistics.median(self._seconds[self._newest[-1]]) if self.learned else 0.0

    @property
    def by_work(self) -> dict[float, float]:
        """The 99th percentile of every size."""
        return {work: self._p99_s(work) for work in self._seconds}


class Past:
    """What earlier attempts under one plan have shown; the slowest of them counts."""

    def __init__(self) -> None:
        self._most_s: dict[float, float] = {}
        self._early_s = 0.0
        self.learned = False
        """One of them has made enough steps."""

    def learn(self, pace: Pace) -> None:
        """An attempt has ended."""
        for work, seconds in pace.by_work.items():
            self._most_s[work] = max(seconds, self._most_s.get(work, 0.0))
        if pace.learned:
            self._early_s = max(*pace.early_s, self._early_s)
            self.learned = True

    def most_s(self, work: float) -> float:
        """What a step of ``work`` takes at most, the first ones of an attempt included; 0 while no step was seen."""
        bounds = [seconds * scale(one, work) for one, seconds in self._most_s.items()]
        known = self._most_s.get(work) or (min(bounds, default=0.0) if work else max(bounds, default=0.0))
        return max(known, self._early_s)

"""How often the state is copied into memory, where copies may take a share of the time and no more. Pure.

Every rank keeps one, and all come to the same answer from the same numbers. Steps between two copies are a power of
two times what was asked for, and a copy is due at their multiples: then a copy that was due stays due when copies
become more frequent.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import NamedTuple

_REMEMBERED = 5  # copies whose median counts: one that was held up says little
_STEPS = 16  # and steps: one that a rank or the whole machine stood still in says as little


class Price(NamedTuple):
    """What was measured.

    Attributes:
        copy_s: Seconds that a copy takes from training.
        step_s: Seconds of a step without that.
    """

    copy_s: float
    step_s: float


class Frequency:
    """Of one gang.

    Args:
        every: Steps between two copies at least; 0 for no copies.
        share: Largest share of the time that copies may take; 0: whatever they take.
        most: Steps between two copies at most; 0 for no limit. (``every`` may be more.)

    Attributes:
        now: Steps between two copies as of now.
    """

    def __init__(self, *, every: int, share: float, most: int = 0) -> None:
        self._every, self._share, self._most = every, share, most
        self._copied: int | None = None  # after which step the newest copy was made
        self._passed: tuple[int, float] | None = None  # the newest step, and when it was over (s)
        self._stalled_s = self._toil_s = self._paused_s = 0.0
        self._copies: deque[float] = deque(maxlen=_REMEMBERED)
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._spared = 0  # copies until ranks have to agree again
        self._told: set[int] = {every}
        self.now = every

    @property
    def adapts(self) -> bool:
        """Whether it depends on what copies cost."""
        return bool(self._every and self._share)

    def due(self, step: int) -> bool:
        """Whether a copy is to be made after a step."""
        return bool(self.now) and step % self.now == 0

    def passed(self, step: int, time_s: float) -> None:
        """A step is over.

        Args:
            step: The step; only of those that follow one another it is known how long they take.
            time_s: Of a monotonic clock.
        """
        last, self._passed = self._passed, (step, time_s)
        paused_s, self._paused_s = self._paused_s, 0.0
        if last is not None and step == last[0] + 1:
            self._steps.append(max(0.0, time_s - last[1] - paused_s))

    def stalled(self, seconds: float) -> None:
        """A step has stood still for the newest copy."""
        self._stalled_s += seconds
        self._paused_s += seconds

    def toiled(self, seconds: float) -> None:
        """A copy has taken so much of all cores of the node beside training."""
        self._toil_s += seconds

    def price(self, step: int) -> Price | None:
        """A copy will be made after ``step``: what the ones before have cost this rank.

        None before the second one, and mostly where nothing has changed lately: to agree costs something, too. Either
        is the same on all ranks.
        """
        before, self._copied = self._copied, step
        copy_s, self._stalled_s, self._toil_s = self._stalled_s + self._toil_s, 0.0, 0.0
        if before is None or step <= before:
            return None
        self._copies.append(copy_s)
        if self._spared:
            self._spared -= 1
            return None
        return Price(statistics.median(self._copies), statistics.median(self._steps) if self._steps else 0.0)

    def reconsider(self, price: Price) -> str:
        """Come closer to what is affordable, by a factor of two at most.

        Args:
            price: The same on all ranks: that of the rank for which it is highest.

        Returns:
            What people should know; empty where they know it.
        """
        wanted = price.copy_s / (self._share * price.step_s * self._every) if price.step_s else 1.0
        steps = self._every << max(0, math.ceil(math.log2(max(1.0, wanted))))
        before = self.now
        self.now = max(self.now // 2, min(self.now * 2, steps), self._every)
        while self._most and self.now > max(self._most, self._every):
            self.now //= 2
        self._spared = _REMEMBERED - 1 if self.now == before else 0
        if self.now in self._told:
            return ""
        self._told.add(self.now)
        return (
            f"the state is copied into memory every {self.now} steps, so a failure may cost as many: a copy costs "
            f"{price.copy_s:.3g} s, a step takes {price.step_s:.3g} s, and copies may take {self._share:.1%} of the "
            "time (checkpoint.memory_share; 0 for a copy whatever it costs)"
        )

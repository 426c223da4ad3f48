"""Has training blown up? Judged after every step, from two numbers that are equal on every rank. Pure.

A loss or gradient norm that is not finite always is a blow-up. A **spike** is a loss far above the running median of
the last :data:`WINDOW` steps: by more than ``spike_sigmas`` times the noise, and by more than :data:`LEAST_RISE` of
the median. The noise comes from the differences between neighbouring steps (their median absolute value): the trend
of a falling loss hardly shows in it, and a few outliers do not move it. Nothing is called a spike before
:data:`LEAST_SEEN` losses were seen.

The window is a function of the losses since the start of the run, so it is a part of every checkpoint: a run that was
interrupted comes to the same verdicts as one that was not.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 64  # steps
LEAST_SEEN = 16  # steps
LEAST_RISE = 0.25  # of the median; smaller ones heal by themselves, and going back costs more than they do
# For normal noise: the median of |x| is 0.6745 sigma, and a difference of two values has sqrt(2) times their sigma.
_SIGMA_PER_MEDIAN = 1 / (0.6745 * math.sqrt(2.0))


class BlowUp(Exception):
    """Training has blown up; nothing of this step may be saved.

    Args:
        step: The step that did it.
        why: What was seen, for people.
        samples: How many samples the step was made of.
    """

    def __init__(self, step: int, why: str, samples: int) -> None:
        super().__init__(f"step {step}: {why}")
        self.step = step
        self.why = why
        self.samples = samples


class LossWatch:
    """Sees every loss of a run, in order.

    Args:
        spike_sigmas: How far above the median a loss may lie, in standard deviations of its noise; 0: as far as it
            likes.
        losses: The newest losses, oldest first, from :attr:`state` of the checkpoint that the run goes on from.
    """

    def __init__(self, spike_sigmas: float, losses: Iterable[float] = ()) -> None:
        self._sigmas = spike_sigmas
        self._losses: deque[float] = deque(losses, maxlen=WINDOW)

    @property
    def state(self) -> list[float]:
        """The losses in the window, oldest first; what a checkpoint keeps."""
        return list(self._losses)

    def judge(self, loss: float, grad_norm: float) -> str:
        """Take in one step.

        Args:
            loss: Its mean loss, before the update.
            grad_norm: Its global gradient norm, before clipping; inf when the gradients are not finite.

        Returns:
            Why it is a blow-up, or "". A loss that is a blow-up does not enter the window.
        """
        why = self._not_finite(loss, grad_norm) or self._spike(loss)
        if not why:
            self._losses.append(loss)
        return why

    @staticmethod
    def _not_finite(loss: float, grad_norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        return "" if math.isfinite(grad_norm) else "the gradients are not finite"

    def _spike(self, loss: float) -> str:
        if self._sigmas <= 0 or len(self._losses) < LEAST_SEEN:
            return ""
        seen = list(self._losses)
        middle = statistics.median(seen)
        moves = [abs(later - earlier) for earlier, later in itertools.pairwise(seen)]
        sigma = statistics.median(moves) * _SIGMA_PER_MEDIAN
        limit = middle + max(self._sigmas * sigma, LEAST_RISE * abs(middle))
        if loss <= limit:
            return ""
        return (
            f"the loss spiked to {loss:.4g}: the median of the last {len(seen)} steps is {middle:.4g}, "
            f"and more than {limit:.4g} is a spike (train.spike_sigmas={self._sigmas:g})"
        )

"""A global batch that grows with what has been trained on, as in the accounts of GPT-3 and GPT-4.

Small batches learn more per token while the loss still falls fast. The size of a step is a function of the samples
trained on before it, so it is the same whatever the plan, the attempt or the nodes; samples that a run passes over do
not count. The learning rate stays a function of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Level(NamedTuple):
    """From so many samples on, the steps have this size."""

    samples: int
    global_batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RampPoint:
    """One size of a ramp that is given as a list.

    Attributes:
        tokens: The size holds from so many tokens on.
        global_batch: Sequences per step from then on.
    """

    tokens: float
    global_batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ramp:
    """How the batch grows to its full size: in even increments, or by a list of sizes.

    In increments (as Megatron-LM has it): the sizes ``start``, ``start + increment`` and so on each hold for an equal
    share of the samples of the ramp.

    Attributes:
        start: Sequences of the first step; 0 with ``points``.
        increment: Sequences by which the batch grows.
        samples: Samples after which the batch has its full size; 0 when ``tokens`` says it.
        tokens: The same in tokens.
        points: The sizes before the full one, and the tokens from which on they hold; then the full size holds from
            ``samples`` or ``tokens`` on.
    """

    start: int = 0
    increment: int = 0
    samples: int = 0
    tokens: float = 0.0
    points: tuple[RampPoint, ...] = ()

    def levels(self, global_batch: int, seq: int) -> tuple[Level, ...]:
        """Every size in order, the first from sample 0 on, the last one ``global_batch``.

        Sizes that cannot be are left out; :mod:`strategies.rules_ramp` says what is wrong with them.

        Args:
            global_batch: The full size, in sequences.
            seq: Tokens per sequence.
        """
        end = self.length(seq)
        if self.points:
            possible = [point for point in self.points if point.global_batch > 0]
            before = [Level(math.ceil(point.tokens / max(1, seq)), point.global_batch) for point in possible]
        else:
            sizes = range(max(1, self.start), global_batch, max(1, self.increment))
            before = [Level(-(-index * end // len(sizes)), size) for index, size in enumerate(sizes)]
        return (*before, Level(end, global_batch))

    def smallest(self) -> int:
        """Sequences of the smallest step."""
        return min((point.global_batch for point in self.points), default=self.start)

    def length(self, seq: int) -> int:
        """Samples after which the batch has its full size."""
        return self.samples or math.ceil(self.tokens / max(1, seq))

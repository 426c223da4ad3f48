"""What a rank trains on: its micro-batches of each step, read ahead. Imports torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from jobs.data import open_samples
from jobs.data.ahead import ReadAhead
from jobs.parallel.vocabulary import IGNORE
from jobs.spec import JobSpec

if TYPE_CHECKING:
    from jobs.data.samples import Samples, Validation
    from jobs.engine import Engine, MicroBatch
    from strategies.schedule import SampleSchedule

Rows = tuple[int | None, ...]


def _no_breath() -> None:
    """Nobody else is kept waiting."""


class Feed:
    """The micro-batches of one rank.

    Args:
        job: The job.
        engine: Says what this rank looks at, and where it computes.

    Attributes:
        samples: What is trained on.

    Raises:
        ConfigError: The data are shorter than one sequence.
        StorageError: The data cannot be used.
    """

    def __init__(self, job: JobSpec, engine: Engine) -> None:
        self._job, self._engine = job, engine
        self.samples: Samples = open_samples(job.data, job.batch.seq)
        self._ahead: ReadAhead[list[MicroBatch]] | None = None

    def begin(self, schedule: SampleSchedule, first: int) -> None:
        """Read the steps from ``first`` to the job's last, each while the one before it runs.

        Args:
            schedule: Which samples a step has; it does not change any more in this process.
            first: The step to begin with.
        """
        self._ahead = ReadAhead(
            lambda step, breathe: self._batches(schedule, step, breathe), first, self._job.train.steps
        )

    def take(self, step: int) -> list[MicroBatch]:
        """This replica's micro-batches of a step; ranks that look at no data get empty ones of the right shape.

        Args:
            step: The next one: steps are taken in order.

        Raises:
            StorageError: They cannot be read.
        """
        assert self._ahead is not None, "the reading has begun"
        return self._ahead.take(step)

    def end(self) -> None:
        """Read no further."""
        if self._ahead is not None:
            self._ahead.close()

    def _batches(self, schedule: SampleSchedule, step: int, breathe: Callable[[], None]) -> list[MicroBatch]:
        plan = self._job.plan
        count = schedule.micro_batches(step, plan)
        if not self._engine.needs_data:
            return [self.micro_batch((None,) * plan.micro_batch, self.samples)] * count
        replica = self._engine.grid.data
        rows = (schedule.rows(step, replica, micro, plan) for micro in range(count))
        return [self._engine.fetchable(self.micro_batch(some, self.samples, breathe)) for some in rows]

    def micro_batch(
        self, rows: Rows, source: Samples | Validation, breathe: Callable[[], None] = _no_breath
    ) -> MicroBatch:
        """Tokens and targets of this rank's part of some sequences.

        Args:
            rows: Numbers of samples; None is a row that weighs nothing.
            source: Has them.
            breathe: Called after each sample.
        """
        held = self._engine.grid.tokens(self._job.batch.seq)
        tokens = np.zeros((len(rows), held.stop - held.start), dtype=np.int64)
        targets = np.full_like(tokens, IGNORE)
        for row, index in enumerate(rows):
            if index is not None:
                line = source.sample(self._job.train.seed, index)
                tokens[row], targets[row] = line[:-1][held], line[1:][held]
                breathe()
        return torch.from_numpy(tokens), torch.from_numpy(targets)

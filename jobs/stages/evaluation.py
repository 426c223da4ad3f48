"""How well the model does on what it is not trained on, while it is trained. Changes nothing of the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jobs.data.ahead import ReadAhead
from jobs.spec import JobSpec
from strategies.schedule import SampleSchedule

if TYPE_CHECKING:
    from jobs.data.samples import Validation
    from jobs.engine import Engine, MicroBatch

Rows = tuple[int | None, ...]


class Evaluation:
    """Validation of one run: always the same samples, so that its numbers can be compared.

    Args:
        job: The job.
        samples: What is not trained on; None if there is nothing of that.
    """

    def __init__(self, job: JobSpec, samples: Validation | None) -> None:
        self._every = job.train.eval_every if samples is not None else 0
        size = job.batch.global_batch
        self._count = min(samples.count if samples is not None else 0, size * job.train.eval_batches)
        self._batches = -(-self._count // size)
        self._steps = job.train.steps
        self._schedule = SampleSchedule(global_batch=size)

        self.missing = ""
        """What to say of an evaluation that is asked for and cannot be; "" otherwise."""
        if job.train.eval_every and samples is None:
            self.missing = (
                f"train.eval_every={job.train.eval_every} evaluates nothing: data.validation={job.data.validation:g} "
                "keeps no whole sequence from training. Resume with train.eval_every=0 to do without, or submit a new "
                "run with a larger data.validation."
            )

    def due(self, step: int) -> bool:
        """Whether to evaluate after ``step``; always after the last one."""
        return bool(self._every) and (step % self._every == 0 or step == self._steps)

    def run(
        self, engine: Engine, load: Callable[[tuple[int | None, ...]], MicroBatch], beat: Callable[[], None]
    ) -> dict[str, Any]:
        """Loss and perplexity over all real tokens. Collective.

        Args:
            engine: The engine.
            load: Makes a micro-batch of the validation's samples; called by a thread that reads ahead.
            beat: Called after every global batch, which is a sign of life.
        """

        def read(batch: int, breathe: Callable[[], None]) -> list[MicroBatch]:
            found = []
            for micro in range(self._schedule.micro_batches(batch, engine.plan)):
                found.append(load(self._rows(batch, engine, micro)))
                breathe()
            return found

        total, ahead = 0.0, ReadAhead(read, 1, self._batches)
        for batch in range(1, self._batches + 1):
            total += engine.evaluate(ahead.take(batch))
            beat()
        ahead.close()
        loss = total * self._schedule.global_batch / self._count
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "samples": self._count}

    def _rows(self, batch: int, engine: Engine, micro: int) -> Rows:
        if not engine.needs_data:
            return (None,) * engine.plan.micro_batch
        rows = self._schedule.rows(batch, engine.grid.data, micro, engine.plan)
        return tuple(row if row is not None and row < self._count else None for row in rows)

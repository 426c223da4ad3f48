"""Which samples a step consumes, and which rank computes which of them.

The samples are a function of (data, seed, index); this module is the map from a step to its range of indices, and
from the range to rows of micro-batches. It knows nothing of attempts or workers, so any run may seek to any step at
once, and the same indices are consumed whatever the plan. A batch that the plan does not divide is padded with rows
of weight 0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from strategies.codec import from_json, to_json
from strategies.errors import ConfigError
from strategies.plan import ParallelPlan, accumulation
from strategies.ramp import Level
from strategies.specs import BatchSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchChange:
    """From this step on, the global batch has another size (a ramp is a few of these).

    Attributes:
        step: First step with the new size.
        global_batch: Sequences per step from then on.
    """

    step: int
    global_batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """A range of samples that is never trained on (say, around a spike of the loss).

    Attributes:
        step: The step before which the samples are passed over.
        samples: How many indices are passed over.
    """

    step: int
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSchedule:
    """The map from step (counted from 1) to sample indices.

    Seeking costs O(changes + skips), whatever the step.

    Attributes:
        global_batch: Sequences per optimizer step, from step 1 on.
        changes: Later sizes of the batch, in ascending order of their steps.
        skips: Samples passed over, in any order.

    Raises:
        ConfigError: A number is out of range or the changes are not in order.
    """

    global_batch: int
    changes: tuple[BatchChange, ...] = ()
    skips: tuple[Skip, ...] = ()

    def __post_init__(self) -> None:
        if self.global_batch < 1 or any(change.global_batch < 1 for change in self.changes):
            raise ConfigError("A global batch has at least 1 sequence.", hint="set train.global_batch to 1 or more")
        steps = [1, *(change.step for change in self.changes)]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ConfigError(f"Changes of the batch must be at ascending steps after 1, found {steps[1:]}.")
        if any(skip.step < 1 or skip.samples < 0 for skip in self.skips):
            raise ConfigError("A skip needs a step of 1 or more and a number of samples of 0 or more.")

    @classmethod
    def of(cls, batch: BatchSpec, skips: tuple[Skip, ...] = ()) -> SampleSchedule:
        """The schedule of a run from its first step on.

        Args:
            batch: The global batch and its ramp.
            skips: Samples passed over.

        Raises:
            ConfigError: Numbers are out of range (:func:`strategies.ramp.broken` says it of a ramp).
        """
        first, *later = ramp_changes(batch.levels)
        return cls(global_batch=first.global_batch, changes=tuple(later), skips=skips)

    def onward(self, step: int, batch: BatchSpec) -> SampleSchedule:
        """What has been is left as it is; from ``step`` on, the batch is that of ``batch``.

        A ramp goes by the samples that have been trained on, so under the same ramp nothing changes.
        """
        earlier = tuple(change for change in self.changes if change.step < step)
        past = replace(self, changes=earlier)
        first, *rest = ramp_changes(batch.levels, step=step, trained=past.trained(step))
        if step == 1:
            return replace(past, global_batch=first.global_batch, changes=tuple(rest))
        same = past.batch_at(step) == first.global_batch
        return replace(past, changes=(*earlier, *([] if same else [first]), *rest))

    def batch_at(self, step: int) -> int:
        """Sequences of step ``step``."""
        size = self.global_batch
        for change in self.changes:
            if change.step <= step:
                size = change.global_batch
        return size

    def first_index(self, step: int) -> int:
        """Index of the first sample of step ``step``.

        Raises:
            ConfigError: ``step`` is smaller than 1.
        """
        if step < 1:
            raise ConfigError(f"Steps count from 1, found {step}.")
        return self.trained(step) + sum(skip.samples for skip in self.skips if skip.step <= step)

    def trained(self, step: int) -> int:
        """Samples that the steps before ``step`` consume; what is skipped does not count."""
        consumed, size, since = 0, self.global_batch, 1
        for change in self.changes:
            if change.step >= step:
                break
            consumed += size * (change.step - since)
            size, since = change.global_batch, change.step
        return consumed + size * (step - since)

    def step_range(self, step: int) -> range:
        """Sample indices of step ``step``; step 1 of a plain schedule is ``range(0, global_batch)``."""
        start = self.first_index(step)
        return range(start, start + self.batch_at(step))

    def skipped(self) -> list[tuple[Skip, range]]:
        """Every skip with the sample indices that it passes over, in the order of the steps."""
        found, passed = [], 0
        for skip in sorted(self.skips, key=lambda skip: skip.step):
            plain = self.first_index(skip.step) - sum(s.samples for s in self.skips if s.step <= skip.step)
            found.append((skip, range(plain + passed, plain + passed + skip.samples)))
            passed += skip.samples
        return found

    def steps_for(self, samples: int) -> int:
        """Steps until at least ``samples`` samples have been trained on."""
        consumed, size, since = 0, self.global_batch, 1
        for change in self.changes:
            if consumed + size * (change.step - since) >= samples:
                break
            consumed += size * (change.step - since)
            size, since = change.global_batch, change.step
        return since - 1 + max(0, -(-(samples - consumed) // size))

    def micro_batches(self, step: int, plan: ParallelPlan) -> int:
        """Forward passes per replica in step ``step``: as many as its samples take, and as the schedule needs."""
        return max(accumulation(self.batch_at(step), plan.micro_batch, plan.dp), plan.least_accumulation)

    def rows(self, step: int, data_rank: int, micro_index: int, plan: ParallelPlan) -> tuple[int | None, ...]:
        """Samples of one micro-batch of one replica.

        Micro-batches are dealt out to the replicas in turn, so that padding falls into the last micro-batch only and
        every replica has work as long as the batch is not smaller than ``micro_batch * dp``.

        Args:
            step: The step, counted from 1.
            data_rank: Index of the replica, 0 .. dp - 1.
            micro_index: Index of the micro-batch; :meth:`micro_batches` says how many there are.
            plan: The plan.

        Returns:
            ``micro_batch`` sample indices; None is a padding row, whose weight in the loss is 0.

        Raises:
            ConfigError: The plan has fewer rows than the step has samples, or an index is out of range.
        """
        indices = self.step_range(step)
        if len(indices) > plan.rows_per_step:
            raise ConfigError(
                f"Step {step} has {len(indices)} samples, the plan only {plan.rows_per_step} rows.",
                hint=f"grad_accum of {-(-len(indices) // (plan.micro_batch * plan.dp))} or more",
            )
        if not (0 <= data_rank < plan.dp and 0 <= micro_index < plan.grad_accum):
            raise ConfigError(f"No micro-batch {micro_index} of replica {data_rank} in {plan.describe()}.")
        first = (micro_index * plan.dp + data_rank) * plan.micro_batch
        return tuple(indices[row] if row < len(indices) else None for row in range(first, first + plan.micro_batch))

    def state(self, next_step: int) -> dict[str, Any]:
        """What a checkpoint's manifest records: the schedule, and where it stands before ``next_step``."""
        return {"schedule": to_json(self), "next_step": next_step, "next_index": self.first_index(next_step)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SampleSchedule:
        """Read back what :meth:`state` wrote.

        Raises:
            ConfigError: The record is malformed, or its index is not the one that the schedule gives for its step.
        """
        try:
            schedule = from_json(cls, state["schedule"], where="schedule")
            step, index = int(state["next_step"]), int(state["next_index"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"The record of the schedule is malformed: {error!r}.") from error
        if schedule.first_index(step) != index:
            raise ConfigError(
                f"The recorded schedule starts step {step} at sample {schedule.first_index(step)}, not at {index}.",
                why="the record does not agree with itself",
            )
        return schedule


def ramp_changes(levels: Sequence[Level], *, step: int = 1, trained: int = 0) -> list[BatchChange]:
    """The sizes of all steps from ``step`` on, as changes; the first is at ``step`` itself.

    A step has the size of the level that the samples trained on before it have reached, so a level lasts for whole
    steps and begins up to a step late.

    Args:
        levels: The ramp, ascending; the first level begins at sample 0.
        step: The step to begin with.
        trained: Samples that have been trained on before it.
    """
    found = []
    ends = [level.samples for level in levels[1:]]
    for level, end in zip(levels, [*ends, None], strict=True):
        if end is not None and trained >= end:
            continue
        found.append(BatchChange(step=step, global_batch=level.global_batch))
        if end is not None:
            steps = -(-(end - trained) // level.global_batch)
            step, trained = step + steps, trained + steps * level.global_batch
    return found


def full_batches(batch: BatchSpec, step: int) -> float:
    """Samples of the first ``step`` steps, in full batches: ``step``, unless the batch grows.

    The learning rate goes by it, as published recipes do, which give their warm-up and decay in tokens.
    """
    return step if batch.ramp is None else _unskipped(batch).trained(step + 1) / batch.global_batch


@functools.lru_cache(maxsize=8)
def _unskipped(batch: BatchSpec) -> SampleSchedule:
    """Of a batch that grows, which every step asks about: its levels are counted once."""
    return SampleSchedule.of(batch)

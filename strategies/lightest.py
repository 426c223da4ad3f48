"""Steps of a pipeline whose slowest stage is not known, at least: for bounds that speak of every micro-batch.

With large micro-batches the output projection may make the last stage the slowest, with small ones the blocks of a
stage in the middle, which has no table of embeddings and so sends fewer gradients.
"""

from __future__ import annotations

from functools import cache

from strategies.plan import ParallelPlan
from strategies.timing import Stage, Timing, Unit


class Lightest(Timing):
    """Predicts steps whose slowest stage is not known: it holds as little as any that may be slowest."""

    def stage_weights(self, unit: Unit, stage: Stage, plan: ParallelPlan) -> float:
        """Parameters of a rank of any stage that is slowest with some micro-batch, at least."""
        return min(super(Lightest, self).stage_weights(unit, one, plan) for one in self._candidates(plan.stages))

    @cache  # noqa: B019 - it lives as long as its search
    def _candidates(self, stages: tuple[int, ...]) -> tuple[Stage, ...]:
        """The stages but those that have no more of anything than another one; their seconds are left out."""
        kinds, start, dense = set[Stage](), 0, self._dense_layers if self._experts else self.work.model.layers
        for index, blocks in enumerate(stages):
            plain = max(0, min(dense - start, blocks))
            kinds.add(Stage(0.0, plain, blocks - plain, index == 0, index == len(stages) - 1))
            start += blocks
        return tuple(
            one
            for one in kinds
            if not any(one != other and all(a <= b for a, b in zip(one, other, strict=True)) for other in kinds)
        )

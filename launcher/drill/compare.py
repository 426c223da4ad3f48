"""A run against the undisturbed one: every loss, gradient norm and learning rate, and the final weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.drill.case import Outcome
from launcher.run import RunState
from launcher.store import RunStore
from strategies.specs import Precision

Point = tuple[float, float, float]
ROUNDING: Mapping[Precision, float] = {"fp32": 1e-5, "bf16": 2**-7}
"""Largest relative difference of a loss or a norm that another order of sums explains, after some twenty Adam steps."""
WEIGHT_RTOL, WEIGHT_ATOL = 1e-3, 1e-5  # of fp32 weights: Adam makes rounding of small gradients large
_FREE = "attn.k.bias"  # softmax does not see it: its gradient is rounding alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How far a run is from the undisturbed one.

    Attributes:
        identical: Every number and the digest of the weights are equal, bit for bit.
        first: First step whose numbers differ; 0 for none.
        worst: Largest relative difference of a loss, norm or rate.
        weights: Largest difference of a weight, as a multiple of what rounding explains; None if not looked at.
        problem: Why there is nothing to compare; "" otherwise.
    """

    identical: bool = False
    first: int = 0
    worst: float = math.inf
    weights: float | None = None
    problem: str = ""

    def meets(self, outcome: Outcome, precision: Precision) -> bool:
        """Whether the run ended as it must."""
        if self.problem:
            return False
        if outcome is Outcome.SAME:
            return self.identical
        return self.identical or (self.worst <= ROUNDING[precision] and (self.weights or 0.0) <= 1.0)


def compare(run: RunStore, reference: RunStore) -> Comparison:
    """Compare a run that has ended with the undisturbed one."""
    ours, theirs = run.run(), reference.run()
    if ours.state is not RunState.SUCCEEDED:
        return Comparison(problem=f"the run {ours.state.value}{f': {ours.reason}' if ours.reason else ''}")
    mine, other = curve(run), curve(reference)
    if mine.keys() != other.keys():
        return Comparison(problem=f"it has {len(mine)} steps, the undisturbed run {len(other)}")
    different = [step for step in sorted(mine) if mine[step] != other[step]]
    same_weights = ours.weights_digest is not None and ours.weights_digest == theirs.weights_digest
    identical = not different and same_weights
    return Comparison(
        identical=identical,
        first=different[0] if different else 0,
        worst=max((_distance(mine[step], other[step]) for step in mine), default=0.0),
        weights=None if identical or run.request().job.train.precision != "fp32" else _weights(run, reference),
    )


def curve(run: RunStore) -> dict[int, Point]:
    """Step to loss, gradient norm and learning rate, as the newest attempt computed them."""
    return {int(m["step"]): (float(m["loss"]), float(m["grad_norm"]), float(m["lr"])) for m in run.metrics()}


def _distance(mine: Point, other: Point) -> float:
    return max(abs(a - b) / max(abs(b), 1e-30) if a != b else 0.0 for a, b in zip(mine, other, strict=True))


def _weights(run: RunStore, reference: RunStore) -> float | None:
    """Largest difference between two checkpoints of the end, in units of the tolerance."""
    import numpy as np

    from jobs.checkpoint import newest
    from jobs.checkpoint.reader import Reader

    entries = [newest(one.paths.checkpoints) for one in (run, reference)]
    if entries[0] is None or entries[1] is None:
        return None
    mine, other = Reader(entries[0]), Reader(entries[1])
    worst = 0.0
    for name in other.names:
        if name.endswith(_FREE):
            continue
        size = math.prod(other.shape(name))
        a, b = (reader.read_flat(name, "master", 0, size) for reader in (mine, other))
        worst = max(worst, float(np.max(np.abs(a - b) / (WEIGHT_ATOL + WEIGHT_RTOL * np.abs(b)))))
    return worst

"""A run against the undisturbed one: every loss, gradient norm and learning rate, and the final weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.drill.case import Outcome
from launcher.run import RunState
from launcher.store import RunStore
from strategies.errors import StorageError
from strategies.specs import Precision

if TYPE_CHECKING:
    from jobs.checkpoint.reader import Array, Reader

Point = tuple[float, float, float]
ROUNDING: Mapping[Precision, float] = {"fp32": 1e-5, "bf16": 2**-7}
"""Largest relative difference of a loss or a norm that another order of sums explains, after some twenty Adam steps."""
WEIGHTS: Mapping[Precision, tuple[float, float]] = {"fp32": (1e-3, 1e-5), "bf16": (2e-3, 2e-5)}
"""How far fp32 masters may be off, relative and absolute: Adam makes rounding of small gradients large. In fp32 that is
said of every weight; in bf16 of the root mean square of a tensor, since single weights may be off by whole steps."""
ROUTED = 8.0  # so many times as far in bf16, where a token between two experts may go to the other
_ROUTED = (".mlp.experts.", ".mlp.router.")
_FREE = "attn.k.bias"  # softmax does not see it: its gradient is rounding alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How far a run is from the undisturbed one.

    Attributes:
        identical: Every number and the digest of the weights are equal, bit for bit.
        first: First step whose numbers differ; 0 for none.
        worst: Largest relative difference of a loss, norm or rate; infinite where one is not a number.
        weights: Largest difference of a weight, as a multiple of what rounding explains; None if not looked at.
        unread: Why the weights could not be looked at; "" otherwise.
        problem: Why there is nothing to compare; "" otherwise.
    """

    identical: bool = False
    first: int = 0
    worst: float = math.inf
    weights: float | None = None
    unread: str = ""
    problem: str = ""

    def meets(self, outcome: Outcome, precision: Precision) -> bool:
        """Whether the run ended as it must."""
        if self.problem:
            return False
        if outcome is Outcome.SAME:
            return self.identical
        if self.identical:
            return True
        return self.worst <= ROUNDING[precision] and self.weights is not None and self.weights <= 1.0

    @property
    def difference(self) -> str:
        """What is not the same, for people."""
        parts = [f"first at step {self.first}"] if self.first else []
        parts += [f"weights {self.weights:.3g} x what rounding explains"] if self.weights is not None else []
        parts += [f"the weights cannot be compared: {self.unread}"] if self.unread else []
        return ", ".join(parts) or "the digests of the weights differ"


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
    first = different[0] if different else 0
    worst = max((_distance(mine[step], other[step]) for step in mine), default=0.0)
    if same_weights and not different:
        return Comparison(identical=True, worst=worst)
    try:
        return Comparison(first=first, worst=worst, weights=_weights(run, reference))
    except StorageError as error:
        return Comparison(first=first, worst=worst, unread=f"{error.what} {error.why}".strip())


def curve(run: RunStore) -> dict[int, Point]:
    """Step to loss, gradient norm and learning rate, as the newest attempt computed them."""
    return {int(m["step"]): (float(m["loss"]), float(m["grad_norm"]), float(m["lr"])) for m in run.metrics()}


def _distance(mine: Point, other: Point) -> float:
    return max(_finite(abs(a - b) / max(abs(b), 1e-30)) if a != b else 0.0 for a, b in zip(mine, other, strict=True))


def _finite(distance: float) -> float:
    """What is not a number is as far from any as can be."""
    return math.inf if math.isnan(distance) else distance


def _weights(run: RunStore, reference: RunStore) -> float:
    """Largest difference between the fp32 masters of two checkpoints of the end, in units of the tolerance.

    Raises:
        StorageError: They cannot be read, or are not of the same tensors.
    """
    import numpy as np

    mine, other = _last(run), _last(reference)
    if mine.manifest.tensors != other.manifest.tensors:
        raise StorageError("The checkpoints of the end are not of the same tensors.")
    precision, worst = run.request().job.train.precision, 0.0
    for name in other.names:
        if name.endswith(_FREE):
            continue
        size = math.prod(other.shape(name))
        a, b = (reader.read_flat(name, "master", 0, size) for reader in (mine, other))
        worst = max(worst, _finite(_off(name, np.abs(a - b), np.abs(b), precision)))
    return worst


def _off(name: str, off: Array, size: Array, precision: Precision) -> float:
    """How far a tensor is off, in units of the tolerance."""
    import numpy as np

    rtol, atol = WEIGHTS[precision]
    if precision == "fp32":
        return float(np.max(off / (atol + rtol * size)))
    off_rms, size_rms = (math.sqrt(np.mean(np.square(one))) for one in (off, size))
    routed = any(part in name for part in _ROUTED)
    return off_rms / ((atol + rtol * size_rms) * (ROUTED if routed else 1.0))


def _last(run: RunStore) -> Reader:
    """The checkpoint after the last step."""
    from jobs.checkpoint import newest
    from jobs.checkpoint.reader import Reader

    entry, step = newest(run.paths.checkpoint_dir), run.run().step
    if entry is None or (found := Reader(entry)).manifest.step != step:
        raise StorageError(f"'{run.name}' has no checkpoint of step {step}.")
    return found

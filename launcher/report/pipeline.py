"""Pipeline schedules as events in time: what every stage does when. Pure arithmetic for the picture of a step.

Every rank works through a fixed list of forward and backward passes, in the order in which the published schedules
issue them, and each pass waits for what it needs from its neighbours. Sending costs nothing here: the picture shows
where the bubbles are, the estimate says how long a step takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from strategies.plan import Schedule

Kind = Literal["F", "B", "W"]
"""Forward; backward (only that of the activations if a W follows); backward of the weights."""


class Pass(NamedTuple):
    """One pass of one micro-batch through the layers that one rank holds of it.

    Attributes:
        rank: Pipeline rank, 0 .. p - 1.
        chunk: Which of the rank's virtual stages, 0 .. v - 1.
        micro: Index of the micro-batch.
        kind: What is done.
        start: Of the pass, in the unit of the given durations.
        end: Of the pass.
    """

    rank: int
    chunk: int
    micro: int
    kind: Kind
    start: float
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """One step of a pipeline.

    Attributes:
        ranks: Pipeline ranks.
        chunks: Virtual stages per rank.
        micro_batches: Micro-batches that were simulated.
        passes: Every pass, rank by rank, in order of time.
        makespan: From the first start to the last end.
        bubble: Share of the ranks' time without work.
    """

    ranks: int
    chunks: int
    micro_batches: int
    passes: tuple[Pass, ...]
    makespan: float
    bubble: float


_Task = tuple[Kind, int, int]  # kind, chunk, micro-batch


def simulate(
    *,
    schedule: Schedule,
    pp: int,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    vpp: int = 1,
) -> Timeline:
    """Run one step of a pipeline on paper.

    Args:
        schedule: ``1f1b`` (PipeDream-Flush, arXiv 2006.09503), ``interleaved`` (arXiv 2104.04473) or ``dualpipev``
            (DeepSeek's DualPipe cut in half: every rank holds a piece of both ends of the model).
        pp: Pipeline ranks.
        micro_batches: Of one step and replica.
        forward: Duration of one micro-batch's forward pass through everything a rank holds, per rank.
        backward: The same for the backward pass, recomputation included.
        vpp: Virtual stages per rank (``interleaved``).
    """
    chunks = {"1f1b": 1, "interleaved": max(1, vpp), "dualpipev": 2}[schedule] if pp > 1 else 1
    if pp == 1 or schedule == "1f1b" or chunks == 1:
        orders = [_one_f_one_b(pp, rank, micro_batches) for rank in range(pp)]
    elif schedule == "interleaved":
        orders = [_interleaved(pp, rank, micro_batches, chunks) for rank in range(pp)]
    else:
        orders = [_dual_pipe_v(pp, rank, micro_batches) for rank in range(pp)]
    split_weights = {rank for rank, order in enumerate(orders) if any(task[0] == "W" for task in order)}
    passes = _run(orders, forward, backward, chunks, vee=schedule == "dualpipev" and pp > 1, split=split_weights)
    makespan = max(one.end for one in passes)
    busy = sum(one.end - one.start for one in passes)
    return Timeline(
        ranks=pp,
        chunks=chunks,
        micro_batches=micro_batches,
        passes=tuple(passes),
        makespan=makespan,
        bubble=1 - busy / (pp * makespan),
    )


# ---- orders: what every rank does, one after the other -----------------------------------------------------------


def _one_f_one_b(pp: int, rank: int, micro_batches: int) -> list[_Task]:
    """Warm-up forwards, then one forward and one backward in turn, then the backwards that are left."""
    forwards: list[_Task] = [("F", 0, i) for i in range(micro_batches)]
    backwards: list[_Task] = [("B", 0, i) for i in range(micro_batches)]
    return _alternate(forwards, backwards, pp - 1 - rank)


def _interleaved(pp: int, rank: int, micro_batches: int, chunks: int) -> list[_Task]:
    """As Megatron-LM issues them: groups of p micro-batches, each group through all virtual stages of the rank."""
    forwards: list[_Task] = []
    backwards: list[_Task] = []
    for first in range(0, micro_batches, pp):
        group = range(first, min(first + pp, micro_batches))
        forwards += [("F", chunk, i) for chunk in range(chunks) for i in group]
        backwards += [("B", chunk, i) for chunk in reversed(range(chunks)) for i in group]
    whole = micro_batches % pp == 0
    # With a short last group, forwards and backwards in turn would wait for each other: all forwards go first.
    warm_up = 2 * (pp - 1 - rank) + (chunks - 1) * pp if whole else len(forwards)
    return _alternate(forwards, backwards, warm_up)


def _alternate(forwards: list[_Task], backwards: list[_Task], warm_up: int) -> list[_Task]:
    warm_up = min(warm_up, len(forwards))
    order = forwards[:warm_up]
    for ahead, behind in zip(forwards[warm_up:], backwards, strict=False):
        order += (ahead, behind)
    return order + backwards[len(forwards) - warm_up :]


def _dual_pipe_v(pp: int, rank: int, micro_batches: int) -> list[_Task]:
    """The eight phases of deepseek-ai/DualPipe's ``dualpipev.py``; needs ``micro_batches >= 2 * pp``."""
    order = _Order()
    after = pp - rank - 1
    for _ in range(2 * after):
        order.forward(0)
    for _ in range(rank + 1):
        order.forward(0)
        order.forward(1)
    for _ in range(after):
        order.backward(1, split=True)
        order.weights()
        order.forward(1)
    for _ in range(micro_batches - 2 * pp + rank + 1):
        order.forward(0)
        order.backward(1)
        order.forward(1)
        order.backward(0)
    for _ in range(after):
        order.backward(1)
        order.forward(1)
        order.backward(0)
    split = False
    for i in range(rank + 1):
        split = split or (i == (rank + 1) // 2 and rank % 2 == 1)
        order.backward(1, split=split)
        split = split or (i == (rank + 1) // 2 and rank % 2 == 0)
        order.backward(0, split=split)
    for _ in range(after):
        order.weights()
        order.backward(0, split=True)
    while order.owed:
        order.weights()
    return order.tasks


class _Order:
    """Collects the tasks of one rank; micro-batches are numbered in the order of their passes."""

    def __init__(self) -> None:
        self.tasks: list[_Task] = []
        self.owed: list[tuple[int, int]] = []
        self._done: dict[tuple[str, int], int] = {}

    def _next(self, kind: str, chunk: int) -> int:
        number = self._done.get((kind, chunk), 0)
        self._done[kind, chunk] = number + 1
        return number

    def forward(self, chunk: int) -> None:
        self.tasks.append(("F", chunk, self._next("F", chunk)))

    def backward(self, chunk: int, *, split: bool = False) -> None:
        micro = self._next("B", chunk)
        self.tasks.append(("B", chunk, micro))
        self.owed.append((chunk, micro))
        if not split:
            self.owed.pop()
            self.tasks.append(("W", chunk, micro))

    def weights(self) -> None:
        chunk, micro = self.owed.pop(0)
        self.tasks.append(("W", chunk, micro))


# ---- execution ---------------------------------------------------------------------------------------------------


def _run(
    orders: list[list[_Task]],
    forward: Sequence[float],
    backward: Sequence[float],
    chunks: int,
    *,
    vee: bool,
    split: set[int],
) -> list[Pass]:
    """Start every task as soon as its rank is free and its inputs are there."""
    pp, ended = len(orders), dict[tuple[Kind, int, int], float]()
    place = [0] * pp
    free = [0.0] * pp
    found: list[list[Pass]] = [[] for _ in range(pp)]
    left = sum(len(order) for order in orders)
    while left:
        before = left
        for rank, order in enumerate(orders):
            while place[rank] < len(order):
                kind, chunk, micro = order[place[rank]]
                stage = _stage(rank, chunk, pp, vee)
                ready = _ready(ended, kind, stage, micro, pp * chunks)
                if ready is None:
                    break
                whole = (forward if kind == "F" else backward)[rank] / chunks
                lasts = whole / 2 if rank in split and kind != "F" else whole
                start = max(ready, free[rank])
                free[rank] = ended[kind, stage, micro] = start + lasts
                found[rank].append(Pass(rank, chunk, micro, kind, start, start + lasts))
                place[rank] += 1
                left -= 1
        if left == before:
            raise AssertionError(f"the schedule waits for itself: {left} passes left")
    return [one for passes in found for one in passes]


def _stage(rank: int, chunk: int, pp: int, vee: bool) -> int:
    """Position in the model of a rank's virtual stage: round after round, or down and up again."""
    if vee:
        return rank if chunk == 0 else 2 * pp - 1 - rank
    return chunk * pp + rank


def _ready(ended: dict[tuple[Kind, int, int], float], kind: Kind, stage: int, micro: int, stages: int) -> float | None:
    """When a task's inputs are there; None if they are not made yet."""
    if kind == "F":
        return 0.0 if stage == 0 else ended.get(("F", stage - 1, micro))
    if kind == "W":
        return ended.get(("B", stage, micro))
    own = ended.get(("F", stage, micro))
    above = own if stage == stages - 1 else ended.get(("B", stage + 1, micro))
    return None if own is None or above is None else max(own, above)

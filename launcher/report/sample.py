"""Plans drawn at random from the space, for the scatter plot: the search itself looks at too few of them."""

from __future__ import annotations

from random import Random

from strategies.estimate import Estimator
from strategies.plan import ParallelPlan
from strategies.space import Space

_TRIES = 4
"""Draws per plan that is wanted: some shapes have no legal schedule or number of replicas."""


def sample(estimator: Estimator, space: Space, number: int, *, seed: int = 0) -> list[tuple[float, float]]:
    """(seconds per step, bytes of the rank that needs most) of legal plans, whether they fit or not.

    Every level of the space is drawn evenly; of the replicas, the most that the machine carries, since a plan that
    leaves half of it idle is of no interest.

    Args:
        estimator: Predicts.
        space: What is drawn from.
        number: How many plans, at most.
        seed: Of the draw: the same page twice is the same page.
    """
    rng = Random(seed)
    shapes = [shape for shape in space.shapes() if space.room(shape)]
    plans: dict[ParallelPlan, None] = {}
    for _ in range(_TRIES * number if shapes else 0):
        shape = rng.choice(shapes)
        pipe, state = rng.choice(space.pipes(shape) or (None,)), rng.choice(space.states(shape) or (None,))
        inner = rng.choice(list(space.inners(shape)) or [None])
        if pipe is None or state is None or inner is None:
            continue
        replicas = space.replicas(shape, inner, pipe, 1, space.room(shape))
        if replicas:
            plans[space.plan(shape, state, inner, pipe, replicas[-1])] = None
        if len(plans) == number:
            break
    return [(sum(estimator.timing.step(plan)), estimator.memory.peak(plan)) for plan in plans]

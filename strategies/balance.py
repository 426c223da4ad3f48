"""Which stage gets how many blocks: as many each, the same weight of parameters, or the same time.

The first stage also has the embedding and the last the output layer (under DualPipeV the first has both), so stages
with as many blocks each are not alike: the busiest one sets the pace, and the fullest one the memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from strategies import counts
from strategies.errors import ConfigError
from strategies.plan import Balance, ParallelPlan, split_layers
from strategies.tensors import first_expert_block, head_stage
from strategies.timing import Timing
from strategies.workload import Workload


def balanced(plan: ParallelPlan, work: Workload, balance: Balance) -> ParallelPlan:
    """The plan with stages that are even in blocks, in parameters of a rank, or in seconds of a micro-batch.

    Args:
        plan: A plan; its ``stages`` do not matter.
        work: Model, batch and machine.
        balance: What shall be even.

    Raises:
        ConfigError: Times are asked for, and the cluster has no hardware figures.
    """
    layers = work.model.layers
    if balance == "blocks" or not 1 < plan.pp <= layers:
        return replace(plan, stages=split_layers(max(0, layers), max(1, plan.pp)))
    costs = _parameters if balance == "parameters" else _seconds
    blocks, first, last = costs(replace(plan, stages=split_layers(layers, plan.pp)), work)
    ends = [0.0] * plan.pp
    ends[0] += first
    ends[head_stage(plan)] += last
    return replace(plan, stages=partition(blocks, ends))


def partition(blocks: Sequence[float], ends: Sequence[float]) -> tuple[int, ...]:
    """Cut a row of blocks into as many stages as ``ends`` has, so that the largest stage is as small as it can be.

    Every stage gets at least one block. Of all such cuts it is the one whose stages differ least (least sum of
    squares), and of those the one with the longer stages last.

    Args:
        blocks: Cost of each block, at least as many as there are stages.
        ends: What each stage costs beside its blocks.
    """
    reach = _cut(blocks, ends, math.inf, largest=True)
    most = max(cost for cost, _ in reach)
    return tuple(count for _, count in _cut(blocks, ends, most, largest=False))


def _cut(blocks: Sequence[float], ends: Sequence[float], most: float, *, largest: bool) -> list[tuple[float, int]]:
    """The best cut as (cost, blocks) per stage: the least maximum, or the least sum of squares within ``most``."""
    total, summed, limit = len(blocks), [0.0, *itertools.accumulate(blocks)], most * (1 + 1e-12)
    best: list[float] = [0.0] + [math.inf] * total  # of the stages so far, by the blocks that they have
    chosen: list[list[int]] = []
    for stage, extra in enumerate(ends):
        left = len(ends) - stage - 1
        found, choice = [math.inf] * (total + 1), [0] * (total + 1)
        for stop in range(stage + 1, total - left + 1):
            for start in range(stage, stop):
                cost = summed[stop] - summed[start] + extra
                value = max(best[start], cost) if largest else best[start] + cost * cost
                if cost <= limit and value < found[stop]:
                    found[stop], choice[stop] = value, start
        best = found
        chosen.append(choice)
    cut, stop = [], total
    for extra, choice in zip(reversed(ends), reversed(chosen), strict=True):
        start = choice[stop]
        cut.append((summed[stop] - summed[start] + extra, stop - start))
        stop = start
    return cut[::-1]


def _parameters(plan: ParallelPlan, work: Workload) -> tuple[list[float], float, float]:
    """Parameters of a rank: of each block, of the embedding, of the output layer."""
    model, ep = work.model, counts.expert_parallel(plan)
    dense = first_expert_block(model)
    blocks = [float(sum(counts.block(model, plan.tp, ep, dense=index < dense))) for index in range(model.layers)]
    alone = head_stage(plan) != 0  # a stage that has the embedding too shares tied weights with it
    return blocks, float(counts.embedding(model, plan.tp)), float(counts.head(model, plan.tp, alone=alone))


def _seconds(plan: ParallelPlan, work: Workload) -> tuple[list[float], float, float]:
    """Seconds of one micro-batch: of each block, of the embedding, of the output layer."""
    if work.cluster.hardware is None:
        raise ConfigError(
            f"strategy.balance=time needs speeds, and the cluster '{work.cluster.name}' has no hardware figures.",
            hint="strategy.balance=parameters; or phalanx cluster probe measures them",
        )
    unit, dense = Timing(work).unit_of(plan), first_expert_block(work.model)
    blocks = [unit.dense_s if index < dense else unit.moe_s for index in range(work.model.layers)]
    return blocks, unit.embed_s, unit.head_s

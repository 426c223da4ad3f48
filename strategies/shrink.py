"""A gang on fewer nodes than its plan takes: the next plan that is legal and runs, and how long to wait instead.

The global batch stays exact, so fewer replicas accumulate more micro-batches. Replicas that would not save one are left
out: their nodes stand by as spares. Where not even one replica fits, pipeline stages and shards are given up, as few as
possible: a model was cut because of its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from strategies.cases import legal_tp
from strategies.plan import ParallelPlan, split_layers
from strategies.resolve import largest_plan, most_replicas, with_replicas
from strategies.rules import check
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec, Precision


def plan_on(
    *, model: ModelSpec, plan: ParallelPlan, batch: BatchSpec, cluster: ClusterSpec, precision: Precision
) -> ParallelPlan | None:
    """The plan next to ``plan`` that a smaller cluster runs.

    Args:
        model: The model.
        plan: The plan that is wanted.
        batch: The global batch.
        cluster: What is left.
        precision: Arithmetic of forward and backward.

    Returns:
        ``plan`` itself where it fits; None if nothing legal does that also runs.
    """
    if plan.world_size <= cluster.slots:
        return plan

    def runs(found: ParallelPlan) -> bool:
        return not check(model=model, plan=found, batch=batch, cluster=cluster, precision=precision)

    return next(filter(runs, smaller_plans(model=model, plan=plan, batch=batch, cluster=cluster)), None)


def smaller_plans(
    *, model: ModelSpec, plan: ParallelPlan, batch: BatchSpec, cluster: ClusterSpec
) -> Iterator[ParallelPlan]:
    """Plans for a smaller cluster, legal or not: first fewer replicas, then fewer stages and shards, least loss first.

    A schedule that takes only some numbers of micro-batches is followed by 1F1B, which takes any.
    """
    tps = [tp for tp in legal_tp(model) if tp <= plan.tp]
    shapes = [(tp, pp) for tp in tps for pp in range(1, min(plan.pp, model.layers) + 1)]
    found = [_shaped(model, plan, batch, cluster, tp, pp) for tp, pp in shapes]
    fitting = [one for one in found if one is not None]
    fitting.sort(key=lambda one: (-one.tp * one.pp, step_work(one), -one.tp))
    for one in dict.fromkeys(fitting):
        useful = most_replicas(batch.global_batch, one.micro_batch, one.dp)
        schedules = dict.fromkeys((one, replace(one, schedule="1f1b", vpp=1)))
        yield from (with_replicas(same, batch, dp) for dp in range(useful, 0, -1) for same in schedules)
        if one.ep > 1:  # more experts on a rank need more of its memory: only where no whole set of replicas is left
            fewer = [_spread(same, dp) for dp in range(useful, 0, -1) for same in schedules]
            yield from (with_replicas(same, batch, dp) for dp, same in fewer)


def _spread(plan: ParallelPlan, dp: int) -> tuple[int, ParallelPlan]:
    """``dp``, and the plan whose experts are spread so that every rank has a whole number of the old shares."""
    return dp, replace(plan, ep=math.gcd(plan.ep, dp * plan.sp * plan.cp))


def _shaped(
    model: ModelSpec, plan: ParallelPlan, batch: BatchSpec, cluster: ClusterSpec, tp: int, pp: int
) -> ParallelPlan | None:
    """The largest plan with these degrees or, where they do not fit, with smaller ones."""
    if (tp, pp) == (plan.tp, plan.pp):
        return largest_plan(model=model, plan=plan, batch=batch, cluster=cluster)
    dp = max(1, plan.world_size // (tp * pp * plan.sp * plan.cp))
    stages = plan.stages if pp == plan.pp else split_layers(model.layers, pp)
    cut = replace(plan, tp=tp, pp=pp, dp=dp, stages=stages)
    return largest_plan(model=model, plan=cut, batch=batch, cluster=cluster)


def step_work(plan: ParallelPlan) -> float:
    """What the busiest rank has to do in a step, in sequences through the whole model; bubbles count."""
    return work(plan, plan.grad_accum)


def work(plan: ParallelPlan, micro_batches: int) -> float:
    """The same of a step that takes so many micro-batches, as those of a batch that still grows do."""
    return plan.micro_batch * (micro_batches + plan.pp - 1) / (plan.tp * plan.pp * plan.sp * plan.cp)


def throughput(plan: ParallelPlan, wanted: ParallelPlan) -> float:
    """Speed of a plan relative to the wanted one, going by the work of a rank alone."""
    return step_work(wanted) / step_work(plan)


def worth_waiting_s(plan: ParallelPlan, wanted: ParallelPlan, restart_s: float) -> float:
    """How long to wait for a node before going on with a smaller plan.

    Shrinking costs one more restart later, to grow back; waiting costs what the smaller plan would have done meanwhile.
    When both are equal, waiting ends: whenever the node comes back, this is at most twice as dear as foresight.

    Args:
        plan: The smaller plan.
        wanted: The plan that waits for its node.
        restart_s: Seconds from the end of the ranks to the first step of the next ones, waits left out.
    """
    return restart_s / throughput(plan, wanted)

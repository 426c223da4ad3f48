"""Failures over a run: what they do to one plan, when the run ends and what it costs.

The process and its closed form are in :mod:`strategies.failures`. Here it meets a plan on a cluster, and a number of
tokens. Nodes that stand idle are spares, as many as are wanted; without a spare the gang waits for a repair or gives up
a replica, whichever costs less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from strategies.failures import (
    DAY_S,
    GENERATIONS,
    HOST_SHARE,
    LEAST,
    LEAST_GOODPUT,
    Process,
    Shares,
    Standby,
    process,
    shares,
    shortage,
)
from strategies.finish import finish_range
from strategies.hardware import Hardware
from strategies.plan import ParallelPlan, accumulation
from strategies.repair import spares_for
from strategies.saving import BEST, Saving, saved
from strategies.specs import BatchSpec, ModelSpec
from strategies.topology import nodes_needed
from strategies.workload import Workload

CHECKPOINT_BYTES_PER_PARAMETER = 12
"""fp32 master and both Adam moments; 16-bit weights are not stored, they are the masters' rounding."""

RESTARTS_S = (1.0, 30.0, 120.0, 600.0)
"""What the sweep assumes for a restart: in process, from a warm pool, of a large gang, and with a new allocation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What failures do to one plan.

    Attributes:
        nodes: Nodes that carry ranks.
        failures_per_day: Failures that stop the run, per day.
        failures_expected: The same over the whole run; None without a number of tokens.
        node_mtbf_s: Mean time between failures of the gang; None where nothing fails.
        checkpoint_bytes: One checkpoint, over all ranks.
        memory_tier: Whether the hosts hold replicas; without it, disk recovers everything.
        save_disk_s: Stall of a save to disk; where it is also one to memory, one stall for both.
        save_memory_s: Stall of a save to memory; 0 without a memory tier.
        write_s: Until a save is durable on disk, overlapped.
        replica_s: Until a save is on a peer, overlapped; 0 without a memory tier.
        detect_s: From a failure until it is noticed.
        restore_s: Reading the state after a failure, in the mean over the tiers.
        replay_s: Work that a failure undoes, in the mean over the tiers.
        disk_interval_steps: Steps between two saves to disk.
        disk_interval_s: Work between two saves to disk.
        memory_interval_steps: Steps between two saves to memory; 0 without a memory tier.
        memory_interval_s: Work between two saves to memory; 0 without a memory tier.
        best_disk_steps: Steps between two saves to disk that lose least; the intervals above are those that the run is
            told (:attr:`strategies.workload.Workload.saving`). With its own interval of the memory tier, if it uses it.
        best_goodput: The goodput with them.
        spares: Nodes that stand by.
        spares_wanted: What would be enough for 99 % of the failures.
        shrinks: Short of spares, the gang goes on with fewer replicas, because that is cheaper than waiting.
        goodput: Share of the wall clock that is work which counted (ETTR).
        lost: Share of the wall clock by kind: ``checkpoint`` (stalls), ``replay`` (work done again), ``detect``,
            ``restart`` (with reading the state), ``wait`` (for a node, or slower without); with goodput they sum to 1.
        never: Why the run never ends; empty if it does.
        days_low: The run ends within so many days with a chance of 10 %; None without a number of tokens or an end.
        days_50: The same with 50 %.
        days_90: The same with 90 %.
        cost_low: US dollars for :func:`billed_nodes` over ``days_low``; None without days or price.
        cost_50: The same over ``days_50``.
        cost_90: The same over ``days_90``.
        sweep: Goodput for restarts of 1, 30, 120 and 600 s: (restart_s, goodput).
    """

    nodes: int
    failures_per_day: float
    failures_expected: float | None
    node_mtbf_s: float | None
    checkpoint_bytes: float
    memory_tier: bool
    save_disk_s: float
    save_memory_s: float
    write_s: float
    replica_s: float
    detect_s: float
    restore_s: float
    replay_s: float
    disk_interval_steps: int
    disk_interval_s: float
    memory_interval_steps: int
    memory_interval_s: float
    best_disk_steps: int
    best_goodput: float
    spares: int
    spares_wanted: int
    shrinks: bool
    goodput: float
    lost: Mapping[str, float]
    never: str
    days_low: float | None
    days_50: float | None
    days_90: float | None
    cost_low: float | None
    cost_50: float | None
    cost_90: float | None
    sweep: tuple[tuple[float, float], ...]


def checkpoint_bytes(model: ModelSpec) -> float:
    """Bytes of one checkpoint over all ranks: what phalanx stores, each number once, no vocabulary padding."""
    return float(CHECKPOINT_BYTES_PER_PARAMETER * model.parameters)


def goodput(
    nodes: int,
    step_s: float,
    ckpt_bytes: float,
    hardware: Hardware,
    *,
    slots_per_node: int = 8,
    memory_tier: bool = True,
    standby: Standby | None = None,
) -> float:
    """Share of the wall clock that is work which counted, with the best intervals, by plain arithmetic.

    Never rises with ``nodes``, the rest being equal, and ``step_s / goodput`` always rises with ``step_s``. The larger
    of the two with and without a memory tier bounds :func:`plan_goodput` from above (:func:`goodput_bound`).

    Args:
        nodes: Nodes that carry ranks.
        step_s: Seconds of one step.
        ckpt_bytes: One checkpoint, over all ranks.
        hardware: Bandwidths, failure rate and times.
        slots_per_node: Devices of a node.
        memory_tier: The hosts hold replicas.
        standby: What happens when a node is gone; None: there is always a spare.

    Raises:
        ConfigError: The hardware has no bandwidth to the storage or the host.
    """
    what = process(nodes, step_s, ckpt_bytes, hardware, slots_per_node=slots_per_node, memory_tier=memory_tier)
    return max(LEAST, shares(what, standby).goodput)


def goodput_bound(nodes: int, step_s: float, ckpt_bytes: float, hardware: Hardware, slots_per_node: int = 8) -> float:
    """No plan on at least ``nodes`` nodes with steps of at least ``step_s`` loses less: a bound for a search.

    Arguments and errors are those of :func:`goodput`.
    """
    return max(
        goodput(nodes, step_s, ckpt_bytes, hardware, slots_per_node=slots_per_node, memory_tier=tier)
        for tier in (True, False)
    )


def plan_process(
    work: Workload, plan: ParallelPlan, step_s: float, ckpt_bytes: float = 0.0, saving: Saving = BEST
) -> tuple[Process, Standby]:
    """The failure process of a plan on its cluster, and who stands by.

    Args:
        work: Model, batch and cluster.
        plan: A legal plan.
        step_s: Seconds of one step.
        ckpt_bytes: One checkpoint, over all ranks; 0 means that of the model (which takes a while to count).
        saving: What the run is told about its checkpoints.

    Raises:
        ConfigError: The cluster has no hardware figures, or no bandwidth to the storage or the host.
    """
    hardware, cluster = work.hardware, work.cluster
    slots = cluster.slots_per_node
    nodes = nodes_needed(plan, slots)
    size = ckpt_bytes or checkpoint_bytes(work.model)
    copies = GENERATIONS + (plan.offload != "none")  # an optimizer in host memory takes the place of one more copy
    fits = copies * size / nodes <= HOST_SHARE * hardware.host_memory_bytes
    memory_tier = nodes > 1 and fits and saving.memory_steps != 0
    what = process(nodes, step_s, size, hardware, slots_per_node=slots, memory_tier=memory_tier)
    if saving.memory_steps is None and what.replica_s > what.write_s:  # a storage that is faster is the better tier
        what = process(nodes, step_s, size, hardware, slots_per_node=slots, memory_tier=False)
    if saving != BEST:
        what = saved(what, saving, step_s)
    return what, Standby(_standing_by(work, nodes), *shrink_unit(plan, work.batch, slots))


def restart_from_disk_s(work: Workload, plan: ParallelPlan) -> float:
    """Seconds from a failure until the ranks train again with a checkpoint from disk, without a wait for a node.

    Arguments and errors are those of :func:`plan_process`.
    """
    what, _ = plan_process(work, plan, step_s=1.0)  # which this does not depend on
    return what.recover_disk_s


def _standing_by(work: Workload, nodes: int) -> int:
    """Spares of a gang of ``nodes``: as many as are wanted, of the nodes that it leaves."""
    idle = work.cluster.nodes + work.cluster.spares - nodes
    rate = nodes * work.hardware.failures_per_node_day / DAY_S
    return min(idle, spares_for(rate * work.hardware.repair_s)) if idle > 0 else 0


def billed_nodes(work: Workload, plan: ParallelPlan) -> int:
    """Nodes that the user pays for, all the time: those with ranks, and those that stand by.

    Standing by are the spares that were asked for (``cluster.spares``), needed or not, or more of the idle nodes if
    more are wanted. Other idle nodes are free for other work. Never below the fewest nodes plus ``cluster.spares``,
    which bounds the search.
    """
    nodes = nodes_needed(plan, work.cluster.slots_per_node)
    return nodes + max(work.cluster.spares, _standing_by(work, nodes))


def shrink_unit(plan: ParallelPlan, batch: BatchSpec, slots: int) -> tuple[int, float]:
    """Nodes that a gang gives up at once when it lacks one, and the share of its throughput that goes with them.

    The remaining replicas cover the batch with more micro-batches; the pipeline fills and drains as before.
    """
    replica = plan.world_size // plan.dp
    nodes = nodes_needed(plan, slots)
    left = min(plan.dp - 1, (nodes - 1) * slots // replica)
    left -= left % (plan.ep // math.gcd(plan.ep, plan.sp * plan.cp))  # experts are spread over whole sets of replicas
    if left < 1:
        return nodes, 1.0
    drain = (plan.pp - 1) / plan.vpp
    after = accumulation(batch.global_batch, plan.micro_batch, left)
    return max(1, nodes - -(-left * replica // slots)), max(0.0, 1 - (plan.grad_accum + drain) / (after + drain))


def plan_goodput(work: Workload, plan: ParallelPlan, step_s: float, ckpt_bytes: float = 0.0) -> float:
    """Share of the wall clock that is work which counted: with the best intervals, what plans are ranked by.

    Arguments and errors are those of :func:`plan_process`.
    """
    what, standby = plan_process(work, plan, step_s, ckpt_bytes)
    return max(LEAST, shares(what, standby).goodput)


def outlook(
    work: Workload,
    plan: ParallelPlan,
    step_s: float,
    ckpt_bytes: float = 0.0,
    band: tuple[float, float] | None = None,
) -> Outlook:
    """Everything about failures for one plan.

    Args:
        work: Model, batch, cluster and tokens.
        plan: A legal plan.
        step_s: Seconds of one step, without failures.
        ckpt_bytes: One checkpoint, over all ranks; 0 means that of the model (which takes a while to count).
        band: 90 % band of ``step_s``, in seconds; None: the step is exact, and only failures are uncertain.

    Raises:
        ConfigError: The cluster has no hardware figures, or no bandwidth to the storage or the host.
    """
    size = ckpt_bytes or checkpoint_bytes(work.model)
    what, standby = plan_process(work, plan, step_s, size, work.saving)
    told = work.saving._replace(disk_steps=None)
    best, _ = plan_process(work, plan, step_s, size, told if told.memory_steps else BEST)
    parts, whole = shares(what, standby), what.rounded(step_s)
    kept, tier = max(LEAST, parts.goodput), what.correlated < 1
    nodes = nodes_needed(plan, work.cluster.slots_per_node)
    work_s, now_s = work.step_count(plan) * step_s, work.hardware.restart_s
    ends, spread = kept > LEAST_GOODPUT, (band[0] / step_s, band[1] / step_s) if band else (1.0, 1.0)
    days = finish_range(what, standby, work_s, spread) if work.tokens and ends else (None,) * 3
    price = work.hardware.price_per_device_hour * billed_nodes(work, plan) * work.cluster.slots_per_node * 24
    costs = [day * price if day and price else None for day in days]
    return Outlook(
        nodes=nodes,
        failures_per_day=what.rate * DAY_S,
        failures_expected=what.rate * work_s / kept if work.tokens and ends else None,
        node_mtbf_s=1 / what.rate if what.rate else None,
        checkpoint_bytes=size,
        memory_tier=tier,
        save_disk_s=what.copy_s,
        save_memory_s=what.copy_s if tier else 0.0,
        write_s=what.write_s,
        replica_s=what.replica_s,
        detect_s=what.detect_s,
        restore_s=what.restore_s,
        replay_s=whole.replay_s(work_s if work.tokens else math.inf),
        disk_interval_steps=round(whole.disk_s / step_s),
        disk_interval_s=whole.disk_s,
        memory_interval_steps=round(whole.memory_s / step_s) if tier else 0,
        memory_interval_s=whole.memory_s if tier else 0.0,
        best_disk_steps=round(best.rounded(step_s).disk_s / step_s),
        best_goodput=max(LEAST, shares(best, standby).goodput),
        spares=standby.spares,
        spares_wanted=spares_for(what.rate * what.repair_s),
        shrinks=shortage(what, standby).shrinks,
        goodput=kept,
        lost=losses(what, parts),
        never="" if ends else f"failures undo the work: not even {100 * LEAST_GOODPUT:g} % of the time counts",
        days_low=days[0],
        days_50=days[1],
        days_90=days[2],
        cost_low=costs[0],
        cost_50=costs[1],
        cost_90=costs[2],
        sweep=tuple((restart_s, _with_restart(what, standby, restart_s - now_s)) for restart_s in RESTARTS_S),
    )


def _with_restart(what: Process, standby: Standby, longer_s: float) -> float:
    memory_s, disk_s = what.recover_memory_s + longer_s, what.recover_disk_s + longer_s
    return max(LEAST, shares(what._replace(recover_memory_s=memory_s, recover_disk_s=disk_s), standby).goodput)


def losses(what: Process, parts: Shares) -> dict[str, float]:
    """Shares of the wall clock that are not goodput, by kind; see :attr:`Outlook.lost`."""
    running = parts.staffed * parts.running
    down = parts.staffed - running
    detect = parts.staffed * -math.expm1(-what.rate * what.detect_s)  # every attempt to recover begins with it
    saving = running * what.stall / (1 + what.stall) if what.rate else 0.0
    return {
        "checkpoint": saving,
        "replay": running - saving - parts.goodput,
        "detect": detect,
        "restart": down - detect,
        "wait": 1 - parts.staffed,
    }

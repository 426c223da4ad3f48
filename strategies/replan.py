"""The degradation ladder: what a gang does on fewer nodes, decided before anything fails.

For one node less, two less, and so on, a :class:`Rung` has the next legal plan, its throughput, the reshape that leads
there, and whether shrinking beats waiting for a node:

- **Throughput.** The global batch stays exact, so that fewer replicas run ``ceil(batch / (micro_batch * dp))``
  micro-batches each, with padding. Losing 1 of 208 replicas that run 42 makes 43 of them: 2.4 % longer. Without padding
  the replicas would have to divide the batch, and 182 are the next that do: 12.5 % lost.
- **Nodes left over.** The healthy nodes of a broken replica stand by: the next failures cost a restart and no plan.
- **Reshape.** A checkpoint is made of slices that any plan can read. When only ``dp`` changes, ZeRO's flat partition is
  cut anew and a rank keeps where its old range and its new one overlap (half of the bytes for one replica less); when
  tensor or pipeline degrees change, everything moves. It moves between the hosts, or through the disk without a memory
  tier.
- **Wait or shrink.** Either way the gang has stopped and starts again once. After ``t`` seconds without the node,
  waiting has done nothing; shrinking has done ``throughput * (t - move)`` seconds of work, and has to stop once more to
  grow back, for ``save + restart + move``. Waiting is cheaper up to ``move + (save + restart + move) / throughput``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from strategies.failures import Process
from strategies.plan import ParallelPlan
from strategies.reliability import checkpoint_bytes, plan_process
from strategies.rules import check
from strategies.shrink import smaller_plans
from strategies.specs import ClusterSpec
from strategies.topology import nodes_needed
from strategies.workload import Workload


class Candidate(NamedTuple):
    """A plan for a smaller machine.

    Attributes:
        plan: The plan.
        step_s: Seconds of one step.
        tokens_per_s: Of the whole gang, without failures.
    """

    plan: ParallelPlan
    step_s: float
    tokens_per_s: float


Find = Callable[[ClusterSpec], Candidate | None]
"""The best plan for a cluster; None if there is no legal one."""

StepSeconds = Callable[[ParallelPlan], float]
"""Seconds of one step of a plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """What happens on so many nodes.

    Attributes:
        nodes: Nodes that are left of the gang.
        plan: The next legal plan; None if there is none.
        step_s: Seconds of its step; 0 without a plan.
        tokens_per_s: Its throughput, without failures.
        throughput: The same relative to the full plan.
        changes: Which numbers of the plan change: ``dp 16 -> 15``.
        moved_bytes: Bytes of the checkpoint that another rank holds afterwards.
        move_s: Seconds for them.
        grow_s: Stop of the gang when the node is back: save, restart, move.
        spares: Healthy nodes that the smaller plan leaves over: they stand by.
        wait_until_s: A node that is back within this time is worth waiting for; None: whatever it takes.
        shrinks: What is cheaper when a repair takes as long as the hardware says.
        verdict: The same as a sentence.
    """

    nodes: int
    plan: ParallelPlan | None
    step_s: float
    tokens_per_s: float
    throughput: float
    changes: tuple[str, ...]
    moved_bytes: float
    move_s: float
    grow_s: float
    spares: int
    wait_until_s: float | None
    shrinks: bool
    verdict: str


def ladder(
    work: Workload,
    plan: ParallelPlan,
    step_s: float,
    find: Find | None = None,
    rungs: int = 4,
    *,
    step_seconds: StepSeconds | None = None,
) -> tuple[Rung, ...]:
    """The rungs for one node less than the plan needs, two less, and so on.

    Args:
        work: Model, batch and cluster.
        plan: The full plan.
        step_s: Seconds of its step.
        find: The best plan for fewer nodes. None takes the first legal one that recovery tries
            (:func:`strategies.shrink.smaller_plans`), and does not look at memory.
        rungs: How many.
        step_seconds: Step time of what the default ``find`` comes to; None scales ``step_s`` with the micro-batches.

    Raises:
        ConfigError: The cluster has no hardware figures, or no bandwidth to the storage or the host.
    """
    size = checkpoint_bytes(work.model)
    full = Candidate(plan, step_s, work.batch.tokens / step_s)
    what, _ = plan_process(work, plan, step_s, size)
    nodes = nodes_needed(plan, work.cluster.slots_per_node)
    find = find or _drop_replicas(work, full, step_seconds)
    return tuple(
        _rung(work, full, find(replace(work.cluster, nodes=left, spares=0)), what, left, size)
        for left in range(nodes - 1, max(0, nodes - 1 - rungs), -1)
    )


def _drop_replicas(work: Workload, full: Candidate, step_seconds: StepSeconds | None) -> Find:
    """The default: the first legal plan in the order of recovery."""

    def find(cluster: ClusterSpec) -> Candidate | None:
        for smaller in smaller_plans(model=work.model, plan=full.plan, batch=work.batch, cluster=cluster):
            problems = check(
                model=work.model,
                plan=smaller,
                batch=work.batch,
                cluster=cluster,
                precision=work.precision,
                modelled=True,
            )
            if not problems:
                step_s = step_seconds(smaller) if step_seconds else scaled_step_s(full, smaller)
                return Candidate(smaller, step_s, work.batch.tokens / step_s)
        return None

    return find


def scaled_step_s(full: Candidate, smaller: ParallelPlan) -> float:
    """Step time of a smaller plan by its micro-batches alone, or by its ranks where it is cut in another way."""
    plan = full.plan
    if (smaller.tp, smaller.pp, smaller.vpp) != (plan.tp, plan.pp, plan.vpp):
        return full.step_s * plan.world_size / smaller.world_size
    drain = (plan.pp - 1) / plan.vpp
    return full.step_s * (smaller.grad_accum + drain) / (plan.grad_accum + drain)


def _rung(
    work: Workload, full: Candidate, found: Candidate | None, what: Process, left: int, ckpt_bytes: float
) -> Rung:
    hardware, slots = work.hardware, work.cluster.slots_per_node
    if found is None:
        return Rung(
            nodes=left,
            plan=None,
            step_s=0.0,
            tokens_per_s=0.0,
            throughput=0.0,
            changes=(),
            moved_bytes=0.0,
            move_s=0.0,
            grow_s=0.0,
            spares=left,
            wait_until_s=None,
            shrinks=False,
            verdict=f"wait: there is no legal plan for {left} nodes",
        )
    used = nodes_needed(found.plan, slots)
    moved = ckpt_bytes * moved_share(full.plan, found.plan)
    if what.correlated < 1:
        move_s, save_s = moved / (used * slots * hardware.inter_bandwidth), what.copy_s
    else:  # through the disk: all of it is read, and before growing it is written
        move_s, save_s = what.write_s, what.copy_s + what.write_s
    throughput = found.tokens_per_s / full.tokens_per_s
    grow_s = save_s + hardware.restart_s + move_s
    threshold_s = move_s + grow_s / throughput
    shrinks = hardware.repair_s > threshold_s
    return Rung(
        nodes=left,
        plan=found.plan,
        step_s=found.step_s,
        tokens_per_s=found.tokens_per_s,
        throughput=throughput,
        changes=changes(full.plan, found.plan),
        moved_bytes=moved,
        move_s=move_s,
        grow_s=grow_s,
        spares=left - used,
        wait_until_s=threshold_s,
        shrinks=shrinks,
        verdict=_verdict(throughput, threshold_s, hardware.repair_s, left - used, shrinks=shrinks),
    )


def changes(full: ParallelPlan, smaller: ParallelPlan) -> tuple[str, ...]:
    """The numbers of a plan that differ, each as ``dp 16 -> 15``."""
    names = [field.name for field in fields(ParallelPlan) if field.name not in ("stages", "version")]
    return tuple(
        f"{name} {getattr(full, name)} -> {getattr(smaller, name)}"
        for name in names
        if getattr(full, name) != getattr(smaller, name)
    )


def moved_share(full: ParallelPlan, smaller: ParallelPlan) -> float:
    """Share of the checkpoint that a rank of the smaller plan holds and the same rank of the full one did not.

    ZeRO cuts what a rank of the model and pipeline axes holds into equal ranges, one per replica. Without ZeRO every
    replica holds everything, and fewer of them move nothing.
    """
    if (full.tp, full.pp, full.stages, full.vpp, full.ep) != (
        smaller.tp,
        smaller.pp,
        smaller.stages,
        smaller.vpp,
        smaller.ep,
    ):
        return 1.0
    if full.zero_stage == 0 and smaller.zero_stage == 0:
        return 0.0
    old, new = full.dp * full.sp * full.cp, smaller.dp * smaller.sp * smaller.cp
    kept = (min((i + 1) / old, (i + 1) / new) - max(i / old, i / new) for i in range(min(old, new)))
    return 1 - sum(max(0.0, overlap) for overlap in kept)


def _verdict(throughput: float, threshold_s: float, repair_s: float, spares: int, *, shrinks: bool) -> str:
    standing_by = f", {spares} healthy node{'s' if spares > 1 else ''} standing by" if spares else ""
    smaller = f"{throughput:.1%} of the throughput{standing_by}"
    if shrinks:
        return f"shrink to {smaller}: waiting is cheaper only for a node back within {span(threshold_s)}"
    return f"wait: a repair takes {span(repair_s)}, and shrinking to {smaller} pays after {span(threshold_s)}"


def span(seconds: float) -> str:
    """Seconds for people: ``45 s``, ``12 min``, ``4.0 h``, ``2.5 days``."""
    for unit, size, above in (("days", 86400.0, 172800.0), ("h", 3600.0, 7200.0), ("min", 60.0, 120.0)):
        if seconds >= above:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"

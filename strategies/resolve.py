"""From what the user asked for to a whole plan: fills in what was left open, and shrinks a plan to a smaller cluster.

Nothing here judges: :func:`resolve_plan` returns a plan for any numbers, however illegal, so that the rules can name
all that is wrong with it at once.
"""

from __future__ import annotations

from dataclasses import replace

from strategies.cases import legal_tp
from strategies.plan import GradDtype, Offload, ParallelPlan, Recompute, Schedule, accumulation, split_layers
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec, Precision


def resolve_plan(
    model: ModelSpec,
    batch: BatchSpec,
    cluster: ClusterSpec | None,
    precision: Precision,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int | None = None,
    ep: int = 1,
    sp: int = 1,
    cp: int = 1,
    zero_stage: int | None = None,
    schedule: Schedule = "1f1b",
    vpp: int = 1,
    stages: tuple[int, ...] | None = None,
    micro_batch: int = 1,
    grad_accum: int | None = None,
    grad_dtype: GradDtype | None = None,
    recompute: Recompute = "none",
    offload: Offload = "none",
    offload_path: str = "",
    flash: bool = True,
    sequence_parallel: bool = False,
) -> ParallelPlan:
    """Fill in what is None.

    - ``dp``: as many replicas as the cluster and the (smallest) batch carry, without those that would not save a
      micro-batch.
    - ``zero_stage``: 1 with mixed precision (DeepSpeed accumulates in fp32 from there on) or a pipeline, else 0.
    - ``grad_dtype``: fp32, except with an explicit ``zero_stage`` of 0 in mixed precision, which has only the low one.
    - ``stages``: an even split, the longer stages in the middle.
    - ``grad_accum``: what covers the global batch.

    Returns:
        A plan, legal or not: :func:`strategies.rules.check` judges it.
    """
    if dp is None:
        slots = cluster.slots if cluster is not None else tp * pp * sp * cp
        room = min(slots // max(1, tp * pp * sp * cp), batch.smallest // max(1, micro_batch))
        dp = most_replicas(batch.global_batch, micro_batch, room)
    if zero_stage is None:
        zero_stage = 1 if pp > 1 or precision != "fp32" else 0
    if grad_dtype is None:
        grad_dtype = precision if zero_stage == 0 and precision != "fp8" else "fp32"
    if grad_accum is None:
        grad_accum = accumulation(max(1, batch.global_batch), max(1, micro_batch), max(1, dp))
    return ParallelPlan(
        tp=tp,
        pp=pp,
        dp=dp,
        ep=ep,
        sp=sp,
        cp=cp,
        zero_stage=zero_stage,
        schedule=schedule,
        vpp=vpp,
        stages=split_layers(max(0, model.layers), max(1, pp)) if stages is None else stages,
        micro_batch=micro_batch,
        grad_accum=grad_accum,
        grad_dtype=grad_dtype,
        recompute=recompute,
        offload=offload,
        offload_path=offload_path,
        flash=flash,
        sequence_parallel=sequence_parallel,
    )


def most_replicas(global_batch: int, micro_batch: int, room: int) -> int:
    """The fewest replicas that need as few micro-batches per step as ``room`` replicas would; at least 1.

    7 replicas on a batch of 16 accumulate 3 micro-batches each; 6 do so as well, the seventh would only add padding.
    """
    batch, micro_batch = max(1, global_batch), max(1, micro_batch)
    dp = max(1, min(room, batch // micro_batch))
    return -(-batch // (micro_batch * accumulation(batch, micro_batch, dp)))


def with_replicas(plan: ParallelPlan, batch: BatchSpec, dp: int) -> ParallelPlan:
    """The same plan with another number of replicas, accumulation adjusted to the batch."""
    return replace(plan, dp=dp, grad_accum=accumulation(batch.global_batch, plan.micro_batch, dp))


def largest_plan(
    *, model: ModelSpec, plan: ParallelPlan, batch: BatchSpec, cluster: ClusterSpec
) -> ParallelPlan | None:
    """The plan next to ``plan`` that uses the most slots of a smaller cluster.

    Keeps tp and pp and gives up replicas, as long as one replica fits; else it gives up pipeline stages and shards, and
    replicas may take the slots that they leave. Sequence parallelism, schedule, ZeRO stage and micro-batch stay.

    Returns:
        None if not even one replica on one rank fits.
    """
    others = plan.sp * plan.cp
    if min(plan.tp, plan.pp, others, plan.micro_batch, batch.global_batch, model.layers, cluster.slots) < 1:
        return None

    def fitted(tp: int, pp: int) -> ParallelPlan | None:
        wanted = plan.dp if (tp, pp) == (plan.tp, plan.pp) else plan.world_size // (tp * pp * others)
        dp = min(wanted, cluster.slots // (tp * pp * others), batch.smallest // plan.micro_batch)
        if dp < 1:
            return None
        stages = plan.stages if pp == plan.pp else split_layers(model.layers, pp)
        return with_replicas(replace(plan, tp=tp, pp=pp, stages=stages), batch, dp)

    tps = [tp for tp in legal_tp(model) if tp <= plan.tp]
    pps = range(1, min(plan.pp, model.layers) + 1)
    if plan.tp in tps and plan.pp in pps and (same := fitted(plan.tp, plan.pp)):
        return same
    smaller = [found for tp in tps for pp in pps if (found := fitted(tp, pp))]
    return max(smaller, key=lambda found: (found.world_size, found.tp, found.pp), default=None)

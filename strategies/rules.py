"""Every legality rule of a plan, one named function each; :func:`check` reports all that are broken at once.

A rule gets a :class:`~strategies.cases.Case` and returns a :class:`Violation` with the numbers and the nearest legal
values, or None. Rules never raise, whatever the numbers: a rule whose premise another rule refuses stays silent. Those
that concern the model alone are in :mod:`strategies.rules_model`, those about sequences, experts and virtual stages in
:mod:`strategies.rules_split`, those about devices and links in :mod:`strategies.rules_hardware`. What is legal but
cannot run yet (modelled only) is the business of :mod:`strategies.capabilities`, whose verdict :func:`check` adds at
the end.
"""

from __future__ import annotations

from strategies import capabilities
from strategies.cases import Case, Rule
from strategies.errors import PlanInfeasible, Violation
from strategies.plan import ParallelPlan, accumulation
from strategies.resolve import largest_plan
from strategies.rules_hardware import HARDWARE_RULES
from strategies.rules_model import MODEL_RULES
from strategies.rules_offload import OFFLOAD_RULES
from strategies.rules_ramp import RAMP_RULES
from strategies.rules_split import SPLIT_RULES
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec, Precision

# --- the cluster -----------------------------------------------------------------------------------------------------


def cluster_not_empty(case: Case) -> Violation | None:
    """The cluster has at least one node with at least one slot, and no negative number of spares."""
    cluster = case.cluster
    if cluster is None or (min(cluster.nodes, cluster.slots_per_node) >= 1 and cluster.spares >= 0):
        return None
    return Violation(
        rule="cluster_not_empty",
        message=f"the cluster has {cluster.nodes} nodes x {cluster.slots_per_node} slots, {cluster.spares} spares",
        hint="cluster.nodes and cluster.slots_per_node are at least 1, cluster.spares at least 0",
    )


def world_size_fits_cluster(case: Case) -> Violation | None:
    """The ranks find a slot each; spares do not count."""
    cluster, plan = case.cluster, case.plan
    if cluster is None or cluster.slots < 1 or plan.world_size <= cluster.slots:
        return None
    fits = largest_plan(model=case.model, plan=plan, batch=case.batch, cluster=cluster)
    nodes = -(-plan.world_size // cluster.slots_per_node)
    return Violation(
        rule="world_size_fits_cluster",
        message=f"{_product(plan)} = {plan.world_size} ranks, the cluster has {cluster.nodes} nodes x "
        f"{cluster.slots_per_node} slots = {cluster.slots}",
        hint=(f"the largest plan that fits: {_overrides(fits)} ({fits.world_size} ranks)" if fits else "")
        + f"{'; or ' if fits else ''}cluster.nodes={nodes}",
    )


def _product(plan: ParallelPlan) -> str:
    axes = [("tp", plan.tp), ("pp", plan.pp), ("dp", plan.dp), ("sp", plan.sp), ("cp", plan.cp)]
    return " x ".join(f"{name} {size}" for name, size in axes if size > 1 or name in ("tp", "pp", "dp"))


def _overrides(plan: ParallelPlan) -> str:
    return f"strategy.tp={plan.tp} strategy.pp={plan.pp} strategy.dp={plan.dp}"


# --- the batch -------------------------------------------------------------------------------------------------------


def batch_positive(case: Case) -> Violation | None:
    """A step has at least one sequence of at least one token."""
    batch = case.batch
    if min(batch.global_batch, batch.seq) >= 1:
        return None
    return Violation(
        rule="batch_positive",
        message=f"the global batch is {batch.global_batch} sequences of {batch.seq} tokens",
        hint="both are at least 1",
    )


def sequence_within_positions(case: Case) -> Violation | None:
    """Learned positions exist up to the model's sequence length only."""
    rows = case.model.learned_positions
    if rows <= 0 or case.batch.seq <= rows:
        return None
    key = "model.seq" if case.model.position_rows is None else "model.position_rows"
    return Violation(
        rule="sequence_within_positions",
        message=f"sequences of {case.batch.seq} tokens, the model has {rows} learned positions",
        hint=f"{key}={case.batch.seq}, or sequences of at most {rows} tokens",
    )


def replicas_within_batch(case: Case) -> Violation | None:
    """No replica computes on padding alone: one micro-batch of every replica fits into the batch."""
    plan, size = case.plan, case.batch.global_batch
    if min(plan.dp, plan.micro_batch, size) < 1 or plan.dp * plan.micro_batch <= size:
        return None
    dp, micro_batch = size // plan.micro_batch, size // plan.dp
    options = [f"dp at most {dp}"] * (dp > 0) + [f"micro_batch at most {micro_batch}"] * (micro_batch > 0)
    return Violation(
        rule="replicas_within_batch",
        message=f"dp {plan.dp} x micro_batch {plan.micro_batch} = {plan.dp * plan.micro_batch} rows at a time, "
        f"the global batch has {size}: a replica would compute on padding alone",
        hint="; or ".join([*options, f"train.global_batch of {plan.dp * plan.micro_batch} or more"]),
    )


def accumulation_exact(case: Case) -> Violation | None:
    """Gradient accumulation covers the batch with as few micro-batches as possible."""
    plan, size = case.plan, case.batch.global_batch
    if min(plan.dp, plan.micro_batch, size) < 1 or plan.grad_accum < 1:
        return None
    exact = accumulation(size, plan.micro_batch, plan.dp)
    if plan.grad_accum == exact:
        return None
    return Violation(
        rule="accumulation_exact",
        message=f"micro_batch {plan.micro_batch} x grad_accum {plan.grad_accum} x dp {plan.dp} = {plan.rows_per_step} "
        f"rows for a global batch of {size}",
        hint=f"grad_accum {exact} (= {size} / {plan.micro_batch * plan.dp}, rounded up)",
    )


# --- what excludes what ----------------------------------------------------------------------------------------------


def zero_stage_known(case: Case) -> Violation | None:
    """ZeRO has the stages 0 to 3."""
    if 0 <= case.plan.zero_stage <= 3:
        return None
    return Violation(rule="zero_stage_known", message=f"zero_stage {case.plan.zero_stage}", hint="use 0, 1, 2 or 3")


def zero_with_pipeline(case: Case) -> Violation | None:
    """A pipeline keeps whole gradients between micro-batches, so ZeRO-2 and 3 cannot cut them."""
    if case.plan.pp <= 1 or case.plan.zero_stage not in (2, 3) or not case.engine:
        return None
    return Violation(
        rule="zero_with_pipeline",
        message=f"zero_stage {case.plan.zero_stage} with pp {case.plan.pp}: DeepSpeed's pipeline runs ZeRO 0 and 1",
        hint="strategy.zero_stage=1, or strategy.pp=1",
    )


def sequence_parallel_with_pipeline(case: Case) -> Violation | None:
    """DeepSpeed's pipeline grid has no context axis; the ranks of Ulysses are replicas to it."""
    plan = case.plan
    if plan.pp <= 1 or plan.cp <= 1 or not case.engine:
        return None
    return Violation(
        rule="sequence_parallel_with_pipeline",
        message=f"cp {plan.cp} with pp {plan.pp}: the pipeline grid has no context axis",
        hint="strategy.cp=1 (strategy.sp cuts sequences in a pipeline, too), or strategy.pp=1",
    )


def schedule_fits(case: Case) -> Violation | None:
    """DualPipeV keeps two streams of micro-batches in flight, and virtual stages belong to the interleaved schedule."""
    plan = case.plan
    if plan.schedule == "dualpipev" and plan.pp > 1 and plan.grad_accum < 2 * plan.pp:
        return Violation(
            rule="schedule_fits",
            message=f"dualpipev needs grad_accum of 2 x pp {plan.pp} = {2 * plan.pp} or more, found {plan.grad_accum}",
            hint=f"train.global_batch of {plan.micro_batch * plan.dp * (2 * plan.pp - 1) + 1} or more, "
            "a smaller micro_batch or dp, or strategy.schedule=1f1b",
        )
    if plan.vpp > 1 and plan.schedule != "interleaved":
        return Violation(
            rule="schedule_fits",
            message=f"vpp {plan.vpp} with schedule {plan.schedule}: only the interleaved schedule has virtual stages",
            hint="vpp 1, or strategy.schedule=interleaved",
        )
    return None


def gradient_dtype_matches(case: Case) -> Violation | None:
    """Gradients accumulate in fp32 or in the precision of the backward pass."""
    if case.plan.grad_dtype in ("fp32", case.precision):
        return None
    legal = dict.fromkeys(("fp32", case.precision))
    return Violation(
        rule="gradient_dtype_matches",
        message=f"grad_dtype {case.plan.grad_dtype} with precision {case.precision}",
        hint=" or ".join(f"strategy.grad_dtype={dtype}" for dtype in legal),
    )


def mixed_precision_needs_zero(case: Case) -> Violation | None:
    """DeepSpeed does not implement fp32 accumulation of low-precision gradients without ZeRO."""
    plan = case.plan
    if case.precision == "fp32" or plan.zero_stage != 0 or plan.grad_dtype != "fp32" or not case.engine:
        return None
    return Violation(
        rule="mixed_precision_needs_zero",
        message=f"precision {case.precision} with zero_stage 0 and grad_dtype fp32 is not implemented by DeepSpeed",
        hint=f"strategy.zero_stage=1 (legal at dp 1, too), or strategy.grad_dtype={case.precision}",
    )


RULES: tuple[Rule, ...] = (
    *MODEL_RULES,
    cluster_not_empty,
    world_size_fits_cluster,
    batch_positive,
    sequence_within_positions,
    replicas_within_batch,
    accumulation_exact,
    *RAMP_RULES,
    zero_stage_known,
    zero_with_pipeline,
    sequence_parallel_with_pipeline,
    *SPLIT_RULES,
    schedule_fits,
    gradient_dtype_matches,
    mixed_precision_needs_zero,
    *OFFLOAD_RULES,
    *HARDWARE_RULES,
)
"""All of them, in the order in which they are reported."""


def check(
    *,
    model: ModelSpec,
    plan: ParallelPlan,
    batch: BatchSpec,
    cluster: ClusterSpec | None,
    precision: Precision,
    modelled: bool = False,
    engine: bool = True,
) -> tuple[Violation, ...]:
    """Every broken rule, none missing and none twice.

    Args:
        model: The model.
        plan: The plan.
        batch: The global batch.
        cluster: Where it shall run; None leaves the rules about the cluster out.
        precision: Arithmetic of forward and backward.
        modelled: Accept what can be modelled but not run.
        engine: The plan is for our own engine (DeepSpeed); False leaves out what only that one refuses, for runs of
            other training code.
    """
    case = Case(model=model, plan=plan, batch=batch, cluster=cluster, precision=precision, engine=engine)
    broken = [violation for rule in RULES if (violation := rule(case)) is not None]
    if not modelled:
        verdict = capabilities.runnable(plan, precision, model)
        if verdict is not None and (not broken or verdict.rule != "combination_probed"):
            broken.append(verdict)
    return tuple(broken)


def require(
    *,
    model: ModelSpec,
    plan: ParallelPlan,
    batch: BatchSpec,
    cluster: ClusterSpec | None,
    precision: Precision,
    modelled: bool = False,
) -> None:
    """Raise PlanInfeasible with every violation that :func:`check` finds, if there is any."""
    broken = check(model=model, plan=plan, batch=batch, cluster=cluster, precision=precision, modelled=modelled)
    if broken:
        raise PlanInfeasible(broken, hint="phalanx plan shows the plan and every violation without starting anything")

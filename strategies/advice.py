"""What holds a plan back, and what would help most: the bottleneck, better neighbours of the plan, better hardware.

Everything is computed with the same :class:`~strategies.estimate.Estimator` that made the estimate, so a promised gain
is what an estimate of the changed plan would say. Gains count tokens per second that survive failures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

from strategies import capabilities, rules
from strategies.estimate import CostEstimate, Estimator
from strategies.plan import ParallelPlan, accumulation, split_layers
from strategies.reliability import checkpoint_bytes, plan_goodput
from strategies.workload import Workload

WORTH_SAYING = 0.005
"""Gains below half a percent drown in the band of any prediction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bottleneck:
    """The kind of work that takes most of a step.

    Attributes:
        kind: Name of the kind, a field of ``StepTime``.
        share: Of the step time, 0 .. 1.
        sentence: For people.
    """

    kind: str
    share: float
    sentence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One thing that could be different.

    Attributes:
        change: What, in words.
        overrides: The same for the command line; empty where the configuration has no such key.
        gain: Tokens per second that survive failures, against now; 0.07 is 7 % more. 0 where now does not fit.
        step_s: Predicted seconds per step.
        peak_bytes: Predicted memory of the rank that needs most.
        runnable: phalanx can run it; False means that it can be modelled only.
        plan: The changed plan; that of now for hardware.
    """

    change: str
    overrides: str
    gain: float
    step_s: float
    peak_bytes: float
    runnable: bool
    plan: ParallelPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What would help.

    Attributes:
        bottleneck: What takes most of a step.
        plan: The best changes of the plan, best first: legal and fitting ones.
        hardware: The best changes of the machine, best first.
    """

    bottleneck: Bottleneck
    plan: tuple[Change, ...]
    hardware: tuple[Change, ...]


def advise(estimator: Estimator, estimate: CostEstimate, *, limit: int = 3) -> Advice:
    """Bottleneck and the changes that help most.

    Args:
        estimator: What made ``estimate``.
        estimate: The plan of now; if it does not fit, the changes of the plan are those that make it fit.
        limit: Changes of either sort.
    """
    return Advice(
        bottleneck=bottleneck(estimate),
        plan=plan_changes(estimator, estimate, limit=limit)[:limit],
        hardware=hardware_changes(estimator, estimate)[:limit],
    )


# ---- the bottleneck ----------------------------------------------------------------------------------------------

_BECAUSE = {
    "gemm": "matrix multiplications take {share}: compute is the bottleneck",
    "attention": "attention takes {share}: its score matrix grows with the square of the sequence",
    "memory_bound": "norms, activations and the like take {share}: they wait for the memory of the devices",
    "tp": "tensor-parallel collectives take {share}: {tp} ranks share every layer",
    "cp": "the exchange between sequence shards takes {share}",
    "ep": "the dispatch of tokens to experts takes {share}",
    "launch": "launching kernels takes {share}: the matrices are too small to keep the devices busy",
    "bubble": "the pipeline stands still for {share}: {pp} stages share {accum} micro-batches",
    "p2p": "passing activations between stages takes {share}",
    "dp": "gradients and parameters of the replicas take {share}: {dp} replicas wait for the network",
    "optimizer": "the optimizer takes {share}",
    "offload": "moving what lives beside the devices takes {share}",
}


def bottleneck(estimate: CostEstimate) -> Bottleneck:
    """The largest kind; where that is the useful work itself, the sentence names the largest loss, too."""
    shares = {kind: seconds / estimate.step_s for kind, seconds in estimate.step._asdict().items()}
    kind = max(shares, key=lambda name: shares[name])
    sentence = _sentence(estimate, kind, shares[kind])
    if kind in ("gemm", "attention"):
        loss = max((name for name in shares if name not in ("gemm", "attention")), key=lambda name: shares[name])
        if shares[loss] >= 0.01:
            lost = _sentence(estimate, loss, shares[loss]).partition(": ")
            sentence += f"; the largest loss: {lost[0]}" + (f" ({lost[2]})" if lost[2] else "")
    return Bottleneck(kind=kind, share=shares[kind], sentence=sentence[0].upper() + sentence[1:] + ".")


def _sentence(estimate: CostEstimate, kind: str, share: float) -> str:
    plan = estimate.plan
    words = _BECAUSE.get(kind, f"{kind} takes {{share}}")
    return words.format(
        share=f"{100 * share:.0f} % of the step", tp=plan.tp, pp=plan.pp, dp=plan.dp, accum=plan.grad_accum
    )


# ---- changes of the plan -----------------------------------------------------------------------------------------


def plan_changes(estimator: Estimator, estimate: CostEstimate, *, limit: int = 3) -> tuple[Change, ...]:
    """Legal and fitting neighbours of the plan that survive more tokens per second, best first.

    Of a plan that does not fit, the neighbours that do; where single changes are fewer than ``limit``, also pairs of
    changes, after them. At most one change per set of knobs is named, so that three changes are three ideas. What runs
    stays runnable: a neighbour that can only be modelled is left out unless the plan itself is one.
    """
    work, budget, seen = estimator.work, estimator.memory.budget(), {estimate.plan}
    size = checkpoint_bytes(work.model)
    now = _surviving_s(estimator, estimate.plan, size)

    def ranked(plans: Iterable[ParallelPlan]) -> dict[str, tuple[float, ParallelPlan]]:
        """The best per set of knobs, best first."""
        fitting = [one for one in plans if estimator.memory.peak(one) <= budget]
        scored = [(_surviving_s(estimator, one, size), one) for one in fitting]
        found: dict[str, tuple[float, ParallelPlan]] = {}
        for score, plan in sorted(scored, key=lambda one: one[0]):
            found.setdefault(",".join(_changed(estimate.plan, plan)), (score, plan))
        return found

    near = list(_legal(work, neighbours(work, estimate.plan), seen, estimate.runnable))
    found = ranked(near)
    if estimate.fits:
        better = [(now / score - 1, plan) for score, plan in found.values()]
        return tuple(_plan_change(estimator, estimate, plan, gain) for gain, plan in better if gain >= WORTH_SAYING)
    if len(found) < limit:
        pairs = (two for one in near for two in neighbours(work, one))
        found |= {
            key: one for key, one in ranked(_legal(work, pairs, seen, estimate.runnable)).items() if key not in found
        }
    return tuple(_plan_change(estimator, estimate, plan, 0.0) for _, plan in found.values())


def _surviving_s(estimator: Estimator, plan: ParallelPlan, size: float) -> float:
    """Seconds per step, failures included; ``size`` is that of a checkpoint."""
    step_s = sum(estimator.timing.step(plan))
    return step_s / plan_goodput(estimator.work, plan, step_s, size)


def _legal(
    work: Workload, plans: Iterable[ParallelPlan], seen: set[ParallelPlan], runnable: bool
) -> Iterator[ParallelPlan]:
    """Those that no rule refuses, each once."""
    for plan in plans:
        if plan in seen:
            continue
        seen.add(plan)
        broken = rules.check(
            model=work.model,
            plan=plan,
            batch=work.batch,
            cluster=work.cluster,
            precision=work.precision,
            modelled=not runnable,
            brief=True,
        )
        if not broken:
            yield plan


def neighbours(work: Workload, plan: ParallelPlan) -> Iterator[ParallelPlan]:
    """Plans that differ from ``plan`` in one knob, or in two degrees that trade ranks; legal or not."""
    for micro_batch in {plan.micro_batch * 2, plan.micro_batch * 4, plan.micro_batch // 2, plan.micro_batch // 4, 1}:
        yield _resized(work, plan, micro_batch=micro_batch)
    yield from _degrees(work, plan)
    for recompute in ("none", "selective", "full"):
        yield replace(plan, recompute=recompute)
    for zero_stage in range(4):
        yield replace(plan, zero_stage=zero_stage)
    if plan.tp > 1:
        yield replace(plan, sequence_parallel=not plan.sequence_parallel)
    if work.model.moe is not None:
        for ep in {plan.ep * 2, plan.ep // 2, work.model.moe.experts}:
            if ep:
                yield replace(plan, ep=ep)
    if plan.pp > 1:
        yield replace(plan, schedule="1f1b", vpp=1)
        yield replace(plan, schedule="dualpipev", vpp=1)
        for vpp in (2, 3, 4, 6, 8):
            yield replace(plan, schedule="interleaved", vpp=vpp)
    if not plan.flash:
        yield replace(plan, flash=True)
    if plan.offload != "none":
        yield replace(plan, offload="none")


def _degrees(work: Workload, plan: ParallelPlan) -> Iterator[ParallelPlan]:
    """A factor of 2 moved from one degree to another, and replicas on ranks that idle."""
    names = ("tp", "pp", "dp")
    for giver in names:
        for taker in names:
            if giver != taker and getattr(plan, giver) % 2 == 0:
                moved = {giver: getattr(plan, giver) // 2, taker: getattr(plan, taker) * 2}
                yield _resized(work, plan, **moved)
    room = work.cluster.slots // max(1, plan.world_size // plan.dp)
    if room > plan.dp:
        yield _resized(work, plan, dp=room)


def _resized(work: Workload, plan: ParallelPlan, **changes: int) -> ParallelPlan:
    """The plan with other degrees; accumulation, stages and what depends on them follow."""
    sizes = {name: changes.get(name, getattr(plan, name)) for name in ("tp", "pp", "dp", "micro_batch")}
    stages = plan.stages if sizes["pp"] == plan.pp else split_layers(work.model.layers, max(1, sizes["pp"]))
    micro_batch = max(1, sizes["micro_batch"])
    zero_stage = min(plan.zero_stage, 1) if sizes["pp"] > 1 else plan.zero_stage
    return replace(
        plan,
        tp=sizes["tp"],
        pp=sizes["pp"],
        dp=sizes["dp"],
        micro_batch=micro_batch,
        stages=stages,
        zero_stage=zero_stage,
        grad_accum=accumulation(work.batch.global_batch, micro_batch, sizes["dp"]),
        sequence_parallel=plan.sequence_parallel and sizes["tp"] > 1,
        schedule=plan.schedule if sizes["pp"] > 1 else "1f1b",
        vpp=plan.vpp if sizes["pp"] > 1 else 1,
    )


def _changed(old: ParallelPlan, new: ParallelPlan) -> dict[str, object]:
    """Knobs that differ, without those that follow from others."""
    derived = {"grad_accum", "stages", "version"}
    names = [field.name for field in fields(new) if field.name not in derived]
    return {name: getattr(new, name) for name in names if getattr(new, name) != getattr(old, name)}


def _plan_change(estimator: Estimator, estimate: CostEstimate, plan: ParallelPlan, gain: float) -> Change:
    work, changed = estimator.work, _changed(estimate.plan, plan)
    words = ", ".join(
        f"{name} {_literal(getattr(estimate.plan, name))} -> {_literal(value)}" for name, value in changed.items()
    )
    overrides = " ".join(f"strategy.{name}={_literal(value)}" for name, value in changed.items())
    return Change(
        change=words,
        overrides=overrides,
        gain=gain,
        step_s=sum(estimator.timing.step(plan)),
        peak_bytes=estimator.memory.peak(plan),
        runnable=capabilities.runnable(plan, work.precision, work.model) is None,
        plan=plan,
    )


def _literal(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- changes of the machine --------------------------------------------------------------------------------------


def hardware_changes(estimator: Estimator, estimate: CostEstimate) -> tuple[Change, ...]:
    """What the same plan would gain from a better machine, best first; it may fit only then."""
    size = checkpoint_bytes(estimator.work.model)
    now = _surviving_s(estimator, estimate.plan, size)
    found = []
    for change, work in _machines(estimator.work, estimate):
        better = Estimator(work)
        gain = now / _surviving_s(better, estimate.plan, size) - 1
        if gain < WORTH_SAYING:
            continue
        found.append(
            Change(
                change=change,
                overrides="",
                gain=gain,
                step_s=sum(better.timing.step(estimate.plan)),
                peak_bytes=estimate.peak_bytes,
                runnable=estimate.runnable,
                plan=estimate.plan,
            )
        )
    return tuple(sorted(found, key=lambda one: -one.gain))


def _machines(work: Workload, estimate: CostEstimate) -> Iterator[tuple[str, Workload]]:
    """The same machine with one thing twice as good, or with the spares that it lacks."""
    hardware, cluster = work.hardware, work.cluster
    better = {
        "matrix units": ("flops_fp32", "flops_16", "flops_fp8"),
        "device memory bandwidth": ("memory_bandwidth",),
        "links inside the node": ("intra_bandwidth",),
        "network cards": ("inter_bandwidth",),
        "checkpoint storage": ("storage_bandwidth", "storage_total_bandwidth"),
    }
    for part, names in better.items():
        faster = replace(hardware, **{name: 2 * getattr(hardware, name) for name in names})
        yield f"{part} 2x", replace(work, cluster=replace(cluster, hardware=faster))
    rarer = replace(hardware, failures_per_node_day=hardware.failures_per_node_day / 2)
    yield "half the failures", replace(work, cluster=replace(cluster, hardware=rarer))
    sooner = replace(hardware, detect_s=hardware.detect_s / 2, restart_s=hardware.restart_s / 2)
    yield "half the time to notice and restart", replace(work, cluster=replace(cluster, hardware=sooner))
    missing = estimate.outlook.spares_wanted - estimate.outlook.spares
    if missing > 0:
        nodes = f"{missing} more node{'s' if missing > 1 else ''} in spare"
        yield nodes, replace(work, cluster=replace(cluster, spares=cluster.spares + missing))

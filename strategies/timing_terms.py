"""The arithmetic of a step in words and numbers, kind by kind, for people who want to check it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from strategies.calibration import Calibration
from strategies.collectives import gather_s, ring_link
from strategies.model_state import replicas
from strategies.offload import Parts
from strategies.plan import ParallelPlan
from strategies.workload import Term

if TYPE_CHECKING:
    from strategies.timing import Stage, StepTime, Timing, Unit

_BLOCK_KINDS = ("gemm", "attention", "memory_bound", "tp", "cp", "ep", "launch")
_BLOCK_FORMULAS = {
    "gemm": "micro-batches x (blocks x products of one block + output projection), forward, backward, recomputed",
    "attention": "micro-batches x blocks x attention of one block",
    "memory_bound": "micro-batches x (blocks x norms, residuals, activations + embedding + loss) + adding gradients",
    "tp": "micro-batches x (blocks x exposed sums over the tensor-parallel ranks + embedding + logits)",
    "cp": "micro-batches x blocks x exposed ring of keys and values and Ulysses exchanges",
    "ep": "micro-batches x blocks x exposed exchanges of tokens between experts",
    "launch": "micro-batches x blocks x what the host adds to the device's time + host seconds per step",
}


def explain(timing: Timing, plan: ParallelPlan) -> tuple[Term, ...]:
    """One line for every kind of the step of ``plan``, in the order of :class:`strategies.timing.StepTime`."""
    step = timing.step(plan)
    unit = timing.unit_of(plan)
    stage = timing.slowest(unit, plan)
    texts = dict(_blocks(timing, plan, unit, stage)) | dict(_rest(timing, plan, unit, stage, step))
    return tuple(
        Term(kind=kind, value=seconds, unit="s", formula=texts[kind][0], numbers=f"{texts[kind][1]} = {_s(seconds)}")
        for kind, seconds in zip(step._fields, step, strict=True)
    )


def _s(seconds: float) -> str:
    for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.4g} {name}"
    return "0 s" if seconds == 0.0 else f"{seconds / 1e-6:.3g} us"


def _blocks(timing: Timing, plan: ParallelPlan, unit: Unit, stage: Stage) -> Iterator[tuple[str, tuple[str, str]]]:
    """Kinds of time inside of the slowest stage."""
    calibration = timing.calibration
    for index, kind in enumerate(_BLOCK_KINDS):
        parts = [f"{stage.dense} x {_s(unit.dense[index])}"] if stage.dense else []
        parts += [f"{stage.moe} x {_s(unit.moe[index])} with experts"] if stage.moe else []
        parts += [f"{_s(unit.embed[index])} embedding"] if stage.first and unit.embed[index] else []
        parts += [f"{_s(unit.head[index])} output and loss"] if stage.last and unit.head[index] else []
        numbers = f"{plan.grad_accum} x ({' + '.join(parts)})"
        if kind == "memory_bound" and plan.grad_accum > 1:
            weights = timing.stage_weights(unit, stage, plan)
            numbers += f" + {plan.grad_accum - 1} x {_s(timing.accumulate_s(plan, weights))}"
        if kind == "launch":
            numbers += f" + {_s(calibration.host_step_s)}"
        yield kind, (_BLOCK_FORMULAS[kind] + _rates(calibration, kind), numbers)


def _rates(calibration: Calibration, kind: str) -> str:
    """The calibrated share that the kind rests on."""
    if kind == "gemm":
        return f"; large products reach {calibration.linear:.0%} of peak"
    if kind == "memory_bound":
        return f"; {calibration.bandwidth:.0%} of the memory bandwidth"
    if kind == "tp":
        return (
            f"; {calibration.intra:.0%} of the link inside a node, {calibration.inter * calibration.ring:.0%} outside"
        )
    if kind == "launch":
        return f"; {_s(calibration.host_block_s)} of the host per block and pass"
    return ""


def _rest(
    timing: Timing, plan: ParallelPlan, unit: Unit, stage: Stage, step: StepTime
) -> Iterator[tuple[str, tuple[str, str]]]:
    """Kinds of time around the slowest stage."""
    weights = timing.stage_weights(unit, stage, plan)
    divisor = {"1f1b": "1", "interleaved": f"{plan.vpp} virtual stages", "dualpipev": "3 (DualPipeV)"}[plan.schedule]
    whole = timing.whole_s(unit)
    yield (
        "bubble",
        (
            "(one micro-batch through all stages - through the slowest) / virtual stages",
            f"({_s(whole)} - {_s(stage.seconds)}) / {divisor}" if plan.pp > 1 else "one stage",
        ),
    )
    sends = 2 * (plan.grad_accum * plan.vpp + plan.pp - 1)
    yield (
        "p2p",
        ("messages x (activations of a micro-batch / link + latency) x exposed share",)
        + ((f"{sends} x {_s(step.p2p / sends)}",) if plan.pp > 1 else ("one stage",)),
    )
    yield "dp", _data_parallel(timing, plan, stage, weights)
    device, held = timing.device, _owned(plan, weights, stage.moe * unit.expert_weights)
    yield (
        "optimizer",
        (
            "bytes per parameter x parameters / replicas that share them / memory bandwidth",
            f"{timing.optimizer_bytes:g} B x {held} / {_rate(device.bandwidth)}"
            if plan.offload == "none"
            else "in host memory",
        ),
    )
    yield "offload", _offload(timing, plan, held)


def _offload(timing: Timing, plan: ParallelPlan, held: str) -> tuple[str, str]:
    """What crosses the link to the host, and what disks read and write."""
    formula = "bytes per parameter x parameters / replicas that share them / host bandwidth"
    if plan.offload == "none":
        return formula, "nothing offloaded"
    numbers = f"({_parts(timing.offloaded(plan))}) B x {held} / {_rate(timing.hardware.host_bandwidth)}"
    if swapped := timing.on_disks(plan):
        formula += " + likewise on disks"
        numbers += f" + ({_parts(swapped)}) B x {held} / {_rate(timing.disk_bandwidth(plan))}"
    return formula, numbers


def _parts(parts: Parts) -> str:
    return " + ".join(f"{size:g} {kind}" for kind, size in parts)


def _owned(plan: ParallelPlan, weights: float, experts: float) -> str:
    """A rank's parameters over those that share their state; of experts these are fewer."""
    ranks, sharing = replicas(plan) if plan.zero_stage else (1, 1)
    if ranks == sharing or not experts:
        return f"{weights / 1e9:.4g} G parameters / {ranks}"
    rest = (weights - experts) / 1e9
    return f"({rest:.4g} G parameters / {ranks} + {experts / 1e9:.4g} G parameters of experts / {sharing})"


def _data_parallel(timing: Timing, plan: ParallelPlan, stage: Stage, weights: float) -> tuple[str, str]:
    """Every collective, what of their sum is exposed, and the sum of tied embeddings."""
    ranks, tied = plan.dp * plan.sp * plan.cp, timing.tied_s(plan)
    traffic, link = timing.traffic(stage.seconds, plan, weights), ring_link(timing.network, ranks, plan.tp)
    ends = f" + {_s(tied)} tied embeddings" if tied else ""
    if not traffic.parts:
        return "the gradients of tied embeddings over the ends", f"one replica{ends}"
    delay = gather_s(timing.network, 0.0, ranks, plan.tp)
    parts = [
        f"{one.times} x ({ranks - 1}/{ranks} x {one.size / 1e9:.4g} GB {one.kind} / {_rate(link.bandwidth)}"
        f" + {_s(delay)})"
        for one in traffic.parts
    ]
    moved, constants = f"({' + '.join(parts)})", timing.calibration
    if not constants.dp_overlap:
        share = constants.dp_exposed / timing.buckets
        return (
            "collectives x ((ranks - 1) / ranks x bytes / link + latency) x exposed share",
            f"{moved} x {share:.4g}{ends}",
        )
    total = sum(one.times * gather_s(timing.network, one.size, ranks, plan.tp) for one in traffic.parts)
    share = constants.dp_exposed
    return (
        "C = collectives x ((ranks - 1) / ranks x bytes / link + latency); exposed share x C + what of the rest "
        "exceeds the computation that hides it",
        f"C = {moved} = {_s(total)}; {share:.4g} x C + max(0, {1.0 - share:.4g} x C - {_s(traffic.hiding_s)}){ends}",
    )


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.4g} GB/s"

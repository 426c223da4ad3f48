"""The arithmetic of memory in words and numbers, for people who want to check it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.activations import in_flight
from strategies.model_state import replicas
from strategies.plan import ParallelPlan
from strategies.workload import Term

if TYPE_CHECKING:
    from strategies.memory import Layout, Memory, MicroBatch, StageMemory

_GIB = 2**30


def terms(memory: Memory, plan: ParallelPlan, stage: int) -> tuple[Term, ...]:
    """One term per kind of memory of a stage; their values sum to its peak."""
    found, layout, batch = memory.stage(plan, stage), memory.layout(plan, stage), memory.micro_batch(plan)
    lines = {
        **_state(found, layout, plan),
        **_passing(found, layout, batch, plan, stage, masked=memory.work.packing),
        "gathered": ("weights and gradients that ZeRO-3 has whole for a moment", _size(found.gathered)),
        "buffers": (
            "copies of gradients + tensors between ranks",
            f"{_size(found.buffers - batch.buffers)} + {_size(batch.buffers)}",
        ),
        "context": ("context and libraries of the device", _size(found.context)),
        "fragmentation": (
            "part of activations and logits",
            f"{memory.overhead.fragmentation:g} x {_size(found.activations + found.logits)}",
        ),
    }
    return tuple(
        Term(kind=kind, value=value, unit="bytes", formula=lines[kind][0], numbers=lines[kind][1])
        for kind, value in found._asdict().items()
    )


def _state(found: StageMemory, layout: Layout, plan: ParallelPlan) -> dict[str, tuple[str, str]]:
    """Bytes per parameter that remain on this rank, after ZeRO has cut them."""
    ranks, sharing = replicas(plan)
    over = f"{ranks} replicas" + (f", experts over {sharing}" if sharing != ranks else "")
    words = {
        "weights": (3, "bytes of a weight"),
        "gradients": (2, f"bytes of a gradient ({plan.grad_dtype})"),
        "optimizer": (1, "bytes of moments and master copy"),
    }
    lines = {}
    for kind, (least, word) in words.items():
        value = getattr(found, kind)
        cut = f", cut over {over}" if plan.zero_stage >= least else ", whole on every replica"
        rate = value / layout.parameters if layout.parameters else 0.0
        lines[kind] = (f"parameters of the rank x {word}{cut}", f"{layout.parameters:,} x {rate:.4g}")
    return lines


def _passing(
    found: StageMemory, layout: Layout, batch: MicroBatch, plan: ParallelPlan, stage: int, *, masked: bool
) -> dict[str, tuple[str, str]]:
    parts = [
        f"{blocks} x {_size(one.kept)}"
        for blocks, one in ((layout.dense, batch.dense), (layout.mixed, batch.mixed))
        if blocks
    ]
    ends = batch.every + (batch.first if stage == 0 else 0.0)
    flying, masks = in_flight(plan, stage), " and masks of documents" if masked else ""
    kept = flying * (layout.dense * batch.dense.kept + layout.mixed * batch.mixed.kept + ends)
    return {
        "activations": (
            f"micro-batches in flight x (blocks x kept + ends{masks}) + working set beyond the logits",
            f"{flying:g} x ({' + '.join([*parts, _size(ends)])}) + {_size(found.activations - kept)}",
        ),
        "logits": (
            "tokens x (vocabulary / tp x (logit + fp32 copies) + ends)",
            f"{batch.at.tokens:,.0f} x {found.logits / batch.at.tokens if batch.at.tokens else 0.0:,.0f}",
        ),
    }


def _size(value: float) -> str:
    return f"{value / _GIB:.3g} GiB"

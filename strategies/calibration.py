"""The few constants that turn arithmetic into seconds, how they are looked up, and how far they can be trusted.

Every constant has a physical meaning and a range that it must lie in; :mod:`strategies.calibrated` holds those that
``python -m launcher.calibration.fit --write`` fitted to published runs. None is keyed by a row, a source or a model's
name: the key is (device, framework family, precision), and ``*`` stands for any. What was measured and published by
itself, or follows from how a framework works, is not fitted: it is written here with its source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from strategies import calibrated
from strategies.calibrated import Constant
from strategies.collectives import Link, Network
from strategies.kernels import Device
from strategies.plan import ParallelPlan
from strategies.specs import Precision
from strategies.workload import Framework, Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What a program of one framework family gets of one device in one precision.

    Shares are of the data sheet's figure; of a measured one they are all of it.

    Attributes:
        device: Generation of devices that the constants belong to.
        framework: Framework family.
        precision: ``16`` or ``fp8``.
        linear: Share of peak that large, aligned products of activations and weights reach. Fitted.
        half: The same for products that stay in 16 bit (equal to ``linear`` without fp8). Fitted.
        batched: Share of the 16-bit peak that the products of unfused attention reach. Fitted.
        flash: Share of the 16-bit peak that fused causal attention reaches (head width 128, long sequences). Fitted.
        bandwidth: Share of the memory bandwidth that memory-bound kernels reach. STREAM-like kernels reach 0.8 to 0.9.
        traffic: Bytes that norms, residuals and activations move, relative to perfectly fused kernels. Fitted.
        depth: Steps along the inner dimension that a tile loses to its start and end.
        wave: Share of the last, partly filled wave of tiles that is lost. Fitted.
        blend: Order of the mean of host and device time: infinite if the slower of both hides the other, 1 if nothing
            overlaps. A queue of launches a few kernels deep.
        host_block_s: Seconds that the host needs to launch one pass of one block. Fitted.
        host_experts_s: The same of a block with experts: routing, sorting and exchanges wait for token counts. Fitted.
        host_step_s: Seconds of the host per optimizer step: loss, gradient norm, optimizer launches. Fitted.
        start_s: Seconds until the ranks of a collective have met and its kernel runs. With 2 us per hop it gives the
            80 us that an all-reduce of 1 MB takes on 8 A100 (20 GB/s; VIA-Research/vTrain, trace).
        skew_s: Seconds per rank that tensor-parallel ranks wait for each other at a collective under DeepSpeed. Fitted.
        intra: Share of the link bandwidth inside a domain: 229 of 300 GB/s on 8 A100 (the same trace).
        inter: Share of the link bandwidth between nodes that messages get.
        ring: Share of that that rings over nodes keep (NCCL's own figures are 0.8 to 0.9).
        buckets: Share of the rings' speed that DeepSpeed's reduction in buckets keeps. Fitted.
        tp_exposed: Share of tensor-parallel communication that nothing hides.
        p2p_exposed: Share of the messages between pipeline stages that nothing hides.
        ep_exposed: Share of the exchanges between experts that nothing hides.
        ep_once: A token crosses to another node once, however many of its experts live there (deepseek-ai/DeepEP).
        dp_exposed: Share of data-parallel communication that nothing hides. Fitted where there is overlap.
        dp_overlap: Data-parallel communication runs under computation.
        fused_gradients: Products add their result to the gradients themselves (``gradient_accumulation_fusion``).
        early_stop: Recomputation stops at the last tensor that was saved, so it skips the block's last product
            (PyTorch's non-reentrant checkpointing, ``set_checkpoint_early_stop``).
        low: Logarithm of (measured / predicted) at the lower end of the 90 % band.
        high: The same at the upper end.
        warnings: Why this calibration may not apply.
    """

    device: str = "generic"
    framework: Framework = "megatron"
    precision: str = "16"
    linear: float = 0.6
    half: float = 0.6
    batched: float = 0.5
    flash: float = 0.3
    bandwidth: float = 0.8
    traffic: float = 1.4
    depth: float = 64.0
    wave: float = 0.1
    blend: float = 4.0
    host_block_s: float = 0.001
    host_experts_s: float = 0.005
    host_step_s: float = 0.005
    start_s: float = 5e-5
    skew_s: float = 0.0
    intra: float = 0.76
    inter: float = 0.85
    ring: float = 0.8
    buckets: float = 1.0
    tp_exposed: float = 1.0
    p2p_exposed: float = 1.0
    ep_exposed: float = 1.0
    ep_once: bool = False
    dp_exposed: float = 1.0
    dp_overlap: bool = False
    fused_gradients: bool = False
    early_stop: bool = False
    low: float = -0.4
    high: float = 0.4
    warnings: tuple[str, ...] = ()


STRUCTURE: Mapping[Framework, Mapping[str, Any]] = {
    "megatron": {},
    "fsdp": {
        "dp_overlap": True,
        "early_stop": True,
        "ep_exposed": 0.5,
        "ep_once": True,
        "p2p_exposed": 0.3,
    },
    "mcore": {
        "dp_overlap": True,
        "ep_exposed": 0.5,
        "ep_once": True,
        "p2p_exposed": 0.3,
        "tp_exposed": 0.5,
        "dp_exposed": 0.2,
        "fused_gradients": True,
        "traffic": 1.0,
        "flash": 0.45,
    },
}
"""What follows from how a framework works. Megatron-Core overlaps parts of its tensor-parallel collectives with work
(``--tp-comm-overlap``), of its exchanges and of its pipeline messages too, and uses cuDNN's attention with
fused kernels (FlashAttention-3, arXiv 2407.08608: about half of peak, forward and backward, causal)."""

_GENERATIONS = {
    "A800": "A100",
    "H800": "H100",
    "H200": "H100",
    "H20": "H100",
    "GH200": "H100",
    "GB200": "B200",
    "B300": "B200",
    "GB300": "B200",
}
"""Devices whose processors are those of another one."""

_RELATIVES = {"V100": "A100", "B200": "H100", "H100": "A100", "A100": "H100"}


def generation(device: str) -> str:
    """``A100`` of ``A100-80GB``."""
    name = device.split("-")[0].upper()
    return _GENERATIONS.get(name, name)


def width_of(precision: Precision) -> str:
    """``fp8``, or ``16`` for all wider ones: their products are calibrated together."""
    return "fp8" if precision == "fp8" else "16"


def lookup(work: Workload) -> Calibration:
    """The calibration of a workload; without one of its own, that of the nearest relative, with a warning."""
    device, width = generation(work.cluster.device), width_of(work.precision)
    made = assemble(device, work.framework, width, calibrated.CONSTANTS)
    key = (device, work.framework, width)
    runs = calibrated.RUNS.get(key, 0)
    warnings = [] if runs else [f"no published run of {device} with {work.framework} in {_words(work)} to calibrate on"]
    if work.precision == "fp32":
        warnings.append("fp32 is calibrated like 16-bit arithmetic")
    kind = "experts" if work.model.moe is not None else work.framework
    low, high = calibrated.BANDS[kind if runs >= _FEW or kind == "experts" else "new"]
    made = _capped(made, work.cluster.device)
    if work.hardware.measured:
        made = _of_measured(made)
    return _with(made, low=low, high=high, warnings=tuple(warnings))


BEST: Mapping[str, float] = {
    "A100": 271 / 312,
    "H100": 795 / 989,
    "H200": 795 / 989,
    "B200": 1745 / 2250,
    "GB200": 1822 / 2500,
    "MI300X": 668 / 1300,
}
"""Share of the 16-bit peak that the best measured matmul of any shape reaches (stas00/ml-engineering,
compute/accelerator, "Maximum Achievable Matmul FLOPS"). It bounds fp8, of which less was measured, too."""


def _capped(made: Calibration, device: str) -> Calibration:
    """No product is faster than the best that was measured on the device, whatever its relatives reach."""
    name = device.split("-")[0].upper()
    best = BEST.get(name, BEST.get(generation(device), 1.0))
    return _with(made, **{share: min(best, getattr(made, share)) for share in ("linear", "half", "batched", "flash")})


def _of_measured(made: Calibration) -> Calibration:
    """Shares of measured figures: all of a rate; of attention, what it reaches of the best products.

    On CPUs the host is the device: nobody waits for its launches.
    """
    shares = dict.fromkeys(("linear", "half", "bandwidth", "intra", "inter", "ring"), 1.0)
    shares |= {name: min(1.0, getattr(made, name) / made.half) for name in ("batched", "flash")}
    if made.device == "CPU":
        shares |= dict.fromkeys(("host_block_s", "host_experts_s", "host_step_s", "start_s", "skew_s"), 0.0)
    return _with(made, **shares)


_FEW = 8
"""Runs of a device with a framework below which its predictions get the band of new devices."""


def _words(work: Workload) -> str:
    return "fp8" if work.precision == "fp8" else "16 bit"


def assemble(device: str, framework: Framework, width: str, constants: Iterable[Constant]) -> Calibration:
    """A calibration from constants: for every field the most special one that applies, or that of a relative."""
    known = STRUCTURE[framework]
    fields: dict[str, Any] = dict(known)
    ranks: dict[str, float] = {}
    for constant in constants:
        if constant.field in known and constant.framework not in (framework, "*"):
            continue  # what is known of a framework beats what another one was fitted to
        rank = _rank(constant, device, framework, width)
        if rank > ranks.get(constant.field, 0.0):
            fields[constant.field], ranks[constant.field] = constant.value, rank
    if width == "16":
        fields["half"] = fields.get("linear", Calibration.__dataclass_fields__["half"].default)
    else:
        fields["half"] = assemble(device, framework, "16", constants).linear
    return Calibration(device=device, framework=framework, precision=width, **fields)


def _rank(constant: Constant, device: str, framework: Framework, width: str) -> float:
    """How well a constant applies; 0 if it does not."""
    relative = _RELATIVES.get(device, "A100")
    on = {device: 8.0, "*": 4.0, relative: 2.0}.get(constant.device, 1.0)
    arithmetic = {width: 0.8, "*": 0.4}.get(constant.precision, 0.0)
    family = {framework: 0.08, "*": 0.04}.get(constant.framework, 0.0)
    if not arithmetic and constant.device != device:
        return 0.0
    if not family and constant.field not in ("linear", "flash"):
        return 0.0  # only what the device does is the same under other frameworks
    return on + family + arithmetic


def _with(made: Calibration, **changes: Any) -> Calibration:
    values = {name: getattr(made, name) for name in made.__dataclass_fields__}
    return Calibration(**(values | changes))


def band(
    calibration: Calibration, work: Workload, plan: ParallelPlan, step_s: float
) -> tuple[float, float, tuple[str, ...]]:
    """The 90 % band around a predicted step, and warnings: what lies outside of the runs that were fitted.

    Ways to cut a model that few or no fitted runs used get at least the band of new devices.
    """
    rare = list(_rare(work, plan))
    found = [*calibration.warnings, *rare]
    bottom, top = calibration.low, calibration.high
    if rare:
        bottom, top = min(bottom, calibrated.BANDS["new"][0]), max(top, calibrated.BANDS["new"][1])
    limits = calibrated.RANGES.get(calibration.framework, {})
    values = {
        "hidden": float(work.model.hidden),
        "sequence": float(work.batch.seq),
        "devices": float(plan.world_size),
        "tokens of a micro-batch": float(plan.micro_batch * work.batch.seq),
    }
    for name, value in values.items():
        low, high = limits.get(name, (0.0, math.inf))
        if not low <= value <= high:
            found.append(f"{name} {value:,.0f} is outside of the calibrated {low:,.0f} to {high:,.0f}")
    return step_s * math.exp(bottom), step_s * math.exp(top), tuple(found)


def _rare(work: Workload, plan: ParallelPlan) -> Iterator[str]:
    """Degrees of a plan about which the fitted runs say little."""
    domain = work.hardware.intra_domain or work.cluster.slots_per_node
    if plan.tp > domain:
        yield f"tp={plan.tp} leaves the {domain} devices of a fast domain: no fitted run has that"
    if plan.ep > 1:
        yield f"ep={plan.ep}: only {EXPERT_RUNS} fitted runs have expert parallelism"
    if plan.sp > 1:
        yield f"sp={plan.sp}: no fitted run has sequence parallelism"
    if plan.cp > 1:
        yield f"cp={plan.cp}: only {CONTEXT_RUNS} fitted runs have context parallelism"


EXPERT_RUNS, CONTEXT_RUNS = 7, 4
"""Fitted runs with ep > 1 and with cp > 1."""


def device_of(work: Workload, calibration: Calibration) -> Device:
    """The device as programs of this calibration get it."""
    hardware = work.hardware
    half = hardware.flops_fp32 if work.precision == "fp32" else hardware.flops_16
    fp8 = work.precision == "fp8" and hardware.flops_fp8 > 0
    return Device(
        linear=(hardware.flops_fp8 if fp8 else half) * (calibration.linear if fp8 else calibration.half),
        half=half * calibration.half,
        batched=half * calibration.batched,
        flash=half * calibration.flash,
        bandwidth=hardware.memory_bandwidth * calibration.bandwidth,
        processors=hardware.processors,
        depth=calibration.depth,
        wave=calibration.wave,
        itemsize=1.0 if fp8 else 4.0 if work.precision == "fp32" else 2.0,
    )


def network_of(work: Workload, calibration: Calibration) -> Network:
    """The links as programs of this calibration get them."""
    hardware = work.hardware
    return Network(
        intra=Link(hardware.intra_bandwidth * calibration.intra, hardware.intra_latency_s),
        inter=Link(hardware.inter_bandwidth * calibration.inter, hardware.inter_latency_s),
        domain=hardware.intra_domain or work.cluster.slots_per_node,
        start_s=calibration.start_s,
        ring=calibration.ring,
    )

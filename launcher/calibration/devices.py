"""Accelerators by the name that tables of published runs give them: figures of data sheets, one table.

Peaks are dense. Peaks, memory and links of NVIDIA's and AMD's parts are those that stas00/ml-engineering collects
(compute/accelerator/README.md, network/README.md); V100 and A100-40GB those of cli99/llm-analysis (gpu_configs). TPU v4
is arXiv 2304.01433. A bandwidth between nodes is what the usual machine gives one device; a published run often says
what it really had, and then :mod:`launcher.calibration.facts` replaces the figure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from strategies.hardware import Hardware

TERA, GIGA = 1e12, 1e9

USABLE = 0.99
"""Part of the marketed gibibytes that CUDA reports as total: 79.2 of 80 (A100, H100), 139.8 of 141 (H200)."""

_INTRA_LATENCY_S = 2.0e-6  # NCCL's base latency of one NVLink hop, of its tuning table rounded
_INTER_LATENCY_S = 5.0e-6  # the same of one InfiniBand hop


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator.

    Attributes:
        key: Name that is stable for calibration, for example ``A100-80GB``.
        memory_bytes: What a program finds of its memory.
        hardware: Speeds of the device and of the usual machine around it.
        stated: Figures that were taken from the row instead of from the table, in words.
    """

    key: str
    memory_bytes: int
    hardware: Hardware
    stated: tuple[str, ...] = ()


def _device(
    peaks: tuple[float, float, float],
    memory: tuple[int, float],
    links: tuple[float, float, float],
    processors: int,
    *,
    bf16: bool = True,
    domain: int = 0,
    latencies: tuple[float, float] = (_INTRA_LATENCY_S, _INTER_LATENCY_S),
) -> tuple[int, Hardware]:
    """Gigabytes and figures.

    ``peaks`` in TFLOP/s: fp32 (TF32 on tensor cores), 16 bit, fp8; ``memory`` in GB and TB/s; ``links`` in GB/s: inside
    the domain, to other nodes, to the host; ``latencies`` of the first two links in seconds.
    """
    hardware = Hardware(
        flops_fp32=peaks[0] * TERA,
        flops_16=peaks[1] * TERA,
        flops_fp8=peaks[2] * TERA,
        bf16=bf16,
        processors=processors,
        memory_bandwidth=memory[1] * TERA,
        intra_bandwidth=links[0] * GIGA,
        intra_latency_s=latencies[0],
        intra_domain=domain,
        inter_bandwidth=links[1] * GIGA,
        inter_latency_s=latencies[1],
        host_bandwidth=links[2] * GIGA,
    )
    return memory[0], hardware


DEVICES: dict[str, tuple[int, Hardware]] = {
    "V100-16GB": _device((15.7, 125, 0), (16, 0.9), (150, 6.25, 16), 80, bf16=False),
    "V100-32GB": _device((15.7, 125, 0), (32, 0.9), (150, 6.25, 16), 80, bf16=False),
    "A100-40GB": _device((156, 312, 0), (40, 1.555), (300, 25, 32), 108),
    "A100-80GB": _device((156, 312, 0), (80, 2.0), (300, 25, 32), 108),
    "A800-80GB": _device((156, 312, 0), (80, 2.0), (200, 25, 32), 108),
    "H100-80GB": _device((494, 989, 1979), (80, 3.35), (450, 50, 64), 132),
    "H800-80GB": _device((494, 989, 1979), (80, 3.35), (200, 50, 64), 132),
    "H200": _device((494, 989, 1979), (141, 4.8), (450, 50, 64), 132),
    "B200": _device((1125, 2250, 4500), (180, 8.0), (900, 50, 64), 148),
    "B300": _device((1125, 2250, 4500), (288, 8.0), (900, 100, 64), 148),
    "GB200": _device((1250, 2500, 5000), (186, 8.0), (900, 50, 225), 152, domain=72),
    "GB300": _device((1250, 2500, 5000), (288, 8.0), (900, 100, 225), 152, domain=72),
    "MI300X": _device((653.7, 1300, 2610), (192, 5.3), (448, 50, 64), 304),
    "TPUv4": _device((46, 275, 0), (32, 1.2), (270, 6.25, 16), 8, domain=4096, latencies=(1e-6, 1e-5)),
}
"""Marketed gigabytes and figures by calibration key."""

CARDS_PER_NODE = {"V100-16GB": (4, 12.5 * GIGA), "V100-32GB": (4, 12.5 * GIGA)}
"""Network cards of a node, and bytes per second of one, where the usual machine has fewer cards than devices."""


def shared_network(key: str, devices_per_node: int) -> float | None:
    """What one device gets of its node's cards, where they are shared; None where every device has its own."""
    if key not in CARDS_PER_NODE:
        return None
    cards, speed = CARDS_PER_NODE[key]
    return min(1.0, cards / devices_per_node) * speed


_NAME = re.compile(r"(?<![A-Za-z0-9])(GB300|GB200|B300|B200|H200|H100|H800|A100|A800|V100|MI300X|TPU[ -]?v4)", re.I)
_SIZE = re.compile(r"(\d+) ?GB(?![/p]?s)\b", re.I)
_MEMORY_SPEED = re.compile(r"([\d.]+) ?TB/s", re.I)


def find_device(text: str) -> Device | None:
    """The device that a table calls ``text``, or None.

    A size, a memory bandwidth (``2.4 TB/s``) or ``PCIe`` in the text are facts and replace the figures of the table.
    """
    name, size = _NAME.search(text), _SIZE.search(text)
    if name is None:
        return None
    base = "TPUv4" if name[1].upper().startswith("TPU") else name[1].upper()
    gigabytes = int(size[1]) if size else 0
    key = base if base in DEVICES else f"{base}-{gigabytes}GB"
    usual = key if key in DEVICES else max(known for known in DEVICES if known.startswith(f"{base}-"))
    default, hardware = DEVICES[usual]
    if not gigabytes:
        key = usual
    stated = [f"{gigabytes} GB"] if gigabytes and gigabytes != default else []
    speed = _MEMORY_SPEED.search(text)
    if speed:
        hardware = replace(hardware, memory_bandwidth=float(speed[1]) * TERA)
        stated.append(f"memory at {speed[1]} TB/s")
    if re.search(r"\bPCI-?e\b", text, re.I):
        hardware = replace(hardware, intra_bandwidth=hardware.host_bandwidth)
        stated.append("PCIe between devices")
    memory = int((gigabytes or default) * USABLE * 2**30)
    return Device(key=key, memory_bytes=memory, hardware=hardware, stated=tuple(stated))

"""Rules about what the devices can do and about figures of the hardware that no machine has."""

from __future__ import annotations

from strategies.cases import Case, Rule
from strategies.errors import Violation
from strategies.hardware import FROM_ZERO

_RATES = (
    "flops_fp32",
    "flops_16",
    "memory_bandwidth",
    "intra_bandwidth",
    "inter_bandwidth",
    "host_bandwidth",
    "disk_bandwidth",
    "storage_bandwidth",
    "processors",
)


def hardware_has_speeds(case: Case) -> Violation | None:
    """Rates are positive and the other figures not negative; without them no time can be predicted."""
    hardware = None if case.cluster is None else case.cluster.hardware
    if hardware is None:
        return None
    slow = [name for name in _RATES if not getattr(hardware, name) > 0]
    negative = [name for name in FROM_ZERO if not getattr(hardware, name) >= 0]
    if not slow and not negative:
        return None
    found = ", ".join(f"{name} {getattr(hardware, name):g}" for name in (*slow, *negative))
    hints = [f"cluster.hardware.{name} more than 0" for name in slow]
    hints += [f"cluster.hardware.{name}=0 or more" for name in negative]
    return Violation(rule="hardware_has_speeds", message=f"the hardware has {found}", hint="; ".join(hints))


def precision_supported(case: Case) -> Violation | None:
    """The devices have the arithmetic; fp32 they all have."""
    hardware = None if case.cluster is None else case.cluster.hardware
    if hardware is None or case.cluster is None:
        return None
    if case.precision == "bf16" and not hardware.bf16:
        better = "fp16"
    elif case.precision == "fp8" and not hardware.flops_fp8 > 0:
        better = "bf16" if hardware.bf16 else "fp16"
    else:
        return None
    return Violation(
        rule="precision_supported",
        message=f"devices of kind {case.cluster.device} have no {case.precision}",
        hint=f"train.precision={better}, or fp32",
    )


HARDWARE_RULES: tuple[Rule, ...] = (hardware_has_speeds, precision_supported)
"""In the order in which they are reported."""

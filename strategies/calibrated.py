"""Fitted constants: data that ``python -m launcher.calibration.fit --write`` writes, never typed."""

from __future__ import annotations

from typing import NamedTuple


class Constant(NamedTuple):
    """One fitted constant; ``*`` stands for any.

    Attributes:
        field: Attribute of :class:`strategies.calibration.Calibration`.
        device: Generation of devices.
        framework: Framework family.
        precision: ``16`` or ``fp8``.
        value: The fit.
        least: Lower end of the range that physics allows.
        most: Upper end.
    """

    field: str
    device: str
    framework: str
    precision: str
    value: float
    least: float
    most: float


# --- written by python -m launcher.calibration.fit --write ---
ROWS = 303
CONSTANTS: tuple[Constant, ...] = (
    Constant("linear", "V100", "*", "16", 0.6718, 0.4, 0.95),
    Constant("linear", "A100", "*", "16", 0.7904, 0.5, 0.9),
    Constant("linear", "H100", "*", "16", 0.6396, 0.35, 0.85),
    Constant("linear", "H100", "fsdp", "fp8", 0.5322, 0.2, 0.8),
    Constant("linear", "H100", "mcore", "fp8", 0.6664, 0.2, 0.8),
    Constant("linear", "B200", "*", "fp8", 0.6271, 0.2, 0.85),
    Constant("batched", "*", "*", "*", 0.5509, 0.15, 0.9),
    Constant("flash", "A100", "fsdp", "*", 0.3237, 0.15, 0.7),
    Constant("flash", "H100", "fsdp", "*", 0.1827, 0.1, 0.7),
    Constant("traffic", "*", "megatron", "*", 1.397, 0.8, 5.0),
    Constant("traffic", "*", "fsdp", "*", 1.879, 0.8, 5.0),
    Constant("host_block_s", "*", "megatron", "*", 0.001084, 0.0002, 0.004),
    Constant("skew_s", "*", "megatron", "*", 0.0001799, 1e-05, 0.001),
    Constant("host_step_s", "*", "megatron", "*", 0.005828, 0.001, 0.05),
    Constant("host_experts_s", "*", "*", "*", 0.005733, 0.0005, 0.02),
    Constant("wave", "*", "*", "*", 0.09866, 0.02, 1.0),
    Constant("buckets", "*", "megatron", "*", 0.5501, 0.15, 1.0),
    Constant("dp_exposed", "*", "fsdp", "*", 0.5208, 0.02, 1.0),
)
RUNS: dict[tuple[str, str, str], int] = {
    ("A100", "fsdp", "16"): 65,
    ("A100", "megatron", "16"): 165,
    ("B200", "mcore", "fp8"): 3,
    ("H100", "fsdp", "16"): 38,
    ("H100", "fsdp", "fp8"): 16,
    ("H100", "mcore", "16"): 2,
    ("H100", "mcore", "fp8"): 5,
    ("V100", "megatron", "16"): 9,
}
BANDS: dict[str, tuple[float, float]] = {
    "experts": (-0.4755, 0.4755),
    "fsdp": (-0.2141, 0.1994),
    "mcore": (-0.3000, 0.3000),
    "megatron": (-0.1705, 0.1167),
    "new": (-0.4755, 0.4755),
}
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "fsdp": {
        "hidden": (2048.0, 16384.0),
        "sequence": (512.0, 262144.0),
        "devices": (8.0, 512.0),
        "tokens of a micro-batch": (4096.0, 262144.0),
    },
    "mcore": {
        "hidden": (2048.0, 16384.0),
        "sequence": (4096.0, 8192.0),
        "devices": (8.0, 256.0),
        "tokens of a micro-batch": (4096.0, 8192.0),
    },
    "megatron": {
        "hidden": (1024.0, 25600.0),
        "sequence": (1024.0, 2048.0),
        "devices": (2.0, 3072.0),
        "tokens of a micro-batch": (1024.0, 32768.0),
    },
}
ERRORS: dict[str, tuple[float, float]] = {
    "seen": (0.0568, 0.0379),
    "family left out": (0.0784, 0.0563),
    "tenth left out": (0.0606, 0.0416),
}

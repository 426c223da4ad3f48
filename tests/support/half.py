"""Arithmetic in fp16 for the ranks of tests, whatever the CPU."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator


def compute_half_on_any_cpu() -> None:
    """Let DeepSpeed train in fp16 on a CPU without instructions for it; elsewhere nothing changes.

    DeepSpeed asks oneDNN, which has fast kernels on new CPUs only; torch itself computes fp16 on every CPU, slowly, and
    loss scales, overflows and their checkpoints are then what they are anywhere.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu" and not accelerator.is_fp16_supported():
        accelerator.is_fp16_supported = lambda: True

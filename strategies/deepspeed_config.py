"""From a plan and a recipe to DeepSpeed's config dictionary: the only place that knows DeepSpeed's key names.

Everything that changes results is written out, so that no default of DeepSpeed decides (gradient clipping is 1.0 unless
told otherwise). The learning rate is DeepSpeed's ``WarmupCosineLR``. That scheduler's own counter starts two calls late
(it hands the first step a rate of 0), so the engine positions it: **before optimizer step n, the scheduler stands at
iteration n** (``ds.lr_scheduler.step(n)``). The rate is then a pure function of the step, :func:`learning_rate`, also
after a restore and after steps that fp16 skipped.
"""

from __future__ import annotations

import math
from typing import Any

from strategies.plan import ParallelPlan
from strategies.specs import Precision

PERSISTENCE_THRESHOLD = 100_000
"""ZeRO-3 keeps tensors of at most so many elements whole on every rank (DeepSpeed's own default, made explicit)."""

_BUCKET_ELEMENTS = (
    50_000_000  # of gradients per collective; stage 3 allocates it up front, so DeepSpeed's 5e8 is too much
)
_SUB_GROUP_ELEMENTS = 100_000_000  # of optimizer state on disks per turn; four buffers of so many fp32 stay in memory
_NEVER = 1_000_000_000  # steps between DeepSpeed's own progress lines


def deepspeed_config(
    *,
    plan: ParallelPlan,
    precision: Precision,
    clip: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    warmup_steps: int,
    steps: float,
    min_lr: float,
) -> dict[str, Any]:
    """DeepSpeed's config for one plan; plain JSON values, a pure function of its arguments.

    Args:
        plan: A legal plan.
        precision: Arithmetic of forward and backward.
        clip: Largest global gradient norm; 0 switches clipping off.
        lr: Peak learning rate.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        weight_decay: AdamW's decay, on every parameter.
        warmup_steps: Steps of linear warm-up; where the batch grows, full batches.
        steps: Optimizer steps of the whole run; where the batch grows, full batches.
        min_lr: Learning rate at step ``steps``.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.grad_accum,
        "gradient_clipping": clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": lr,
                "betas": list(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "adam_w_mode": True,
                "torch_adam": True,  # torch's own AdamW: no compiled op, the same on every accelerator
                "fused": True,  # one pass over the state instead of a dozen
            },
        },
        "scheduler": {"type": "WarmupCosineLR", "params": _cosine(lr, min_lr, warmup_steps, steps)},
        "zero_optimization": _zero(plan.zero_stage, bool(plan.offload_path)) | _offload(plan),
        "data_types": {"grad_accum_dtype": plan.grad_dtype},
        "communication_data_type": plan.grad_dtype,  # sums over replicas are as precise as sums over micro-batches
        "prescale_gradients": False,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
    }
    if precision != "fp32":
        config[precision] = _PRECISION_SECTIONS[precision].copy()
    if plan.offload != "none":
        config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW also there: no compiled op, the same numbers
    if plan.pp > 1:
        # DeepSpeed's default cuts activations and their gradients over the tensor-parallel ranks on the wire; our
        # layers hand over whole tensors, and DualPipeV refuses anything else.
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False, "seed_layers": False}
    return config


_PRECISION_SECTIONS: dict[Precision, dict[str, Any]] = {
    "bf16": {"enabled": True},
    "fp16": {
        "enabled": True,
        "loss_scale": 0,  # dynamic
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
}


def _zero(stage: int, disks: bool) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": stage}
    if stage > 0:
        section |= {
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "round_robin_gradients": False,
            "overlap_comm": stage == 3,
        }
    if stage == 3:
        section |= {
            "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
            "stage3_prefetch_bucket_size": _BUCKET_ELEMENTS,
        }
        if disks:
            section["sub_group_size"] = _SUB_GROUP_ELEMENTS
    return section


def _offload(plan: ParallelPlan) -> dict[str, Any]:
    """Where state lives beside the device: nothing is said of what stays on it.

    Not in pinned memory: DeepSpeed compiles an op for that on first use, and a rank killed meanwhile leaves a lock that
    hangs every later start.
    """
    place: dict[str, Any] = {"device": "cpu", "pin_memory": False}
    if plan.offload_path:
        place = {"device": "nvme", "nvme_path": plan.offload_path, "pin_memory": False}
    kinds = {"none": (), "optimizer": ("optimizer",), "optimizer+params": ("optimizer", "param")}[plan.offload]
    section: dict[str, Any] = {f"offload_{kind}": place.copy() for kind in kinds}
    if plan.offload_path and "param" in kinds:
        section["offload_param"]["max_in_cpu"] = 0  # else the first 1e9 parameters would stay in memory all the same
        # DeepSpeed reads ahead a parameter twice whose forward and backward are near (the last block's), and stops on
        # "param 32 already assigned swap buffer id 1"
        section["stage3_prefetch_bucket_size"] = 0
    return section


def _cosine(lr: float, min_lr: float, warmup_steps: int, steps: float) -> dict[str, Any]:
    return {
        # DeepSpeed's cosine reaches its floor one iteration before total_num_steps; step ``steps`` shall have min_lr.
        "total_num_steps": steps + 1,
        # It cannot warm up in fewer than 2 iterations; a ratio that starts at 1 makes those two a plateau.
        "warmup_num_steps": max(2, warmup_steps),
        "warmup_min_ratio": 0.0 if warmup_steps > 1 else 1.0,
        "warmup_type": "linear",
        "cos_min_ratio": min_lr / lr if lr else 0.0,
    }


def learning_rate(step: float, *, lr: float, min_lr: float, warmup_steps: int, steps: float) -> float:
    """The rate of optimizer step ``step`` (counted from 1), as DeepSpeed computes it, to the last bit.

    Where the batch grows, ``step`` and ``steps`` are full batches (:func:`strategies.schedule.full_batches`).

    Linear from ``lr / warmup_steps`` up to step ``warmup_steps - 1``, then a cosine that ends at ``min_lr`` at step
    ``steps``. DeepSpeed's cosine starts one notch below the peak when there is a warm-up; without one (0 or 1 steps),
    step 1 has ``lr`` exactly.
    """
    warmup = max(2, warmup_steps)
    if step < warmup:
        start = 0.0 if warmup_steps > 1 else 1.0
        return lr * (start + step / warmup * (1.0 - start))
    floor = min_lr / lr if lr else 0.0
    progress = min(1.0, (step - warmup + 1) / max(1, steps + 1 - warmup))
    return lr * max(0.0, floor + (1.0 - floor) * ((1 + math.cos(math.pi * progress)) / 2))

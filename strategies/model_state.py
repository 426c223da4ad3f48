"""Bytes of model state per rank: what it keeps from one step to the next and while it accumulates.

Weights, gradients and optimizer state, without activations and communication buffers. The sizes are those of the
DeepSpeed optimizers that run:

===================== ===================================== ========== ================ =====================
ZeRO, precision       DeepSpeed's optimizer                 weights    gradients        optimizer
===================== ===================================== ========== ================ =====================
0, fp32               torch AdamW                           4 n        4 n              8 n
0, bf16/fp16          FP16_UnfusedOptimizer                 2 n        g n              12 n
0, bf16, pipeline     BF16_Optimizer (cuts over replicas)   2 n        g n              12 n / dp
1                     DeepSpeedZeroOptimizer,               w n        g n              12 n / dp
                      BF16_Optimizer (fp32 accumulation)
2                     DeepSpeedZeroOptimizer                w n        g n / dp         12 n / dp
3                     DeepSpeedZeroOptimizer_Stage3         w n / dp   g n / dp         12 n / dp
===================== ===================================== ========== ================ =====================

with n the parameters of this rank after tensor parallelism, w and g the bytes of a weight and of a gradient. ZeRO keeps
an fp32 copy of the weights even in fp32. ZeRO-3 also keeps small tensors whole. Experts are cut over the replicas that
hold the same experts. Two families differ:

- ``mcore`` pads nothing and keeps nothing whole; its distributed optimizer is ZeRO-1: 6 + 12 / d bytes per parameter
  (Megatron-Core's developer guide, "Distributed Optimizer").
- ``fsdp`` trains fp32 weights (no other master copy) and gathers them in 16 bit: 4, 4 and 8 bytes, all over d.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from strategies.counts import Count, expert_blocks, expert_parallel, model_count, stage_count
from strategies.deepspeed_config import PERSISTENCE_THRESHOLD
from strategies.plan import GradDtype, ParallelPlan
from strategies.specs import ModelSpec, Precision
from strategies.tensors import TensorSpec, block_tensors, embedding_tensors, head_tensors, padded
from strategies.workload import Framework

DTYPE_BYTES: dict[Precision | GradDtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
"""Bytes of one number; fp8 multiplies in fp8 and stores in bf16."""

_MOMENTS_BYTES = 8
_MASTER_BYTES = 4
_ALIGNMENT = 2  # ZeRO pads its flat buffers to a multiple of this many elements per replica


class State(NamedTuple):
    """Bytes of model state of one rank.

    Attributes:
        weights: Weights.
        gradients: Gradients that wait for the optimizer.
        optimizer: Moments and master copy.
    """

    weights: int
    gradients: int
    optimizer: int


def model_state_bytes(
    model: ModelSpec, plan: ParallelPlan, precision: Precision, framework: Framework = "megatron"
) -> tuple[dict[str, int], ...]:
    """Bytes of model state of one rank, per pipeline stage; all ranks of a stage hold the same amount.

    What is offloaded is counted too: this says how much there is, not where it lies.

    Args:
        model: The model.
        plan: A legal plan.
        precision: Arithmetic of forward and backward.
        framework: Family of the training code.

    Returns:
        Per stage, bytes by kind: ``weights``, ``gradients``, ``optimizer``, and their sum ``total``.
    """
    stages = []
    for stage in range(len(plan.stages)):
        state = stage_state(model, plan, precision, framework, stage, stage_count(model, plan, stage))
        stages.append(state._asdict() | {"total": sum(state)})
    return tuple(stages)


def stage_state(
    model: ModelSpec, plan: ParallelPlan, precision: Precision, framework: Framework, stage: int, count: Count
) -> State:
    """Bytes of model state of one rank of a stage, which computes with ``count`` parameters."""
    if framework != "megatron":
        groups = zip(count, replicas(plan), strict=True)
        return _total(_plain(number, plan, precision, framework, over) for number, over in groups)
    weight, gradient = DTYPE_BYTES[precision], DTYPE_BYTES[plan.grad_dtype]
    optimizer = _MOMENTS_BYTES + (_MASTER_BYTES if plan.zero_stage > 0 or precision != "fp32" else 0)
    held = _held_whole(model, plan, stage) if plan.zero_stage == 3 else _held_flat(count, plan, precision)
    return _total(State(w * weight, g * gradient, o * optimizer) for w, g, o in held)


def replicas(plan: ParallelPlan) -> tuple[int, int]:
    """Ranks with the same weights: of everything but experts, and of the experts."""
    ranks = max(1, plan.dp * plan.sp * plan.cp)
    return ranks, max(1, ranks // expert_parallel(plan))


def owned_parameters(plan: ParallelPlan, weights: float, experts: float) -> float:
    """Of how many of a rank's ``weights``, ``experts`` of them of experts, it has the optimizer state."""
    if not plan.zero_stage:
        return weights
    ranks, sharing = replicas(plan)
    return weights / ranks + experts * (1.0 / sharing - 1.0 / ranks)


def _total(states: Iterable[State]) -> State:
    return State(*(sum(kind) for kind in zip(*states, strict=True)))


def _plain(count: int, plan: ParallelPlan, precision: Precision, framework: Framework, over: int) -> State:
    """State of ``count`` parameters cut over ``over`` ranks, with neither padding nor exceptions."""
    stage, share = plan.zero_stage, -(-count // over)
    if framework == "fsdp" or precision == "fp32":
        weight, gradient, optimizer = 4, 4, _MOMENTS_BYTES
    else:
        weight, gradient = DTYPE_BYTES[precision], DTYPE_BYTES[plan.grad_dtype]
        optimizer = _MOMENTS_BYTES + _MASTER_BYTES
    return State(
        (share if stage >= 3 else count) * weight,
        (share if stage >= 2 else count) * gradient,
        (share if stage >= 1 else count) * optimizer,
    )


def _held_flat(counted: Count, plan: ParallelPlan, precision: Precision) -> list[tuple[int, int, int]]:
    """Elements of weights, gradients and optimizer state of DeepSpeed's flat buffers, for dense and expert groups."""
    held = []
    for count, over in zip(counted, replicas(plan), strict=True):
        flat = padded(count, _ALIGNMENT * over)
        share = flat // over
        if plan.zero_stage == 2:
            held.append((flat, share, share))
        elif plan.zero_stage == 1:
            held.append((flat, flat if precision == "bf16" and plan.grad_dtype == "fp32" else count, share))
        elif precision == "bf16" and plan.pp > 1:
            held.append((flat, flat, share))
        else:
            held.append((count, count, count))
    return held


def _held_whole(model: ModelSpec, plan: ParallelPlan, stage: int) -> list[tuple[int, int, int]]:
    """The same for ZeRO-3, which cuts tensor by tensor and keeps small ones whole."""
    held, ep = [], expert_parallel(plan)
    tensors = [(times, one.expert, one.local_numel(plan.tp, ep)) for times, one in _counted(model, plan, stage)]
    for expert, over in zip((False, True), replicas(plan), strict=True):
        sizes = [(times, size) for times, kind, size in tensors if kind == expert]
        share = sum(times * -(-size // over) for times, size in sizes)
        small = sum(times * padded(size, over) for times, size in sizes if size <= PERSISTENCE_THRESHOLD)
        held.append((share + small, share, share))
    return held


def _counted(model: ModelSpec, plan: ParallelPlan, stage: int) -> Iterator[tuple[int, TensorSpec]]:
    """The tensors of a stage, those of equal blocks once with their number."""
    mixed = expert_blocks(model, plan, stage)
    for times, dense in ((plan.stages[stage] - mixed, True), (mixed, False)):
        if times:
            yield from ((times, tensor) for tensor in block_tensors(model, "block", dense=dense))
    if stage == 0:
        yield from ((1, tensor) for tensor in embedding_tensors(model))
    yield from ((1, tensor) for tensor in head_tensors(model, plan, stage))


def least_state(
    model: ModelSpec,
    precision: Precision,
    framework: Framework,
    tp: int,
    ep: int,
    ranks: int,
    zero_stage: int,
    grad_dtype: GradDtype | None,
) -> State:
    """Bytes of the state of the whole model on the ranks of one shard, at least; in floating point, without padding.

    Args:
        model: The model.
        precision: Arithmetic of forward and backward.
        framework: Family of the training code.
        tp: Tensor-parallel degree.
        ep: Expert-parallel degree.
        ranks: Ranks with the same weights.
        zero_stage: ZeRO stage.
        grad_dtype: Precision of the gradients; None for the smallest.
    """
    count = model_count(model, tp, min(ep, ranks))
    weight = 4 if framework == "fsdp" else DTYPE_BYTES[precision]
    gradient = weight if grad_dtype is None else DTYPE_BYTES[grad_dtype]
    if framework != "megatron" and (framework == "fsdp" or precision == "fp32"):
        gradient, optimizer = 4, _MOMENTS_BYTES
    else:
        optimizer = _MOMENTS_BYTES + (_MASTER_BYTES if precision != "fp32" else 0)
    # DeepSpeed's bf16 optimizer cuts its state over replicas even without ZeRO
    cut_optimizer = zero_stage >= 1 or framework == "megatron"
    weights = gradients = state = 0.0
    for number, over in zip(count, (ranks, max(1, ranks // min(ep, ranks))), strict=True):
        weights += weight * number / (over if zero_stage >= 3 else 1)
        gradients += gradient * number / (over if zero_stage >= 2 else 1)
        state += optimizer * number / (over if cut_optimizer else 1)
    return State(int(weights), int(gradients), int(state))

"""Exact counts of parameters per pipeline stage, and bytes of model state per rank.

Model state is what a rank keeps from one step to the next and while it accumulates: weights, gradients, optimizer
state. Activations and communication buffers are not in it. The sizes are those of the DeepSpeed optimizers that run:

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
an fp32 copy of the weights even in fp32. ZeRO-3 also keeps small tensors whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from strategies.deepspeed_config import PERSISTENCE_THRESHOLD
from strategies.plan import GradDtype, ParallelPlan
from strategies.specs import ModelSpec, Precision

DTYPE_BYTES: dict[Precision | GradDtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
"""Bytes of one number."""

_MOMENTS_BYTES = 8
_MASTER_BYTES = 4
_ALIGNMENT = 2  # ZeRO pads its flat buffers to a multiple of this many elements per replica


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One parameter of the model.

    Attributes:
        name: Global name.
        shape: Global shape, without vocabulary padding.
        sharded: Dimension that tensor parallelism cuts; None when every shard has all of it.
        copy: A second copy of tied weights (not counted as a parameter of the model).
    """

    name: str
    shape: tuple[int, ...]
    sharded: int | None = None
    copy: bool = False

    @property
    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)

    def local_numel(self, tp: int) -> int:
        """Number of elements that one tensor-parallel rank holds, padding included."""
        return math.prod(
            padded(size, tp) // tp if dimension == self.sharded else size for dimension, size in enumerate(self.shape)
        )


def padded(rows: int, tp: int) -> int:
    """``rows`` rounded up to a multiple of ``tp``: how far the vocabulary is padded."""
    return -(-rows // tp) * tp


def stage_tensors(model: ModelSpec, plan: ParallelPlan, stage: int) -> Iterator[TensorSpec]:
    """Every parameter that the ranks of one pipeline stage hold, in order of the layers.

    Args:
        model: The model.
        plan: A plan whose ``stages`` fit the model.
        stage: Index of the stage.
    """
    if stage == 0:
        yield TensorSpec(name="embed.tokens.weight", shape=(model.vocab, model.hidden), sharded=0)
        if model.flavour == "gpt3":
            yield TensorSpec(name="embed.positions.weight", shape=(model.seq, model.hidden))
    start = sum(plan.stages[:stage])
    for index in range(start, start + plan.stages[stage]):
        yield from block_tensors(model, f"blocks.{index}")
    if stage == plan.pp - 1:
        yield from _norm(model, "head.norm")
        if not model.tied:
            yield TensorSpec(name="head.weight", shape=(model.vocab, model.hidden), sharded=0)
        elif plan.pp > 1:
            yield TensorSpec(name="embed.tokens.weight", shape=(model.vocab, model.hidden), sharded=0, copy=True)


def block_tensors(model: ModelSpec, prefix: str) -> Iterator[TensorSpec]:
    """Every parameter of one transformer block."""
    bias = model.flavour == "gpt3"
    kv_width = model.kv_heads * model.head_dim
    yield from _norm(model, f"{prefix}.attn_norm")
    for name, width in (("q", model.hidden), ("k", kv_width), ("v", kv_width)):
        yield from _column(f"{prefix}.attn.{name}", model.hidden, width, bias=bias)
    yield from _row(f"{prefix}.attn.o", model.hidden, model.hidden, bias=bias)
    yield from _norm(model, f"{prefix}.ffn_norm")
    for name in ("up",) if bias else ("gate", "up"):
        yield from _column(f"{prefix}.ffn.{name}", model.hidden, model.ffn, bias=bias)
    yield from _row(f"{prefix}.ffn.down", model.ffn, model.hidden, bias=bias)


def _norm(model: ModelSpec, name: str) -> Iterator[TensorSpec]:
    yield TensorSpec(name=f"{name}.weight", shape=(model.hidden,))
    if model.flavour == "gpt3":
        yield TensorSpec(name=f"{name}.bias", shape=(model.hidden,))


def _column(name: str, inputs: int, outputs: int, *, bias: bool) -> Iterator[TensorSpec]:
    """A linear layer cut along its outputs; its bias is cut with them."""
    yield TensorSpec(name=f"{name}.weight", shape=(outputs, inputs), sharded=0)
    if bias:
        yield TensorSpec(name=f"{name}.bias", shape=(outputs,), sharded=0)


def _row(name: str, inputs: int, outputs: int, *, bias: bool) -> Iterator[TensorSpec]:
    """A linear layer cut along its inputs; its bias is added after the sum over shards, so it is whole."""
    yield TensorSpec(name=f"{name}.weight", shape=(outputs, inputs), sharded=1)
    if bias:
        yield TensorSpec(name=f"{name}.bias", shape=(outputs,))


def stage_parameters(model: ModelSpec, plan: ParallelPlan) -> tuple[int, ...]:
    """Parameters per pipeline stage, over all its shards, without vocabulary padding.

    With tied embeddings and more than one stage, the last stage counts its copy of the embedding too: the sum is then
    larger than ``model.parameters`` by exactly that copy.
    """
    return tuple(sum(tensor.numel for tensor in stage_tensors(model, plan, stage)) for stage in range(len(plan.stages)))


def rank_parameters(model: ModelSpec, plan: ParallelPlan) -> tuple[int, ...]:
    """Parameters that one rank of each stage computes with, after tensor parallelism, vocabulary padding included."""
    return tuple(
        sum(tensor.local_numel(plan.tp) for tensor in stage_tensors(model, plan, stage))
        for stage in range(len(plan.stages))
    )


def model_state_bytes(model: ModelSpec, plan: ParallelPlan, precision: Precision) -> tuple[dict[str, int], ...]:
    """Bytes of model state of one rank, per pipeline stage; all ranks of a stage hold the same amount.

    Args:
        model: The model.
        plan: A legal plan.
        precision: Arithmetic of forward and backward.

    Returns:
        Per stage, bytes by kind: ``weights``, ``gradients``, ``optimizer``, and their sum ``total``.
    """
    stages = []
    for stage in range(len(plan.stages)):
        sizes = [tensor.local_numel(plan.tp) for tensor in stage_tensors(model, plan, stage)]
        weights, gradients, optimizer = _held(sizes, plan, precision)
        kinds = {
            "weights": weights * DTYPE_BYTES[precision],
            "gradients": gradients * DTYPE_BYTES[plan.grad_dtype],
            "optimizer": optimizer * _optimizer_bytes(plan, precision),
        }
        stages.append(kinds | {"total": sum(kinds.values())})
    return tuple(stages)


def _optimizer_bytes(plan: ParallelPlan, precision: Precision) -> int:
    """Bytes of optimizer state per element: both moments, and the fp32 master copy where there is one."""
    return _MOMENTS_BYTES + (_MASTER_BYTES if plan.zero_stage > 0 or precision != "fp32" else 0)


def _held(sizes: list[int], plan: ParallelPlan, precision: Precision) -> tuple[int, int, int]:
    """Elements of weights, gradients and optimizer state that a rank keeps, for tensors of these local sizes."""
    whole = sum(sizes)
    replicas = plan.dp * plan.sp * plan.cp
    if plan.zero_stage == 3:
        share = sum(-(-size // replicas) for size in sizes)  # cut tensor by tensor
        small = sum(padded(size, replicas) for size in sizes if size <= PERSISTENCE_THRESHOLD)
        return share + small, share, share
    flat = padded(whole, _ALIGNMENT * replicas)
    share = flat // replicas
    if plan.zero_stage == 2:
        return flat, share, share
    if plan.zero_stage == 1:
        accumulated = flat if precision == "bf16" and plan.grad_dtype == "fp32" else whole
        return flat, accumulated, share
    if precision == "bf16" and plan.pp > 1:
        return flat, flat, share
    return whole, whole, whole

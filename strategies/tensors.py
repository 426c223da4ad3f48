"""Every parameter of a model, tensor by tensor: shapes, what tensor and expert parallelism cut, and which stage has it.

This listing is the ground truth that the models of :mod:`jobs` are tested against. The planner counts in closed form
(:mod:`strategies.counts`), which is tested against this listing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from strategies.plan import ParallelPlan
from strategies.specs import LatentAttention, ModelSpec, MoeSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One parameter of the model.

    Attributes:
        name: Global name.
        shape: Global shape, without vocabulary padding.
        sharded: Dimension that tensor parallelism cuts; None when every shard has all of it.
        copy: A second copy of tied weights (not counted as a parameter of the model).
        expert: Its first dimension counts experts, which expert parallelism deals out.
    """

    name: str
    shape: tuple[int, ...]
    sharded: int | None = None
    copy: bool = False
    expert: bool = False

    @property
    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)

    def local_numel(self, tp: int, ep: int = 1) -> int:
        """Number of elements that one rank holds, padding included."""
        sizes = list(self.shape)
        if self.sharded is not None:
            sizes[self.sharded] = padded(sizes[self.sharded], tp) // tp
        if self.expert:
            sizes[0] = padded(sizes[0], ep) // ep
        return math.prod(sizes)


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
        yield from embedding_tensors(model)
    start = sum(plan.stages[:stage])
    for index in range(start, start + plan.stages[stage]):
        yield from block_tensors(model, f"blocks.{index}", dense=index < first_expert_block(model))
    yield from head_tensors(model, plan, stage)


def head_tensors(model: ModelSpec, plan: ParallelPlan, stage: int) -> Iterator[TensorSpec]:
    """Every parameter after the last block, if this stage has it."""
    if stage == head_stage(plan):
        yield from _norm(model, "head.norm")
        if not model.tied:
            yield TensorSpec(name="head.weight", shape=(model.vocab, model.hidden), sharded=0)
        elif stage != 0:
            yield TensorSpec(name="embed.tokens.weight", shape=(model.vocab, model.hidden), sharded=0, copy=True)


def head_stage(plan: ParallelPlan) -> int:
    """The stage with the output layer: the last, but the first under DualPipeV, whose layers go down and up again."""
    return 0 if plan.schedule == "dualpipev" else plan.pp - 1


def first_expert_block(model: ModelSpec) -> int:
    """Index of the first block with experts; the number of layers for a dense model."""
    return model.layers if model.moe is None else min(model.moe.dense_layers, model.layers)


def block_tensors(model: ModelSpec, prefix: str, *, dense: bool = True) -> Iterator[TensorSpec]:
    """Every parameter of one transformer block.

    Args:
        model: The model.
        prefix: What the names start with.
        dense: The block has the plain feed-forward part, not experts.
    """
    yield from _norm(model, f"{prefix}.attn_norm")
    yield from _attention(model, f"{prefix}.attn")
    yield from _norm(model, f"{prefix}.ffn_norm")
    if dense or model.moe is None:
        yield from _feed_forward(model, f"{prefix}.ffn", model.ffn)
    else:
        yield from _experts(model, f"{prefix}.ffn", model.moe)


def embedding_tensors(model: ModelSpec) -> Iterator[TensorSpec]:
    """Every parameter before the first block."""
    yield TensorSpec(name="embed.tokens.weight", shape=(model.vocab, model.hidden), sharded=0)
    if model.learned_positions:
        yield TensorSpec(name="embed.positions.weight", shape=(model.learned_positions, model.hidden))
    if model.embed_norm:
        yield from _norm(model, "embed.norm")


def _attention(model: ModelSpec, prefix: str) -> Iterator[TensorSpec]:
    if model.latent is not None:
        yield from _latent(model, prefix, model.latent)
        return
    bias = model.flavour == "gpt3"
    width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    for name, outputs in (("q", width), ("k", kv_width), ("v", kv_width)):
        yield from _column(f"{prefix}.{name}", model.hidden, outputs, bias=bias)
    yield from _row(f"{prefix}.o", width, model.hidden, bias=bias)


def _latent(model: ModelSpec, prefix: str, latent: LatentAttention) -> Iterator[TensorSpec]:
    """The latents and their norms are whole on every shard; heads are cut (DeepSeek-V2, arXiv 2405.04434, 2.1)."""
    key = latent.nope_width + latent.rope_width
    if latent.q_rank:
        yield TensorSpec(name=f"{prefix}.q_down.weight", shape=(latent.q_rank, model.hidden))
        yield TensorSpec(name=f"{prefix}.q_norm.weight", shape=(latent.q_rank,))
    yield from _column(f"{prefix}.q", latent.q_rank or model.hidden, model.heads * key, bias=False)
    yield TensorSpec(name=f"{prefix}.kv_down.weight", shape=(latent.kv_rank + latent.rope_width, model.hidden))
    yield TensorSpec(name=f"{prefix}.kv_norm.weight", shape=(latent.kv_rank,))
    outputs = model.heads * (latent.nope_width + latent.value_width)
    yield from _column(f"{prefix}.kv", latent.kv_rank, outputs, bias=False)
    yield from _row(f"{prefix}.o", model.heads * latent.value_width, model.hidden, bias=False)


def _feed_forward(model: ModelSpec, prefix: str, width: int) -> Iterator[TensorSpec]:
    bias = model.flavour == "gpt3"
    for name in ("gate", "up") if model.has_gate else ("up",):
        yield from _column(f"{prefix}.{name}", model.hidden, width, bias=bias)
    yield from _row(f"{prefix}.down", width, model.hidden, bias=bias)


def _experts(model: ModelSpec, prefix: str, moe: MoeSpec) -> Iterator[TensorSpec]:
    yield TensorSpec(name=f"{prefix}.router.weight", shape=(moe.experts, model.hidden))
    if moe.router_bias:
        yield TensorSpec(name=f"{prefix}.router.bias", shape=(moe.experts,))
    for tensor in _feed_forward(model, f"{prefix}.experts", moe.ffn):
        cut = None if tensor.sharded is None else tensor.sharded + 1
        yield TensorSpec(name=tensor.name, shape=(moe.experts, *tensor.shape), sharded=cut, expert=True)
    if moe.shared_ffn:
        yield from _feed_forward(model, f"{prefix}.shared", moe.shared_ffn)


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

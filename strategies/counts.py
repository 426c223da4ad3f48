"""Parameters per layer kind, stage and rank in closed form: constant time, where a listing takes one per tensor.

Equal to the sums over :mod:`strategies.tensors`, to the last parameter (tested). Experts are counted apart from the
rest, because they are spread over other ranks and their optimizer state over fewer replicas.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from strategies.plan import ParallelPlan
from strategies.specs import ModelSpec
from strategies.tensors import first_expert_block, head_stage, padded


class Count(NamedTuple):
    """Parameters on one rank.

    Attributes:
        dense: Of everything but experts.
        expert: Of routed experts.
    """

    dense: int
    expert: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.expert


def expert_parallel(plan: ParallelPlan) -> int:
    """Over how many groups of ranks the experts are dealt: ``ep``, at most the ranks that hold the same layers."""
    return min(plan.ep, plan.dp * plan.sp * plan.cp)


def norm(model: ModelSpec, width: int) -> int:
    """Parameters of one norm."""
    return width * (2 if model.flavour == "gpt3" else 1)


def feed_forward(model: ModelSpec, width: int, tp: int = 1) -> int:
    """Parameters of one feed-forward part of inner ``width`` on one of ``tp`` shards."""
    bias = model.flavour == "gpt3"
    cut = padded(width, tp) // tp
    columns = 2 if model.has_gate else 1
    return cut * (model.hidden + bias) * columns + cut * model.hidden + bias * model.hidden


def attention(model: ModelSpec, tp: int = 1) -> int:
    """Parameters of the attention of one block on one of ``tp`` shards."""
    hidden, latent = model.hidden, model.latent
    if latent is None:
        bias = model.flavour == "gpt3"
        width = padded(model.heads * model.head_dim, tp) // tp
        kv_width = padded(model.kv_heads * model.head_dim, tp) // tp
        return (width + 2 * kv_width) * (hidden + bias) + width * hidden + bias * hidden
    key = latent.nope_width + latent.rope_width
    queries = padded(model.heads * key, tp) // tp * (latent.q_rank or hidden)
    down = latent.q_rank * (hidden + 1) + (latent.kv_rank + latent.rope_width) * hidden + latent.kv_rank
    pairs = padded(model.heads * (latent.nope_width + latent.value_width), tp) // tp * latent.kv_rank
    return queries + down + pairs + padded(model.heads * latent.value_width, tp) // tp * hidden


def block(model: ModelSpec, tp: int = 1, ep: int = 1, *, dense: bool = True) -> Count:
    """Parameters of one transformer block on one rank.

    Args:
        model: The model.
        tp: Tensor-parallel shards.
        ep: Groups of ranks that the experts are dealt to.
        dense: The block has the plain feed-forward part, not experts.
    """
    common = attention(model, tp) + 2 * norm(model, model.hidden)
    moe = model.moe
    if dense or moe is None:
        return Count(common + feed_forward(model, model.ffn, tp), 0)
    router = moe.experts * (model.hidden + moe.router_bias)
    shared = feed_forward(model, moe.shared_ffn, tp) if moe.shared_ffn else 0
    return Count(common + router + shared, padded(moe.experts, ep) // ep * feed_forward(model, moe.ffn, tp))


def embedding(model: ModelSpec, tp: int = 1) -> int:
    """Parameters before the first block on one of ``tp`` shards."""
    rows = padded(model.vocab, tp) // tp + model.learned_positions
    return rows * model.hidden + (norm(model, model.hidden) if model.embed_norm else 0)


def head(model: ModelSpec, tp: int = 1, *, alone: bool = True) -> int:
    """Parameters after the last block on one of ``tp`` shards; ``alone``: on another rank than the embedding."""
    projection = padded(model.vocab, tp) // tp * model.hidden
    return norm(model, model.hidden) + (projection if alone or not model.tied else 0)


def expert_blocks(model: ModelSpec, plan: ParallelPlan, stage: int) -> int:
    """Blocks with experts on a stage."""
    start = sum(plan.stages[:stage])
    return max(0, start + plan.stages[stage] - max(start, first_expert_block(model)))


def stage_count(model: ModelSpec, plan: ParallelPlan, stage: int) -> Count:
    """Parameters of one rank of a stage, vocabulary padding included."""
    experts = expert_blocks(model, plan, stage)
    dense = (plan.stages[stage] - experts) * block(model, plan.tp).dense
    expert = 0
    if experts:
        mixed = block(model, plan.tp, expert_parallel(plan), dense=False)
        dense, expert = dense + experts * mixed.dense, experts * mixed.expert
    if stage == 0:
        dense += embedding(model, plan.tp)
    if stage == head_stage(plan):
        dense += head(model, plan.tp, alone=stage != 0)
    return Count(dense, expert)


def model_count(model: ModelSpec, tp: int = 1, ep: int = 1) -> Count:
    """Parameters of the whole model on the ranks of one shard, tied weights once."""
    dense = first_expert_block(model)
    plain, mixed = block(model, tp, ep), block(model, tp, ep, dense=False)
    blocks = dense * plain.dense + (model.layers - dense) * mixed.dense
    ends = embedding(model, tp) + head(model, tp, alone=False)
    return Count(blocks + ends, (model.layers - dense) * mixed.expert)


def stage_parameters(model: ModelSpec, plan: ParallelPlan) -> tuple[int, ...]:
    """Parameters per pipeline stage, over all its shards, without vocabulary padding.

    With tied embeddings and more than one stage, the last stage counts its copy of the embedding too: the sum is then
    larger than ``model.parameters`` by exactly that copy.
    """
    whole = replace(plan, tp=1, ep=1)
    return tuple(stage_count(model, whole, stage).total for stage in range(len(plan.stages)))


def rank_parameters(model: ModelSpec, plan: ParallelPlan) -> tuple[int, ...]:
    """Parameters that one rank of each stage computes with: its shard and its experts, vocabulary padding included."""
    return tuple(stage_count(model, plan, stage).total for stage in range(len(plan.stages)))

"""Bytes of activations: what one block keeps for its backward pass, its working set, and how many are in flight.

Sources: "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), whose total for a GPT block
with dropout, ``s b h (10 + 24 / t + 5 a s / (h t))``, is what these sums give; here they are written out per operation,
so that grouped queries, gates, experts, latent attention and fused attention need no formulas of their own.
"""

from __future__ import annotations

from typing import NamedTuple

from strategies.plan import ParallelPlan
from strategies.specs import LatentAttention, ModelSpec, MoeSpec, Precision
from strategies.tensors import padded
from strategies.workload import Framework

_LOGIT_COPIES = 3
"""Copies in fp32 of every logit at the peak of the cross entropy, beside the logit. torch's backward pass has the
log-softmax, the gradient that comes in and the one that goes out; Megatron's forward pass the cast, the difference from
the maximum and the exponential."""

_PARALLEL_LOGIT_COPIES = 4
"""The same in the loss of torch's DTensor over a cut vocabulary (torch/distributed/tensor/parallel/loss.py): the
log-softmax, a gradient of zeros, its sum with the softmax, and the product with the gradient that comes in."""

_SCORE_BYTES = 2.5
"""Times the bytes of a number, per attention score that is stored: softmax 2, dropout mask 1, dropped-out scores 2
(arXiv 2205.05198, section 4.1)."""


class BlockBytes(NamedTuple):
    """Bytes of one block for one micro-batch on one rank.

    Attributes:
        kept: From its forward to its backward pass.
        working: On top, while its backward pass runs; with full recomputation that includes what is recomputed.
    """

    kept: float
    working: float


class Cut(NamedTuple):
    """How one micro-batch is cut, as far as activations go.

    Attributes:
        tokens: Of one micro-batch on one rank (of its tensor-parallel group).
        row: Tokens of a sequence that a rank's queries look at.
        tp: Tensor-parallel degree.
        whole: Ranks that share what tensor parallelism leaves whole: tp with Megatron's sequence parallelism, else 1.
        dealt: Ranks that share the tokens on their way to experts: tp where experts are spread over replicas, else 1.
        width: Bytes of a number.
    """

    tokens: float
    row: int
    tp: int
    whole: int
    dealt: int
    width: int


def cut(plan: ParallelPlan, seq: int, precision: Precision) -> Cut:
    """How ``plan`` cuts a micro-batch of sequences of ``seq`` tokens."""
    return Cut(
        tokens=plan.micro_batch * seq / (plan.sp * plan.cp),
        row=seq,
        tp=plan.tp,
        whole=plan.tp if plan.sequence_parallel else 1,
        dealt=plan.tp if plan.ep > 1 else 1,
        width=4 if precision == "fp32" else 2,
    )


class Kernels(NamedTuple):
    """How the code of a framework family computes, as far as it decides what is kept.

    Attributes:
        dropout: Masks of dropout are kept after attention and after the feed-forward part.
        fused_gate: The gate's activation is recomputed, not kept.
        fp8_inputs: Inputs of linear layers are kept in fp8.
        shards_gather: Experts are cut over the tensor-parallel ranks, which keep all tokens that they gathered.
        torch_parallel: torch's own tensor parallelism and checkpointing: linear layers keep the inputs that sequence
            parallelism gathered, selective recomputation keeps every second product.
    """

    dropout: bool
    fused_gate: bool
    fp8_inputs: bool
    shards_gather: bool
    torch_parallel: bool


def fused(model: ModelSpec, precision: Precision, framework: Framework) -> bool:
    """Whether the kernels are Transformer Engine's: of ``mcore``, in fp8 and with experts.

    Dense models in 16 bit are trained by simpler relatives of Megatron-Core too (nanotron); for these the larger,
    unfused form is assumed.
    """
    return framework == "mcore" and (precision == "fp8" or model.moe is not None)


def kernels(model: ModelSpec, precision: Precision, framework: Framework) -> Kernels:
    """What a framework family does.

    Megatron's GPT has dropout. Transformer Engine (:func:`fused`) computes the gate in one kernel, and in fp8 keeps the
    inputs of linear layers so. torch's tensor parallelism keeps gathered inputs where Megatron gathers them again
    (arXiv 2205.05198, section 4.2.2).
    """
    engine = fused(model, precision, framework)
    return Kernels(
        dropout=framework == "megatron" and model.flavour == "gpt3",
        fused_gate=engine,
        fp8_inputs=engine and precision == "fp8",
        shards_gather=framework == "megatron",
        torch_parallel=framework == "fsdp",
    )


def block_bytes(model: ModelSpec, plan: ParallelPlan, at: Cut, code: Kernels, *, dense: bool) -> BlockBytes:
    """Activations of one block.

    Args:
        model: The model.
        plan: The plan: recomputation and attention kernel are looked at.
        at: Its cut.
        code: What the framework keeps.
        dense: The block has the plain feed-forward part, not experts.
    """
    moe = None if dense else model.moe
    wide = _feed_forward(model, model.ffn, at, code) if moe is None else expert_bytes(model, moe, at, code)
    whole = at.tokens * (_stream(model, at, code) + _attention(model, at, code) + wide)
    score = 0.0 if plan.flash else at.tokens * at.width * model.heads * at.row / at.tp
    scores = _SCORE_BYTES * score
    backward = max(at.tokens * _feed_backward(model, moe, at), 2 * score)
    if plan.recompute == "full":
        return BlockBytes(at.tokens * at.width * model.hidden / at.whole, whole + scores + backward)
    if plan.recompute == "selective" and code.torch_parallel:
        return BlockBytes(at.tokens * _half_products(model, at), whole / 2 + backward)
    if plan.recompute == "selective":
        return BlockBytes(whole, scores + backward)
    return BlockBytes(whole + scores, backward)


def _stream(model: ModelSpec, at: Cut, code: Kernels) -> float:
    """Bytes per token of the residual stream: inputs of both norms, inputs of both parts' first product, masks."""
    norms = 2 * at.width / at.whole
    inputs = 2 * (1 if code.fp8_inputs else at.width) / (1 if code.torch_parallel else at.whole)
    return model.hidden * (norms + inputs + 2 * code.dropout / at.whole)


def _attention(model: ModelSpec, at: Cut, code: Kernels) -> float:
    """Bytes per token of queries, keys, values and the output of attention; in fp8 its copy for the next product."""
    if model.latent is not None:
        return _latent(model, model.latent, at)
    heads, kv_heads = model.heads / at.tp, max(model.kv_heads / at.tp, 1.0)
    return model.head_dim * (at.width * 2 * (heads + kv_heads) + code.fp8_inputs * heads)


def _latent(model: ModelSpec, latent: LatentAttention, at: Cut) -> float:
    """The latents before and after their norms, and the heads that are made of them."""
    narrow = 2 * latent.q_rank + 2 * latent.kv_rank + latent.rope_width
    head = 2 * (latent.nope_width + latent.rope_width) + 2 * latent.value_width
    return at.width * (narrow / at.whole + model.heads / at.tp * head)


def _feed_forward(model: ModelSpec, ffn: int, at: Cut, code: Kernels) -> float:
    """Bytes per token inside a feed-forward part: before and after the activation function.

    A gate is one more; without a fused kernel the activated gate is kept as well.
    """
    before = (2 if code.fused_gate else 3) if model.has_gate else 1
    return (at.width * before + (1 if code.fp8_inputs else at.width)) * ffn / at.tp


def expert_bytes(model: ModelSpec, moe: MoeSpec, at: Cut, code: Kernels) -> float:
    """Bytes per token of routing, of the busiest rank's experts, and of the shared experts.

    A routed token is kept as the experts' input and output (the gates' gradients need it), once per expert it visits.
    Shards that gather have all inputs, but only the outputs of the tokens that they send on; where they send none on,
    they have gathered the sequence before the router, which keeps it.
    """
    visits, routing = moe.top_k * moe.imbalance, 4 * moe.experts / at.whole
    ends = 2 / at.whole
    if code.shards_gather:
        ends, routing = 1 + 1 / at.dealt, 4 * moe.experts
        if at.dealt == 1:
            routing += at.width * model.hidden * (1 - 1 / at.whole)
    routed = visits * (ends * at.width * model.hidden + _feed_forward(model, moe.ffn, at, code))
    return routed + _feed_forward(model, moe.shared_ffn, at, code) + routing


def _feed_backward(model: ModelSpec, moe: MoeSpec | None, at: Cut) -> float:
    """Bytes per token of gradients that live together in the backward pass of a feed-forward part."""
    width: float = model.ffn
    if moe is not None:
        width = moe.top_k * moe.imbalance * moe.ffn + moe.shared_ffn
    return at.width * ((3 if model.has_gate else 2) * width / at.tp + 2 * model.hidden)


def _half_products(model: ModelSpec, at: Cut) -> float:
    """Bytes per token that per-operator checkpointing keeps: the input, attention, and every second product.

    This is torchtitan's selective policy; the products kept are those of queries, values, gate (or up) and down.
    """
    kv = max(model.kv_heads / at.tp, 1.0) * model.head_dim
    heads = model.heads * model.head_dim / at.tp
    return at.width * (2 * model.hidden / at.whole + 2 * heads + kv + model.ffn / at.tp)


def logit_bytes(model: ModelSpec, at: Cut, code: Kernels) -> float:
    """Bytes of the output layer and the loss for one micro-batch, at their peak: logits, the norm and its output."""
    columns = padded(model.vocab, at.tp) / at.tp
    copies = _PARALLEL_LOGIT_COPIES if code.torch_parallel and at.tp > 1 else _LOGIT_COPIES
    ends = at.width * model.hidden * (1 / at.whole + 1 / (1 if code.torch_parallel else at.whole))
    return at.tokens * (columns * (at.width + 4 * copies) + ends)


def masks(plan: ParallelPlan, at: Cut) -> BlockBytes:
    """Masks that keep documents apart: a number for every pair of tokens of a sequence, whatever shares its tokens.

    Attention gets one in the precision of its scores, made of one that has a byte for every pair. Blocks share one and
    keep it, unless they recompute.
    """
    pairs = float(plan.micro_batch * at.row**2)
    if plan.recompute == "none":
        return BlockBytes(at.width * pairs, pairs)
    return BlockBytes(0.0, (1 + at.width) * pairs)


def in_flight(plan: ParallelPlan, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of all its blocks.

    - 1F1B: a stage waits for those after it, ``min(m, p - i)`` (arXiv 2104.04473).
    - Interleaved: ``2 (p - i - 1) + (v - 1) p + 1`` chunks of one v-th of the blocks; ``1 + (p - 1) / (p v)`` times
      1F1B on the first stage (arXiv 2205.05198, section 4.2.3).
    - DualPipeV: ``2 p + 1`` halves on every stage (deepseek-ai/DualPipe, its table with PP = 2 p).
    """
    waiting = plan.pp - stage
    if plan.pp == 1:
        return 1.0
    if plan.schedule == "dualpipev":
        return min(plan.grad_accum, plan.pp + 0.5)
    if plan.schedule == "interleaved":
        chunks = 2 * (waiting - 1) + (plan.vpp - 1) * plan.pp + 1
        return min(plan.grad_accum * plan.vpp, chunks) / plan.vpp
    return min(plan.grad_accum, waiting)

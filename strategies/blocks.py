"""Seconds of one transformer block for one micro-batch on one rank: forward, backward and recomputation, by kind."""

from __future__ import annotations

from typing import NamedTuple

from strategies.calibration import Calibration
from strategies.collectives import Network, all_reduce_s, all_to_all_s, gather_s, send_s
from strategies.kernels import Device, flash_s, gemm_s, moved_s
from strategies.plan import Recompute
from strategies.specs import ModelSpec, MoeSpec


class BlockTime(NamedTuple):
    """Seconds of one block (or of the ends of the model) for one micro-batch, all passes together, by kind."""

    gemm: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    launch: float = 0.0


class Shard(NamedTuple):
    """How one micro-batch is cut: all that the time of a block depends on beside the model and the machine.

    Attributes:
        tp: Tensor-parallel degree.
        sp: Ulysses degree.
        cp: Context-parallel degree.
        ep: Expert-parallel degree.
        micro_batch: Sequences.
        seq: Tokens per sequence.
        recompute: Activation checkpointing.
        flash: Fused attention.
        sequence_parallel: Megatron's sequence parallelism.
        deepspeed: DeepSpeed's engine runs it, with a skew between tensor-parallel ranks.
    """

    tp: int
    sp: int
    cp: int
    ep: int
    micro_batch: int
    seq: int
    recompute: Recompute
    flash: bool
    sequence_parallel: bool
    deepspeed: bool = False

    @property
    def tokens(self) -> float:
        """Tokens of one rank (of its tensor-parallel group)."""
        return self.micro_batch * self.seq / (self.sp * self.cp)


class Product(NamedTuple):
    """A product with weights in the forward pass: ``copies`` times ``m`` x ``k`` by ``k`` x ``n``."""

    m: float
    n: float
    k: float
    copies: float = 1.0

    @property
    def weights(self) -> float:
        """Weights that this rank multiplies with."""
        return self.n * self.k * self.copies


_SCORE_FORWARD = 9.0
_SCORE_BACKWARD = 11.0
"""Bytes per score that softmax and dropout move when attention is not fused: forward softmax 2 + 2, dropout 2 + 1 + 2;
backward dropout 2 + 1 + 2, softmax 2 + 2 + 2 (arXiv 2205.05198, section 4). What the products move is counted there."""


def attention_products(model: ModelSpec, shard: Shard) -> list[Product]:
    """Products of the attention part with its weights."""
    tokens, tp, hidden = shard.tokens, shard.tp, model.hidden
    heads = model.heads / tp
    if model.latent is not None:
        latent = model.latent
        query = heads * (latent.nope_width + latent.rope_width)
        down = latent.kv_rank + latent.rope_width
        first = [Product(tokens, latent.q_rank, hidden), Product(tokens, query, latent.q_rank)]
        if not latent.q_rank:
            first = [Product(tokens, query, hidden)]
        return [
            *first,
            Product(tokens, down, hidden),
            Product(tokens, heads * (latent.nope_width + latent.value_width), latent.kv_rank),
            Product(tokens, hidden, heads * latent.value_width),
        ]
    width = heads * model.head_dim
    kv_width = max(model.kv_heads / tp, 1.0) * model.head_dim
    return [Product(tokens, width + 2.0 * kv_width, hidden), Product(tokens, hidden, width)]


def dense_products(model: ModelSpec, shard: Shard, ffn: float) -> list[Product]:
    """Products of a feed-forward block of inner width ``ffn``."""
    up = (2.0 if model.has_gate else 1.0) * ffn / shard.tp
    return [Product(shard.tokens, up, model.hidden), Product(shard.tokens, model.hidden, ffn / shard.tp)]


def expert_products(model: ModelSpec, shard: Shard, imbalance: float, *, padded: bool = True) -> list[Product]:
    """Products of a rank's experts with ``imbalance`` times the average load, of the router and the shared experts.

    Grouped products pad the rows of every expert to whole tiles (Megatron-Core's and MegaBlocks' kernels); work that a
    model needs has none of that (``padded``).
    """
    moe = model.moe
    assert moe is not None
    local = moe.experts / shard.ep
    tokens = shard.tokens * moe.top_k * imbalance / local
    if padded:
        tokens = -(-shard.tokens * moe.top_k * imbalance // local // 64) * 64.0
    up = (2.0 if model.has_gate else 1.0) * moe.ffn / shard.tp
    products = [
        Product(shard.tokens, moe.experts, model.hidden),
        Product(tokens, up, model.hidden, local),
        Product(tokens, model.hidden, moe.ffn / shard.tp, local),
    ]
    if moe.shared_ffn:
        products += dense_products(model, shard, moe.shared_ffn)
    return products


def _arriving(shard: Shard, moe: MoeSpec) -> float:
    """How often a shard of experts reads or writes a visit that arrived, beside the products with it.

    It sorts what arrived from several ranks by expert, if it has several, and back. Where nothing arrives, every shard
    gathers all visits for itself, not just its part of them.
    """
    if shard.ep == 1:
        return 4.0 * (1.0 - 1.0 / shard.tp)
    return 4.0 if moe.experts > shard.ep else 0.0


class Blocks:
    """The time of blocks of one model on one machine, for any shard."""

    def __init__(
        self,
        model: ModelSpec,
        device: Device,
        network: Network,
        calibration: Calibration,
        *,
        shards_gather: bool = False,
    ) -> None:
        """Prepare.

        Args:
            model: The model.
            device: What computes.
            network: What lies between devices.
            calibration: Constants.
            shards_gather: Experts are cut over the tensor-parallel ranks, which gather the tokens that visit them.
        """
        self.model, self.device, self.network, self.calibration = model, device, network, calibration
        self.shards_gather = shards_gather
        self._products: dict[tuple[float, ...], tuple[float, float, float]] = {}
        self._attentions: dict[tuple[float, ...], tuple[float, float]] = {}
        self._ends: dict[tuple[float, ...], tuple[BlockTime, BlockTime]] = {}
        latent = model.latent
        self.query_width = latent.nope_width + latent.rope_width if latent else model.head_dim
        self.value_width = latent.value_width if latent else model.head_dim

    def products(self, shard: Shard, *, moe: bool, even: bool = False) -> list[Product]:
        """All products of a block with weights, forward; of the busiest rank, or of even loads without padding."""
        experts = self.model.moe
        if moe and experts is not None:
            feed = expert_products(self.model, shard, 1.0 if even else experts.imbalance, padded=not even)
        else:
            feed = dense_products(self.model, shard, self.model.ffn)
        return attention_products(self.model, shard) + feed

    def weights(self, shard: Shard, *, moe: bool) -> float:
        """Weights of a block that a rank computes with."""
        return sum(product.weights for product in self.products(shard, moe=moe))

    def expert_weights(self, shard: Shard) -> float:
        """Those of them that are the experts' of this rank."""
        moe = self.model.moe
        if moe is None:
            return 0.0
        return moe.experts / shard.ep * (3.0 if self.model.has_gate else 2.0) * moe.ffn / shard.tp * self.model.hidden

    def flops_per_token(self, shard: Shard, *, moe: bool) -> float:
        """Forward operations of a block's products with weights, per token; for an uncut shard."""
        return sum(2.0 * p.m * p.n * p.k * p.copies for p in self.products(shard, moe=moe, even=True)) / shard.tokens

    def attention_flops_per_token(self, shard: Shard) -> float:
        """Forward operations of a block's attention per token, without regard to causality (as papers count)."""
        return 2.0 * shard.seq * self.model.heads * (self.query_width + self.value_width)

    def time(self, shard: Shard, *, moe: bool) -> BlockTime:
        """Seconds of one block for one micro-batch."""
        forward, backward, last = self._linear(shard, moe=moe)
        attention_f, attention_b = self._attention(shard)
        memory_f, memory_b = self._memory(shard, moe=moe)
        tp, ep = 0.5 * self._tp(shard, moe=moe), 0.5 * self._ep(shard) if moe else 0.0
        cp_f, cp_b = self._cp(shard, attention_f, attention_b)
        host = self.calibration.host_experts_s if moe else self.calibration.host_block_s
        launch = self._launch(host, forward + attention_f + memory_f + tp + ep + cp_f)
        launch += self._launch(host, backward + attention_b + memory_b + tp + ep + cp_b)
        once = BlockTime(
            forward + backward, attention_f + attention_b, memory_f + memory_b, 2 * tp, cp_f + cp_b, 2 * ep, launch
        )
        if shard.recompute == "none" or (shard.recompute == "selective" and shard.flash):
            return once
        if shard.recompute == "selective":
            return once._replace(attention=once.attention + attention_f)
        again = forward - last if self.calibration.early_stop else forward
        launch = self._launch(host, again + attention_f + memory_f + tp + ep + cp_f)
        twice = (again, attention_f, memory_f, tp, cp_f, ep, launch)
        return BlockTime._make(first + second for first, second in zip(once, twice, strict=True))

    def _linear(self, shard: Shard, *, moe: bool) -> tuple[float, float, float]:
        """Seconds of all products with weights: forward, backward, and of the last one forward."""
        key = (shard.tp, shard.sp * shard.cp, shard.ep, shard.micro_batch, shard.seq, moe)
        found = self._products.get(key)
        if found is None:
            device, forward, backward, last = self.device, 0.0, 0.0, 0.0
            for m, n, k, copies in self.products(shard, moe=moe):
                last = gemm_s(device, m, n, k, copies)
                forward += last
                backward += gemm_s(device, m, k, n, copies) + gemm_s(device, n, k, m, copies)
            found = self._products[key] = (forward, backward, last)
        return found

    def _launch(self, host_s: float, device_s: float) -> float:
        """What the host adds to a pass: the power mean of both, between the larger and the sum, less the device's."""
        order = self.calibration.blend
        return float((device_s**order + host_s**order) ** (1.0 / order)) - device_s

    def _attention(self, shard: Shard) -> tuple[float, float]:
        """Forward and backward seconds of attention proper."""
        key = (shard.tp, shard.sp, shard.cp, shard.micro_batch, shard.seq, shard.flash)
        found = self._attentions.get(key)
        if found is None:
            found = self._attentions[key] = self._attend(shard)
        return found

    def _attend(self, shard: Shard) -> tuple[float, float]:
        heads = self.model.heads / shard.tp / shard.sp
        seq, batch = shard.seq, shard.micro_batch
        flops = 2.0 * batch * seq * seq / shard.cp * heads * (self.query_width + self.value_width)
        if shard.flash:  # causal: half; the backward pass has 5 products for the forward pass's 2 (arXiv 2307.08691)
            width = 0.5 * (self.query_width + self.value_width)
            forward = flash_s(self.device, 0.5 * flops, width, seq)
            return forward, flash_s(self.device, 1.25 * flops, width, seq)
        count, rows = batch * heads, seq / shard.cp
        scores = gemm_s(self.device, rows, seq, self.query_width, count, batched=True)
        values = gemm_s(self.device, rows, self.value_width, seq, count, batched=True)
        moved = count * rows * seq
        return (
            scores + values + moved_s(self.device, _SCORE_FORWARD * moved),
            2.0 * (scores + values) + moved_s(self.device, _SCORE_BACKWARD * moved),
        )

    def _memory(self, shard: Shard, *, moe: bool) -> tuple[float, float]:
        """Forward and backward seconds of norms, residuals, positions and activations."""
        model, tokens, tp = self.model, shard.tokens, shard.tp
        narrow = 10.0 * model.hidden / (tp if shard.sequence_parallel else 1)  # two norms 2 + 2, two residuals 3 + 3
        kv = max(model.kv_heads / tp, 1.0) * model.head_dim
        wide = 2.0 * (model.heads / tp * self.query_width + kv)
        per_token = model.ffn
        if moe and model.moe is not None:
            per_token = round(model.moe.top_k * model.moe.ffn * model.moe.imbalance) + model.moe.shared_ffn
            visits = model.moe.top_k * model.hidden
            narrow += 4.0 * visits / tp  # gather into the experts' order and back
            if self.shards_gather:
                narrow += visits * _arriving(shard, model.moe)
        active = (3.0 if model.has_gate else 2.0) * per_token / tp
        moved = 2.0 * tokens * (narrow + wide + active) * self.calibration.traffic
        return moved_s(self.device, moved), 1.5 * moved_s(self.device, moved)

    def _tp(self, shard: Shard, *, moe: bool) -> float:
        """Exposed seconds of tensor-parallel collectives, forward and backward: four sums of the activations.

        With sequence parallelism each is a reduce-scatter and an all-gather, which move as much (arXiv 2205.05198).
        """
        if shard.tp == 1:
            return 0.0
        size = 2.0 * shard.tokens * self.model.hidden
        skew = shard.tp * self.calibration.skew_s if shard.deepspeed else 0.0
        one = all_reduce_s(self.network, size, shard.tp) * self.calibration.tp_exposed + skew
        experts = self.model.moe if moe and self.shards_gather else None
        if experts is None:
            return 4.0 * one
        routed = self._routed_s(shard, experts) * self.calibration.tp_exposed + 2.0 * skew
        return (4.0 if experts.shared_ffn else 2.0) * one + routed

    def _routed_s(self, shard: Shard, moe: MoeSpec) -> float:
        """Seconds of what the shards of experts exchange, forward and backward.

        They gather what arrived for them and add up what they have made of it; what they know of the routing they make
        known, and where the sequence is not split, every rank needs all of the output, and of the gradient. Where
        nothing arrives from elsewhere, there is one sum each way, over whole sequences.
        """
        size = 2.0 * shard.tokens * self.model.hidden
        if shard.ep == 1:
            around = 2.0 * gather_s(self.network, size, shard.tp) if shard.sequence_parallel else 0.0
            return 2.0 * all_reduce_s(self.network, size, shard.tp) + around
        around = 0.0 if shard.sequence_parallel else 2.0 * gather_s(self.network, size, shard.tp)
        routing = gather_s(self.network, 4.0 * shard.tokens * moe.experts, shard.tp)
        return 2.0 * all_reduce_s(self.network, self.visits_bytes(shard), shard.tp) + routing + around

    def visits_bytes(self, shard: Shard) -> float:
        """Bytes of the tokens that visit the experts of the busiest tensor-parallel group, once per visit.

        Each of its ranks gets its part of them from other groups; then each of them has all.
        """
        moe = self.model.moe
        return 0.0 if moe is None else 2.0 * shard.tokens * moe.top_k * self.model.hidden * moe.imbalance

    def _cp(self, shard: Shard, attention_f: float, attention_b: float) -> tuple[float, float]:
        """Exposed seconds of the ring of keys and values, and of Ulysses' exchanges, forward and backward."""
        if shard.cp == 1 and shard.sp == 1:
            return 0.0, 0.0
        model, forward, backward = self.model, 0.0, 0.0
        kv = max(model.kv_heads / shard.tp, 1.0) * self.value_width
        if shard.cp > 1:
            crosses = shard.cp * shard.sp * shard.tp > self.network.domain
            ring = (shard.cp - 1) * send_s(self.network, 4.0 * shard.tokens * kv, crosses=crosses)
            forward = max(0.0, ring - _RING_HIDDEN * attention_f)
            backward = max(0.0, 2.0 * ring - _RING_HIDDEN * attention_b)
        if shard.sp > 1:
            size = 2.0 * shard.tokens * (2.0 * model.heads / shard.tp * self.query_width + 2.0 * kv)
            exchange = all_to_all_s(self.network, size, shard.sp, shard.tp)
            forward, backward = forward + exchange, backward + exchange
        return forward, backward

    def _ep(self, shard: Shard) -> float:
        """Seconds of dispatching tokens to experts and combining them, forward and backward."""
        moe = self.model.moe
        if moe is None or shard.ep == 1:
            return 0.0
        size = self.visits_bytes(shard) / shard.tp
        copies = 1.0
        domains = shard.ep * shard.tp / self.network.domain
        if self.calibration.ep_once and domains > 1:  # distinct nodes among top_k experts, against one message for each
            copies = domains * (1.0 - (1.0 - 1.0 / domains) ** moe.top_k) / moe.top_k
        seconds = all_to_all_s(self.network, size, shard.ep, shard.tp, copies)
        return 4.0 * seconds * self.calibration.ep_exposed

    def ends(self, shard: Shard) -> tuple[BlockTime, BlockTime]:
        """Seconds of the embedding, and of the output projection with the loss, for one micro-batch."""
        key = (shard.tp, shard.tokens)
        found = self._ends.get(key)
        if found is None:
            found = self._ends[key] = self._first_and_last(shard)
        return found

    def _first_and_last(self, shard: Shard) -> tuple[BlockTime, BlockTime]:
        model, tp, tokens = self.model, shard.tp, shard.tokens
        embed = moved_s(self.device, 2.0 * tokens * model.hidden * 8.0)
        reduce = all_reduce_s(self.network, 2.0 * tokens * model.hidden, tp) if tp > 1 else 0.0
        columns = -(-model.vocab // (128 * tp)) * 128
        device = self.device._replace(linear=self.device.half, itemsize=2.0)
        logits = (
            gemm_s(device, tokens, columns, model.hidden)
            + gemm_s(device, tokens, model.hidden, columns)
            + gemm_s(device, columns, model.hidden, tokens)
        )
        loss = moved_s(self.device, _LOSS_BYTES * tokens * columns)
        return BlockTime(memory_bound=embed, tp=reduce), BlockTime(gemm=logits, memory_bound=loss, tp=reduce)


_RING_HIDDEN = 0.9
"""Share of attention under which the ring's messages hide (arXiv 2310.01889)."""

_LOSS_BYTES = 40.0
"""Bytes per logit: the cast to fp32 (2 + 4), maximum, subtraction, exponential, sum, division (4 + 8 + 8 + 4 + 4), and
the gradient with its cast back (4 + 2 + 4), as in Megatron's vocabulary-parallel cross entropy."""

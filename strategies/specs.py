"""What is given: the model, the cluster and the batch. Values only; legality lives in :mod:`strategies.rules`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from strategies.hardware import Hardware
from strategies.ramp import Level, Ramp

Flavour = Literal["gpt3", "llama"]
Precision = Literal["fp32", "bf16", "fp16", "fp8"]
Routing = Literal["softmax", "sigmoid"]
"""Arithmetic of forward and backward; ``fp8`` multiplies in fp8 and keeps weights and activations in bf16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeSpec:
    """Mixture-of-experts feed-forward blocks. Every expert has the form of the model's dense feed-forward block.

    Attributes:
        experts: Routed experts per block.
        top_k: Experts that each token visits.
        ffn: Inner width of one expert.
        dense_layers: Leading transformer blocks that keep the dense feed-forward block.
        shared_ffn: Inner width of the experts that every token visits, all together; 0 for none.
        router_bias: The router adds one number per expert.
        imbalance: Load of the busiest expert over the average load, in planning.
        routing: How scores are made of the router's outputs: ``softmax`` over the experts, or ``sigmoid`` one by one.
        normalize: The weights of the experts that a token visits sum to 1; with one expert they never do, because the
            router would then learn nothing from the loss.
        capacity_factor: Tokens of a sequence that an expert takes, over the average number; later ones are dropped.
            Packed documents have that room each.
            0: it takes all.
        balance_weight: Weight of the load-balancing loss; 0 for none.
        z_weight: Weight of the router's z-loss; 0 for none.
    """

    experts: int
    top_k: int
    ffn: int
    dense_layers: int = 0
    shared_ffn: int = 0
    router_bias: bool = False
    imbalance: float = 1.1
    routing: Routing = "softmax"
    normalize: bool = True
    capacity_factor: float = 0.0
    balance_weight: float = 0.0
    z_weight: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2): queries, keys and values pass through narrow latents.

    Attributes:
        q_rank: Width of the query latent; 0 projects queries directly.
        kv_rank: Width of the key/value latent.
        nope_width: Width of a head's part without positions.
        rope_width: Width of a head's rotary part; all heads share one rotary key.
        value_width: Width of a head's value.
    """

    q_rank: int
    kv_rank: int
    nope_width: int
    rope_width: int
    value_width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryStretch:
    """How Llama 3.1 and later reach beyond the sequences of their first stage: slow rotary frequencies slow down.

    Attributes:
        factor: What the slow frequencies are divided by.
        low: Those are slow that turn fewer times than this in ``original`` tokens.
        high: Those stay that turn more often than this; between the two they slow down in part.
        original: Tokens of the sequences of the first stage.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only transformer.

    Attributes:
        name: Name of the config that made it.
        flavour: ``gpt3``: LayerNorm with bias, GELU (tanh form), learned positions, biases everywhere.
            ``llama``: RMSNorm, SwiGLU, rotary positions, no biases.
        layers: Number of transformer blocks.
        hidden: Width of the residual stream.
        heads: Number of query heads.
        kv_heads: Number of key/value heads (grouped-query attention when smaller than ``heads``).
        ffn: Inner width of the feed-forward block.
        vocab: Number of tokens, without padding.
        seq: Sequence length, in tokens.
        tied: The output projection shares the weights of the token embedding.
        norm_eps: Epsilon of the norms.
        init_std: Standard deviation of the initial weights.
        rope_theta: Base of the rotary frequencies (``llama`` only).
        rope_stretch: How they reach further (``llama`` only); None for plain frequencies.
        gated: The feed-forward block has a gate (SwiGLU, GeGLU); None means that of the flavour.
        head_width: Width of one head; 0 means ``hidden / heads``.
        position_rows: Learned positions; None means ``seq`` for ``gpt3`` and none for ``llama``.
        embed_norm: A norm follows the token embedding (BLOOM).
        moe: Experts instead of dense feed-forward blocks.
        latent: Latent attention instead of plain heads.
    """

    name: str
    flavour: Flavour = "gpt3"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq: int
    tied: bool = True
    norm_eps: float = 1e-5
    init_std: float = 0.02
    rope_theta: float = 10000.0
    rope_stretch: RotaryStretch | None = None
    gated: bool | None = None
    head_width: int = 0
    position_rows: int | None = None
    embed_norm: bool = False
    moe: MoeSpec | None = None
    latent: LatentAttention | None = None

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.head_width or self.hidden // self.heads

    @property
    def has_gate(self) -> bool:
        """Whether the feed-forward block has a gate."""
        return self.flavour == "llama" if self.gated is None else self.gated

    @property
    def learned_positions(self) -> int:
        """Number of learned positions."""
        default = self.seq if self.flavour == "gpt3" else 0
        return default if self.position_rows is None else self.position_rows

    @property
    def biased(self) -> bool:
        """Whether linear layers and norms have biases."""
        return self.flavour == "gpt3"

    @property
    def norm_parameters(self) -> int:
        """Number of parameters of one norm over the residual stream."""
        return self.hidden * (1 + self.biased)

    @property
    def attention_parameters(self) -> int:
        """Number of parameters of one block's attention: its projections, biases and inner norms."""
        if self.latent is not None:
            return self._latent_parameters(self.latent)
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = width + 2 * kv_width + self.hidden if self.biased else 0
        return 2 * self.hidden * width + 2 * self.hidden * kv_width + biases

    def _latent_parameters(self, latent: LatentAttention) -> int:
        """Latent attention as in DeepSeek-V2 (arXiv 2405.04434, section 2.1): no biases, a norm on each latent."""
        queries = self.heads * (latent.nope_width + latent.rope_width)
        if latent.q_rank:
            query = self.hidden * latent.q_rank + latent.q_rank + latent.q_rank * queries
        else:
            query = self.hidden * queries
        down = self.hidden * (latent.kv_rank + latent.rope_width) + latent.kv_rank
        up = latent.kv_rank * self.heads * (latent.nope_width + latent.value_width)
        return query + down + up + self.heads * latent.value_width * self.hidden

    def ffn_parameters(self, ffn: int) -> int:
        """Number of parameters of a feed-forward block (or expert) of inner width ``ffn``."""
        up = 2 if self.has_gate else 1
        biases = up * ffn + self.hidden if self.biased else 0
        return (up + 1) * self.hidden * ffn + biases

    @property
    def dense_layers(self) -> int:
        """Number of blocks with a dense feed-forward block: the leading ones of a model with experts, else all."""
        return self.layers if self.moe is None else min(self.layers, self.moe.dense_layers)

    @property
    def dense_block_parameters(self) -> int:
        """Number of parameters of one block with a dense feed-forward block."""
        return self.attention_parameters + self.ffn_parameters(self.ffn) + 2 * self.norm_parameters

    @property
    def expert_parameters(self) -> int:
        """Number of parameters of one routed expert; 0 without experts."""
        return 0 if self.moe is None else self.ffn_parameters(self.moe.ffn)

    @property
    def router_parameters(self) -> int:
        """Number of parameters of one block's router; 0 without experts."""
        return 0 if self.moe is None else self.moe.experts * (self.hidden + self.moe.router_bias)

    @property
    def shared_expert_parameters(self) -> int:
        """Number of parameters of one block's shared experts; 0 without them."""
        if self.moe is None or not self.moe.shared_ffn:
            return 0
        return self.ffn_parameters(self.moe.shared_ffn)

    @property
    def block_parameters(self) -> int:
        """Number of parameters of one transformer block; of one with experts if the model has them."""
        if self.moe is None:
            return self.dense_block_parameters
        return self._shared_block_parameters + self.moe.experts * self.expert_parameters

    @property
    def _shared_block_parameters(self) -> int:
        """Of a block with experts: what every token passes through."""
        return (
            self.attention_parameters
            + 2 * self.norm_parameters
            + self.router_parameters
            + self.shared_expert_parameters
        )

    @property
    def active_block_parameters(self) -> int:
        """Number of parameters of one block that a token passes through."""
        if self.moe is None:
            return self.dense_block_parameters
        return self._shared_block_parameters + min(self.moe.top_k, self.moe.experts) * self.expert_parameters

    @property
    def embedding_parameters(self) -> int:
        """Number of parameters before the first block: token embedding, learned positions, norm of the embedding."""
        norm = self.norm_parameters if self.embed_norm else 0
        return (self.vocab + self.learned_positions) * self.hidden + norm

    @property
    def head_parameters(self) -> int:
        """Number of parameters after the last block: final norm, plus the output projection when it is not tied."""
        return self.norm_parameters + (0 if self.tied else self.vocab * self.hidden)

    @property
    def parameters(self) -> int:
        """Exact number of trained parameters, without vocabulary padding, tied weights counted once."""
        return self._total(self.block_parameters)

    @property
    def active_parameters(self) -> int:
        """Number of parameters that one token passes through; all of them in a dense model."""
        return self._total(self.active_block_parameters)

    def _total(self, block: int) -> int:
        dense = self.dense_layers * self.dense_block_parameters
        return self.embedding_parameters + dense + (self.layers - self.dense_layers) * block + self.head_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSpec:
    """The machine.

    Attributes:
        name: Name of the config that made it.
        kind: ``local``: an embedded Ray cluster of several nodes on this machine. ``existing``: a running Ray
            cluster. ``process``: plain processes on this machine, without Ray.
        nodes: Number of nodes that carry ranks.
        slots_per_node: Number of devices (ranks) per node.
        spares: Number of further nodes kept warm.
        address: ``IP:PORT`` of the Ray head or ``http(s)://host:8265`` of its dashboard (``existing`` only).
        device: Name of the device kind (``A100-80GB``): the key of its calibration.
        device_memory_bytes: Memory per device; 0 when unknown.
        hardware: Speeds, prices and failure rates; None when unknown: then there is no time, cost or finish date.
    """

    name: str
    kind: Literal["local", "existing", "process"]
    nodes: int
    slots_per_node: int
    spares: int = 0
    address: str = ""
    device: str = "cpu"
    device_memory_bytes: int = 0
    hardware: Hardware | None = None

    @property
    def slots(self) -> int:
        """Number of ranks that the nodes (without spares) can carry."""
        return self.nodes * self.slots_per_node

    def watched(self, detect_s: float) -> ClusterSpec:
        """The same cluster, where a failure is noticed after so many seconds: that is the run's to say."""
        if self.hardware is None:
            return self
        return replace(self, hardware=replace(self.hardware, detect_s=detect_s))


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSpec:
    """The work of one optimizer step.

    Attributes:
        global_batch: Sequences per optimizer step, over all replicas; with a ramp, those that it grows to.
        seq: Tokens per sequence.
        ramp: How the batch grows; None: every step has the full size.
    """

    global_batch: int
    seq: int
    ramp: Ramp | None = None

    @property
    def levels(self) -> tuple[Level, ...]:
        """Every size of a step and from which sample on it holds, ascending; the first from sample 0 on."""
        full = Level(0, self.global_batch)
        return (full,) if self.ramp is None else self.ramp.levels(self.global_batch, self.seq)

    @property
    def smallest(self) -> int:
        """Sequences of the smallest step."""
        return self.ramp.smallest() if self.ramp is not None else self.global_batch

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.global_batch * self.seq

"""What is given: the model, the cluster and the batch. Values only; legality lives in :mod:`strategies.rules`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Flavour = Literal["gpt3", "llama"]
Precision = Literal["fp32", "bf16", "fp16"]


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

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    @property
    def block_parameters(self) -> int:
        """Number of parameters of one transformer block."""
        kv_width = self.kv_heads * self.head_dim
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * kv_width
        if self.flavour == "llama":
            return attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        biases = 2 * self.hidden + 2 * kv_width + self.ffn + self.hidden
        return attention + 2 * self.hidden * self.ffn + biases + 4 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Number of parameters before the first block: token embedding, plus learned positions."""
        positions = self.seq * self.hidden if self.flavour == "gpt3" else 0
        return self.vocab * self.hidden + positions

    @property
    def head_parameters(self) -> int:
        """Number of parameters after the last block: final norm, plus the output projection when it is not tied."""
        norm = self.hidden * (2 if self.flavour == "gpt3" else 1)
        return norm + (0 if self.tied else self.vocab * self.hidden)

    @property
    def parameters(self) -> int:
        """Exact number of trained parameters, without vocabulary padding, tied weights counted once."""
        return self.embedding_parameters + self.layers * self.block_parameters + self.head_parameters


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
        device: Name of the device kind, for people.
        device_memory_bytes: Memory per device; 0 when unknown.
    """

    name: str
    kind: Literal["local", "existing", "process"]
    nodes: int
    slots_per_node: int
    spares: int = 0
    address: str = ""
    device: str = "cpu"
    device_memory_bytes: int = 0

    @property
    def slots(self) -> int:
        """Number of ranks that the nodes (without spares) can carry."""
        return self.nodes * self.slots_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSpec:
    """The work of one optimizer step.

    Attributes:
        global_batch: Sequences per optimizer step, over all replicas.
        seq: Tokens per sequence.
    """

    global_batch: int
    seq: int

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.global_batch * self.seq

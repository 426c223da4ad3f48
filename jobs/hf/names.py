"""Our tensors in transformers' names: which of theirs is made of which of ours. One table for export and import.

GPT-2 keeps q, k and v in one matrix and stores its matrices with inputs first; Llama and Mixtral name ours one by one.
Rotary positions pair (i, i + d/2) of a head there as here, so that nothing is permuted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from strategies.errors import ConfigError
from strategies.specs import ModelSpec, MoeSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One tensor of a Hugging Face model.

    Attributes:
        name: Its name there.
        sources: Our tensors that it is made of, one below the other: global names with global shapes.
        transposed: It is stored with inputs first.
    """

    name: str
    sources: tuple[tuple[str, Shape], ...]
    transposed: bool = False

    @property
    def shape(self) -> Shape:
        """Its shape as stored there."""
        rows = sum(shape[0] for _, shape in self.sources)
        shape = (rows, *self.sources[0][1][1:])
        return shape[::-1] if self.transposed else shape


def require_layout(model: ModelSpec) -> None:
    """Refuse a model that transformers has no layout for.

    Raises:
        ConfigError: It says why.
    """
    moe = model.moe
    if model.latent is not None or model.embed_norm or model.has_gate != (model.flavour == "llama"):
        raise ConfigError(
            f"The model '{model.name}' has no layout in transformers that phalanx knows.",
            why="it has latent attention, a norm after the embedding, or the other flavour's feed-forward block",
        )
    own_width = model.heads * model.head_dim != model.hidden
    if model.flavour == "gpt3" and (model.kv_heads != model.heads or moe is not None or own_width):
        raise ConfigError(
            "transformers' GPT-2 has neither grouped key/value heads nor heads of a width of their own nor gates nor "
            "experts, so this model has no layout there.",
            hint="The Llama flavour (model.flavour=llama) has them.",
        )
    if moe is not None and (other := _not_mixtral(moe)):
        raise ConfigError(
            f"transformers' Mixtral has no layout for the experts of '{model.name}'.", why=f"it has no {other}"
        )


def _not_mixtral(moe: MoeSpec) -> str:
    """What of the experts Mixtral does not have; empty for nothing."""
    parts = {
        "dense blocks": moe.dense_layers > 0,
        "shared experts": moe.shared_ffn > 0,
        "bias of the router": moe.router_bias,
        "routing by sigmoids": moe.routing != "softmax",
        "weights that do not sum to 1": not moe.normalize or moe.top_k == 1,
        "tokens that are dropped": moe.capacity_factor > 0,
    }
    return ", no ".join(part for part, there in parts.items() if there)


def parts_of(model: ModelSpec) -> list[Part]:
    """Every tensor of the model in transformers' names.

    Raises:
        ConfigError: transformers has no such model.
    """
    require_layout(model)
    return list(_llama_parts(model) if model.flavour == "llama" else _gpt2_parts(model))


def _gpt2_parts(model: ModelSpec) -> Iterator[Part]:
    width, inner, vector = model.hidden, model.ffn, (model.hidden,)
    yield _one("transformer.wte.weight", "embed.tokens.weight", (model.vocab, width))
    yield _one("transformer.wpe.weight", "embed.positions.weight", (model.learned_positions, width))
    for index in range(model.layers):
        ours, theirs = f"blocks.{index}", f"transformer.h.{index}"
        for kind in ("weight", "bias"):
            matrix = kind == "weight"
            square, up, down = (
                ((width, width), (inner, width), (width, inner)) if matrix else (vector, (inner,), vector)
            )
            qkv = tuple((f"{ours}.attn.{letter}.{kind}", square) for letter in "qkv")
            yield _one(f"{theirs}.ln_1.{kind}", f"{ours}.attn_norm.{kind}", vector)
            yield Part(name=f"{theirs}.attn.c_attn.{kind}", sources=qkv, transposed=matrix)
            yield _one(f"{theirs}.attn.c_proj.{kind}", f"{ours}.attn.o.{kind}", square, transposed=matrix)
            yield _one(f"{theirs}.ln_2.{kind}", f"{ours}.mlp_norm.{kind}", vector)
            yield _one(f"{theirs}.mlp.c_fc.{kind}", f"{ours}.mlp.up.{kind}", up, transposed=matrix)
            yield _one(f"{theirs}.mlp.c_proj.{kind}", f"{ours}.mlp.down.{kind}", down, transposed=matrix)
    for kind in ("weight", "bias"):
        yield _one(f"transformer.ln_f.{kind}", f"head.norm.{kind}", vector)
    if not model.tied:
        yield _one("lm_head.weight", "head.output.weight", (model.vocab, width))


def _llama_parts(model: ModelSpec) -> Iterator[Part]:
    hidden, queries, keys = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    yield _one("model.embed_tokens.weight", "embed.tokens.weight", (model.vocab, hidden))
    for index in range(model.layers):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        yield _one(f"{theirs}.input_layernorm.weight", f"{ours}.attn_norm.weight", (hidden,))
        for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield _one(f"{theirs}.self_attn.{letter}_proj.weight", f"{ours}.attn.{letter}.weight", (rows, hidden))
        yield _one(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attn.o.weight", (hidden, queries))
        yield _one(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight", (hidden,))
        yield from _llama_mlp(model, ours, theirs)
    yield _one("model.norm.weight", "head.norm.weight", (hidden,))
    if not model.tied:
        yield _one("lm_head.weight", "head.output.weight", (model.vocab, hidden))


def _llama_mlp(model: ModelSpec, ours: str, theirs: str) -> Iterator[Part]:
    hidden, moe = model.hidden, model.moe
    if moe is None:
        for name in ("gate", "up", "down"):
            shape = (hidden, model.ffn) if name == "down" else (model.ffn, hidden)
            yield _one(f"{theirs}.mlp.{name}_proj.weight", f"{ours}.mlp.{name}.weight", shape)
        return
    yield _one(f"{theirs}.block_sparse_moe.gate.weight", f"{ours}.mlp.router.weight", (moe.experts, hidden))
    for expert in range(moe.experts):
        for letter, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            shape = (hidden, moe.ffn) if name == "down" else (moe.ffn, hidden)
            their_name = f"{theirs}.block_sparse_moe.experts.{expert}.{letter}.weight"
            yield _one(their_name, f"{ours}.mlp.experts.{expert}.{name}.weight", shape)


def _one(name: str, source: str, shape: Shape, *, transposed: bool = False) -> Part:
    return Part(name=name, sources=((source, shape),), transposed=transposed)

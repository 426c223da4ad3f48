"""A decoder-only transformer as a list of layers, each of which maps one tensor to one tensor.

GPT-3 flavour (LayerNorm, GELU, learned positions, biases) and Llama flavour (RMSNorm, SwiGLU, rotary positions,
grouped-query attention) are two configs of one model. The list is what a pipeline cuts into stages; chained, it is the
model of a rank without pipeline (:class:`Decoder`). Layers are built on the rank that runs them and only there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from jobs.distributed import Grid
from jobs.models.init import ParameterFactory
from jobs.models.moe import MixtureOfExperts
from jobs.models.packing import Documents, Layout
from jobs.models.past import Past
from jobs.parallel.linear import ColumnParallelLinear, RowParallelLinear
from jobs.parallel.router_log import RouterLog
from jobs.parallel.vocabulary import (
    IGNORE,
    VocabParallelEmbedding,
    VocabParallelProjection,
    project,
    vocab_parallel_cross_entropy,
)
from strategies.plan import Recompute
from strategies.specs import ModelSpec, MoeSpec, RotaryStretch

__all__ = ["IGNORE", "Decoder", "LayerSpec", "LossFunction", "Recipe", "layer_specs", "stage_bounds"]

TIED_KEY = "embed_tokens"  # DeepSpeed makes a module name of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything a layer needs to build itself.

    Attributes:
        model: The model.
        make: Makes the parameters of this rank.
        recompute: Which activations are computed again in backward instead of being kept.
        documents: Where the documents in a sequence begin and end; None where a sequence is one.
        router_log: Adds the routers' losses to the gradient and counts; None where nothing is trained.
        past: Keeps what attention has seen of a text that is continued; None where none is.
    """

    model: ModelSpec
    make: ParameterFactory
    recompute: Recompute = "none"
    documents: Documents | None = None
    router_log: RouterLog | None = None
    past: Past | None = None

    @property
    def layout(self) -> Layout | None:
        """How the documents of the micro-batch lie whose forward pass runs; None where a sequence is one."""
        if self.past is not None and self.past.next is not None:
            return self.past.next
        return self.documents.layout if self.documents is not None else None

    @classmethod
    def of(
        cls,
        model: ModelSpec,
        grid: Grid,
        *,
        seed: int,
        recompute: Recompute = "none",
        documents: Documents | None = None,
        router_log: RouterLog | None = None,
        past: Past | None = None,
    ) -> Recipe:
        """The recipe of one rank."""
        make = ParameterFactory(grid=grid, seed=seed, std=model.init_std)
        return cls(model=model, make=make, recompute=recompute, documents=documents, router_log=router_log, past=past)

    @property
    def moe(self) -> MoeSpec:
        """The experts of a model that has them."""
        assert self.model.moe is not None
        return self.model.moe

    @property
    def residual_std(self) -> float:
        """Initial deviation of the projections that write to the residual stream (two per block)."""
        return self.model.init_std / math.sqrt(2 * self.model.layers)


class TokenEmbedding(VocabParallelEmbedding):
    """``tokens [b, s] -> [b, s, hidden]``. With tied weights also the output projection."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.make, "embed.tokens", recipe.model.vocab, recipe.model.hidden)


class PositionEmbedding(nn.Module):
    """Adds learned positions (GPT-3 flavour)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        shape = (recipe.model.learned_positions, recipe.model.hidden)
        self.weight = recipe.make.make("embed.positions.weight", shape)
        self._grid = recipe.make.grid
        self._recipe = recipe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held, layout = self._grid.positions(x.shape[1]), self._recipe.layout
        return x + self._grid.region.shared(self.weight)[held if layout is None else layout.positions[:, held]]


class Norm(nn.Module):
    """LayerNorm with bias, or RMSNorm, computed in fp32."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        super().__init__()
        model = recipe.model
        self.weight = recipe.make.make(f"{name}.weight", (model.hidden,), mean=1.0, std=0.0)
        self.bias = None
        if model.flavour == "gpt3":
            self.bias = recipe.make.make(f"{name}.bias", (model.hidden,), std=0.0)
        self._eps = model.norm_eps
        self._region = recipe.make.grid.region

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._region.shared(self.weight)
        if self.bias is not None:
            return F.layer_norm(x, weight.shape, weight, self._region.shared(self.bias), self._eps)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self._eps)
        return (wide * scale).to(x.dtype) * weight


def rotate(
    x: torch.Tensor,
    theta: float,
    positions: torch.Tensor | None = None,
    stretch: RotaryStretch | None = None,
) -> torch.Tensor:
    """Rotary positions: pairs (i, i + d/2) of each head turn by ``position / theta^(2i/d)``.

    Args:
        x: ``[b, heads, s, d]``; position 0 comes first.
        theta: Base of the frequencies.
        positions: Other positions, ``[b, s]``.
        stretch: Which frequencies slow down.
    """
    length, width = x.shape[-2:]
    half = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
    frequencies = theta**-half if stretch is None else stretched(theta**-half, stretch)
    if positions is None:
        angle = torch.outer(torch.arange(length, device=x.device, dtype=torch.float32), frequencies)
    else:
        angle = positions[:, None, :, None].float() * frequencies
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def stretched(frequencies: torch.Tensor, how: RotaryStretch) -> torch.Tensor:
    """Rotary frequencies for longer sequences: slow ones slow down, fast ones stay."""
    turns = how.original * frequencies / (2 * math.pi)
    fast = ((turns - how.low) / (how.high - how.low)).clamp(0, 1)
    return frequencies * (fast + (1 - fast) / how.factor)


class Attention(nn.Module):
    """Causal self-attention; heads are split over the tensor-parallel ranks, key/value heads shared by groups."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        super().__init__()
        model, make = recipe.model, recipe.make
        bias = model.flavour == "gpt3"
        wide, narrow = model.heads * model.head_dim, model.kv_heads * model.head_dim
        self.q = ColumnParallelLinear(make, f"{name}.q", model.hidden, wide, bias=bias)
        self.k = ColumnParallelLinear(make, f"{name}.k", model.hidden, narrow, bias=bias)
        self.v = ColumnParallelLinear(make, f"{name}.v", model.hidden, narrow, bias=bias)
        self.o = RowParallelLinear(make, f"{name}.o", wide, model.hidden, bias=bias, std=recipe.residual_std)
        self._model = model
        self._name, self._past = name, recipe.past
        self._region = make.grid.region
        self._sequence = make.grid.sequence
        self._recompute = recipe.recompute == "selective"
        self._keep_mask = recipe.recompute == "none"

    def forward(self, x: torch.Tensor, layout: Layout | None = None) -> torch.Tensor:
        x = self._region.enter(x)
        q, k, v = self._sequence.to_heads(*(self._heads(layer(x)) for layer in (self.q, self.k, self.v)))
        if self._recompute and torch.is_grad_enabled():
            mixed = checkpoint(self._mix, q, k, v, layout, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed = self._mix(q, k, v, layout)
        return cast(torch.Tensor, self.o(self._sequence.to_tokens(mixed).transpose(1, 2).flatten(2)))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], -1, self._model.head_dim).transpose(1, 2)

    def _mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout | None) -> torch.Tensor:
        if self._model.flavour == "llama":
            positions = layout.positions if layout is not None else None
            q, k = (rotate(x, self._model.rope_theta, positions, self._model.rope_stretch) for x in (q, k))
        if self._past is not None:
            k, v = self._past.join(self._name, k, v)
        shared = q.shape[1] // k.shape[1]
        if shared > 1:
            k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        if layout is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask(q.dtype, keep=self._keep_mask))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class FeedForward(nn.Module):
    """GELU (tanh form) or SwiGLU; the inner ``width`` is split over the tensor-parallel ranks."""

    def __init__(self, recipe: Recipe, name: str, width: int) -> None:
        super().__init__()
        model, make = recipe.model, recipe.make
        bias = model.flavour == "gpt3"
        self.gate = None
        if model.flavour == "llama":
            self.gate = ColumnParallelLinear(make, f"{name}.gate", model.hidden, width, bias=False)
        self.up = ColumnParallelLinear(make, f"{name}.up", model.hidden, width, bias=bias)
        self.down = RowParallelLinear(make, f"{name}.down", width, model.hidden, bias=bias, std=recipe.residual_std)
        self._region = make.grid.region

    def forward(self, x: torch.Tensor, layout: Layout | None = None) -> torch.Tensor:
        """``layout`` is there for experts, which have room by the document; here each token is on its own."""
        x = self._region.enter(x)
        if self.gate is None:
            return cast(torch.Tensor, self.down(F.gelu(self.up(x), approximate="tanh")))
        return cast(torch.Tensor, self.down(F.silu(self.gate(x)) * self.up(x)))


def feed_forward(recipe: Recipe, name: str, index: int) -> nn.Module:
    """The second half of block ``index``: dense, or with experts."""
    moe = recipe.model.moe
    if moe is None or index < moe.dense_layers:
        return FeedForward(recipe, name, recipe.model.ffn)
    shared = FeedForward(recipe, f"{name}.shared", moe.shared_ffn) if moe.shared_ffn else None
    return MixtureOfExperts(recipe, name, layer=index, shared=shared)


class Block(nn.Module):
    """One transformer block: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(self, recipe: Recipe, index: int) -> None:
        super().__init__()
        name = f"blocks.{index}"
        self.attn_norm = Norm(recipe, f"{name}.attn_norm")
        self.attn = Attention(recipe, f"{name}.attn")
        self.mlp_norm = Norm(recipe, f"{name}.mlp_norm")
        self.mlp = feed_forward(recipe, f"{name}.mlp", index)
        self._recompute = recipe.recompute == "full"
        self._recipe = recipe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layout = self._recipe.layout  # of this forward pass: a recomputation comes when others have begun
        if self._recompute and torch.is_grad_enabled():
            return cast(torch.Tensor, checkpoint(self._block, x, layout, use_reentrant=True, preserve_rng_state=False))
        return self._block(x, layout)

    def _block(self, x: torch.Tensor, layout: Layout | None) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), layout)
        return cast(torch.Tensor, x + self.mlp(self.mlp_norm(x), layout))


class FinalNorm(Norm):
    """The norm after the last block."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, "head.norm")


class OutputProjection(VocabParallelProjection):
    """``[b, s, hidden] -> [b, s, vocab / tp]`` logits, with weights of its own."""

    def __init__(self, recipe: Recipe) -> None:
        shape = (recipe.model.vocab, recipe.model.hidden)
        super().__init__(recipe.make.make("head.output.weight", shape, axis=0), recipe.make.grid.region)


def project_tied(embedding: TokenEmbedding, x: torch.Tensor) -> torch.Tensor:
    """Logits from the token embedding's weights."""
    return project(x, embedding.weight, embedding.region)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One entry of the list: how to build the layer, and how to run it when it is tied.

    Attributes:
        build: Class of the layer; its arguments are ``args``.
        args: Arguments of the constructor.
        tied: Layers that share one module carry the same key; empty for none.
        run: ``run(module, x)`` instead of ``module(x)`` for the later users of a tied module.
    """

    build: type[nn.Module]
    args: tuple[object, ...]
    tied: str = ""
    run: Callable[[TokenEmbedding, torch.Tensor], torch.Tensor] | None = None


def layer_specs(recipe: Recipe) -> list[LayerSpec]:
    """The whole model, first layer to last: embedding, blocks, norm, output projection."""
    model = recipe.model
    tied = TIED_KEY if model.tied else ""
    layers = [LayerSpec(build=TokenEmbedding, args=(recipe,), tied=tied)]
    if model.flavour == "gpt3":
        layers.append(LayerSpec(build=PositionEmbedding, args=(recipe,)))
    layers.extend(LayerSpec(build=Block, args=(recipe, index)) for index in range(model.layers))
    layers.append(LayerSpec(build=FinalNorm, args=(recipe,)))
    if model.tied:
        layers.append(LayerSpec(build=TokenEmbedding, args=(recipe,), tied=tied, run=project_tied))
    else:
        layers.append(LayerSpec(build=OutputProjection, args=(recipe,)))
    return layers


def stage_bounds(model: ModelSpec, stages: tuple[int, ...]) -> list[int]:
    """Where each stage starts in the list of layers, plus the end: embedding first, norm and projection last."""
    before = 2 if model.flavour == "gpt3" else 1
    bounds = [0]
    for blocks in stages:
        bounds.append(bounds[-1] + blocks + (before if len(bounds) == 1 else 0))
    bounds[-1] += 2
    return bounds


class LossFunction:
    """Sum of the cross entropies of one micro-batch, times a constant.

    Args:
        model: The model.
        grid: The rank's place.

    Attributes:
        scale: The constant: with ``replicas x micro-batches / real tokens of the step`` the mean over replicas and
            micro-batches, which DeepSpeed computes, is the sum over all real tokens divided by their number. The engine
            sets it before every step.
    """

    def __init__(self, model: ModelSpec, grid: Grid, scale: float = 1.0) -> None:
        self.scale = scale
        self._vocab = model.vocab
        self._grid = grid

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = vocab_parallel_cross_entropy(
            logits, targets, vocab=self._vocab, rank=self._grid.model, group=self._grid.model_group
        )
        return losses.sum() * self.scale


class Decoder(nn.Module):
    """The whole model on one rank (or one per tensor-parallel shard), without pipeline.

    Args:
        recipe: What to build.
        loss: What :meth:`forward` applies to the logits when it is given targets.
    """

    def __init__(self, recipe: Recipe, loss: LossFunction | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self._loss = loss
        self._documents = recipe.documents
        for spec in layer_specs(recipe):
            if spec.run is None:
                self.layers.append(spec.build(*spec.args))
            else:
                embedding = cast(TokenEmbedding, self.layers[0])
                self.layers.append(VocabParallelProjection(embedding.weight, embedding.region))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[b, s, padded vocab / tp]``, or the loss when targets are given."""
        if self._documents is not None:
            self._documents.show(tokens)
        x = tokens
        for layer in self.layers:
            x = layer(x)
        return x if targets is None or self._loss is None else self._loss(x, targets)

"""Mixture of experts: a feed-forward block of which every token passes through a few parts, chosen by a router.

Experts are dealt to the replicas of an expert-parallel group, each split over its tensor-parallel ranks along the inner
width as a dense feed-forward block is. The router is on every rank and computes in fp32. What is sent, and by whom, is
in :mod:`jobs.parallel.deal` and :mod:`jobs.parallel.experts`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from jobs.models.packing import Layout
from jobs.models.routing import balance_loss, choose, visits, z_loss
from jobs.parallel.collectives import copy_to_ranks
from jobs.parallel.deal import Deal
from jobs.parallel.experts import Dispatch
from jobs.parallel.router_log import Seen

if TYPE_CHECKING:
    from jobs.models.gpt import Recipe


class Router(nn.Module):
    """``[b, s, hidden] -> [b, s, experts]``: one number per expert, in fp32 whatever the precision."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        super().__init__()
        model, moe = recipe.model, recipe.moe
        self.weight = recipe.make.make(f"{name}.weight", (moe.experts, model.hidden))
        self.bias = recipe.make.make(f"{name}.bias", (moe.experts,), std=0.0) if moe.router_bias else None
        self._dealers = Deal.of(recipe.make.grid).group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = copy_to_ranks(self.weight.float(), self._dealers)
        logits = cast(torch.Tensor, _Scores.apply(x, weight))  # type: ignore[no-untyped-call]
        return logits if self.bias is None else logits + copy_to_ranks(self.bias.float(), self._dealers)


class _Scores(torch.autograd.Function):
    """``x @ weight.T`` in fp32, which keeps ``x`` as it is and not a wide copy of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (grad @ weight).to(x.dtype), rows.T @ x.flatten(0, -2).float()


class Expert(nn.Module):
    """One expert: ``[rows, hidden] -> [rows, hidden]``, of which this rank computes a part of a sum over its shards."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        super().__init__()
        model, make, ffn = recipe.model, recipe.make, recipe.moe.ffn
        wide, narrow = (ffn, model.hidden), (model.hidden, ffn)
        biased = model.biased
        self.gate = make.make(f"{name}.gate.weight", wide, axis=0, expert=True) if model.has_gate else None
        self.up = make.make(f"{name}.up.weight", wide, axis=0, expert=True)
        self.up_bias = make.make(f"{name}.up.bias", (ffn,), axis=0, std=0.0, expert=True) if biased else None
        self.down = make.make(f"{name}.down.weight", narrow, axis=1, std=recipe.residual_std, expert=True)
        self.down_bias = make.make(f"{name}.down.bias", (model.hidden,), std=0.0, expert=True) if biased else None
        self._counts = make.grid.model == 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            inner = F.gelu(F.linear(x, self.up, self.up_bias), approximate="tanh")
        else:
            inner = F.silu(F.linear(x, self.gate)) * F.linear(x, self.up, self.up_bias)
        if self.down_bias is None or self._counts:
            return F.linear(inner, self.down, self.down_bias)
        # The bias counts once in the sum over the shards, and its gradient is whole on all of them.
        return F.linear(inner, self.down, self.down_bias - self.down_bias.detach())


class MixtureOfExperts(nn.Module):
    """Router, this rank's share of the experts, and what every token passes through besides.

    Args:
        recipe: How to build it.
        name: Global name.
        layer: Which of the model's blocks this is.
        shared: The shared experts, one block for all of them; None for none.
    """

    def __init__(self, recipe: Recipe, name: str, *, layer: int, shared: nn.Module | None) -> None:
        super().__init__()
        grid, moe = recipe.make.grid, recipe.moe
        share = moe.experts // grid.ep
        self.router = Router(recipe, f"{name}.router")
        # Names count through all experts of the layer, so that they do not depend on who has which.
        mine = range(grid.expert * share, (grid.expert + 1) * share)
        self.experts = nn.ModuleList(Expert(recipe, f"{name}.experts.{number}") for number in mine)
        self.shared = shared
        self._layer = layer
        self._length = recipe.model.seq
        self._moe = moe
        self._grid = grid
        self._log = recipe.router_log
        self._deal = Deal.of(grid)

    def forward(self, x: torch.Tensor, layout: Layout | None = None) -> torch.Tensor:
        out = self._routed(x, layout)
        return out if self.shared is None else out + self.shared(x)

    def _routed(self, x: torch.Tensor, layout: Layout | None) -> torch.Tensor:
        """What the chosen experts make of the tokens."""
        ranks, deal = self._grid.sequence, self._deal
        own = deal.take(x)
        # Of a sequence all is decided alike on all tensor-parallel ranks, whichever of its tokens they have.
        logits = deal.whole(self.router(own), x)
        choice = choose(logits, self._moe, self._length, ranks, layout)
        kept = choice.kept
        if kept is None and deal.fills(x):
            kept = torch.ones_like(choice.experts, dtype=torch.bool)
        parts = None if kept is None else deal.parts(kept)
        way = Dispatch(deal.parts(choice.experts), parts, self._moe.experts, self._grid)
        rows = way.send(own.flatten(0, 1))
        # Experts that no token visits compute, too: on nothing. Their gradient is zero then, under every plan.
        made = [cast(torch.Tensor, expert(part)) for expert, part in zip(self.experts, rows, strict=True)]
        out = deal.give(way.collect(made, deal.parts(choice.weights)[deal.rank]), x)
        if self._log is None or not torch.is_grad_enabled():
            return out
        with torch.no_grad():
            seen = self._see(choice.experts, choice.kept)
        group = self._grid.model_group if self._grid.split else None
        return self._log.watch(out, balance_loss(choice, ranks), z_loss(logits, ranks), seen, group)

    def _see(self, experts: torch.Tensor, kept: torch.Tensor | None) -> Seen:
        load = visits(experts, self._moe.experts, kept)
        share = self._moe.experts // self._grid.ep
        here = load[:, self._grid.expert * share : (self._grid.expert + 1) * share].sum(dim=1)
        wanted, taken = experts.shape[1] * experts.shape[2], load.sum(dim=1)
        part = 1 / self._grid.sp
        return Seen(layer=self._layer, part=part, load=load, dropped=wanted - taken, crossed=taken - here)

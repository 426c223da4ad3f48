"""The auxiliary losses of the routers on their way into the gradient, and what is worth knowing of the routing.

The losses are not sent along: through a pipeline, only activations travel. Each layer adds its own gradient where its
losses are made, in backward, when the gradient of the token loss passes by (:meth:`RouterLog.watch`). That gradient
also tells which rows are padding, for no other row has a gradient of exactly zero: they weigh nothing here either. So
the gradient is that of *token loss + weighted means of the auxiliary losses over the sequences of the global batch*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

from jobs.distributed import Grid
from jobs.parallel.collectives import all_reduce
from strategies.specs import ModelSpec, MoeSpec


class Seen(NamedTuple):
    """What a router has done with the sequences of one micro-batch; one row per sequence.

    Attributes:
        layer: Which of the model's blocks it belongs to.
        part: Which part of each sequence this rank has: 1 but for ranks that share sequences.
        load: ``[b, experts]`` tokens that visited each expert.
        dropped: ``[b]`` visits for which there was no room.
        crossed: ``[b]`` visits to experts of another rank.
    """

    layer: int
    part: float
    load: torch.Tensor
    dropped: torch.Tensor
    crossed: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterStats:
    """Routing in one optimizer step, over all ranks and layers; equal on every rank.

    Attributes:
        aux_loss: What was added to the token loss for the gradient: both losses below, times their weights.
        balance_loss: Load-balancing loss, mean over sequences, summed over layers.
        z_loss: The router's z-loss, likewise.
        load: Visits of tokens per expert, over all layers; layers that are uneven in opposite ways look even here.
        imbalance: Load of the busiest expert over the average load, in the layer where it is largest.
        imbalance_layer: Which of the model's blocks that is.
        dropped: Visits for which an expert had no room.
        crossed: Visits for which a token went to another rank.
    """

    aux_loss: float
    balance_loss: float
    z_loss: float
    load: tuple[int, ...]
    imbalance: float
    imbalance_layer: int
    dropped: int
    crossed: int


class RouterLog:
    """Sees every router of one rank.

    Args:
        model: The model.
        moe: Its experts.
        row_weight: Weight of one sequence in the gradient, as the engine scales it: 1 / sequences of the step, times
            the replicas over which DeepSpeed averages. The engine keeps it up to date.
    """

    def __init__(self, model: ModelSpec, moe: MoeSpec, row_weight: float = 0.0) -> None:
        self._moe = moe
        self.row_weight = row_weight
        self.loss_scale = 1.0  # of fp16, likewise
        # Per layer: load of each expert, then dropped, crossed, balance loss, z-loss, sequences
        self._table = torch.zeros(model.layers, moe.experts + 5, dtype=torch.float64)

    def watch(
        self,
        x: torch.Tensor,
        balance: torch.Tensor,
        z: torch.Tensor,
        seen: Seen,
        group: dist.ProcessGroup | None = None,
    ) -> torch.Tensor:
        """Identity on ``x [b, s, width]``; in backward, the losses ``[b]`` get their gradient and all is noted.

        Args:
            x: What the gradient of the token loss passes through.
            balance: Load-balancing loss of each sequence.
            z: Its z-loss.
            seen: What the router has done.
            group: The ranks that have the other tokens of the same sequences but the same losses; None where all have
                all tokens. Backward is collective among them.
        """
        return cast(torch.Tensor, _Watch.apply(x, balance, z, seen, self, group))  # type: ignore[no-untyped-call]

    def gradients(self, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of balance and z-loss of each sequence; ``real`` is 0 for padding and 1 else."""
        weight = real * (self.row_weight * self.loss_scale)
        return weight * self._moe.balance_weight, weight * self._moe.z_weight

    def note(self, seen: Seen, balance: torch.Tensor, z: torch.Tensor, real: torch.Tensor) -> None:
        """Count sequences that are ``real``."""
        columns = (seen.dropped, seen.crossed, balance, z, torch.full_like(balance, seen.part))
        rows = torch.cat([seen.load.double(), torch.stack([column.double() for column in columns], dim=1)], dim=1)
        self._table = self._table.to(rows.device)
        self._table[seen.layer] += (rows * real.double().unsqueeze(-1)).sum(dim=0)

    def take(self, grid: Grid) -> RouterStats:
        """What all ranks have seen since the last call. Collective."""
        table, self._table = self._table, torch.zeros_like(self._table)
        all_reduce(all_reduce(table, grid.data_group), grid.pipe_group)
        experts = self._moe.experts
        numbers = table[:, -1].nonzero().flatten()  # those with a router
        layers = table[numbers]
        load = layers[:, :experts]
        balance, z = (float((layers[:, experts + i] / layers[:, -1]).sum()) for i in (2, 3))
        ratios = load.amax(dim=1) / load.mean(dim=1).clamp(min=1e-9)
        worst = int(ratios.argmax()) if len(layers) else None
        return RouterStats(
            aux_loss=self._moe.balance_weight * balance + self._moe.z_weight * z,
            balance_loss=balance,
            z_loss=z,
            load=tuple(int(count) for count in load.sum(dim=0)),
            imbalance=0.0 if worst is None else float(ratios[worst]),
            imbalance_layer=0 if worst is None else int(numbers[worst]),
            dropped=int(layers[:, experts].sum()),
            crossed=int(layers[:, experts + 1].sum()),
        )


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        balance: torch.Tensor,
        z: torch.Tensor,
        seen: Seen,
        log: RouterLog,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(balance, z)
        ctx.seen, ctx.log, ctx.group = seen, log, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None, None]:
        balance, z = ctx.saved_tensors
        real = grad.flatten(1).abs().amax(dim=1).ne(0).to(balance.dtype)
        real = all_reduce(real, ctx.group, dist.ReduceOp.MAX)
        ctx.log.note(ctx.seen, balance, z, real)
        return grad, *ctx.log.gradients(real), None, None, None

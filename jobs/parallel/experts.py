"""Tokens on their way to the experts and back: sorted by expert, traded between the ranks that share the experts.

The order is a function of the choices alone: by expert, and for one expert by (rank, token, choice). Nothing is added
up on the way but what one token gets from its own experts, so results do not depend on timing.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist

from jobs.distributed import Grid


class Dispatch:
    """The way of the tokens of one rank through one layer.

    Args:
        experts: ``[tokens, k]`` numbers of the experts that each token visits.
        kept: ``[tokens, k]`` whether it really does; None for always.
        count: Number of experts over all ranks; each rank of ``grid.expert_group`` has an equal share, in order.
        grid: This rank's place.
    """

    def __init__(self, experts: torch.Tensor, kept: torch.Tensor | None, count: int, grid: Grid) -> None:
        self._choices = experts.shape[1]
        self._group = grid.expert_group
        number = experts.flatten()
        if kept is not None:
            number = torch.where(
                kept.flatten(), number, count
            )  # to an expert that does not exist: sorted last, cut off
        order = number.argsort(stable=True)
        self._place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = torch.bincount(number, minlength=count)[:count]
        self._sent = counts.view(grid.ep, -1)
        arriving = self._sent
        if self._group is not None:
            arriving = torch.empty_like(self._sent)
            dist.all_to_all_single(arriving, self._sent, group=self._group)
            self._by_expert, self._by_rank = _regroup(arriving)
        # One look at the numbers: where the experts are on a device, everything up to here has to be done first.
        self._send = self._sent.sum(dim=1).tolist()
        self._receive = arriving.sum(dim=1).tolist()
        self.sizes: list[int] = arriving.sum(dim=0).tolist()
        self._order = order[: sum(self._send)]

    def send(self, tokens: torch.Tensor) -> torch.Tensor:
        """Bring ``[tokens, width]`` to the experts: all that this rank's experts get, those of the first one first.

        How many each of them gets is in :attr:`sizes`.
        """
        rows = _gather(tokens, self._order, self._place, self._choices)
        if self._group is None:
            return rows
        rows = trade(rows, self._send, self._receive, self._group)
        return _permute(rows, self._by_expert, self._by_rank)

    def collect(self, rows: torch.Tensor) -> torch.Tensor:
        """Bring what the experts have made of the tokens back: ``[tokens, k, width]``, zero where one was not kept."""
        if self._group is not None:
            rows = _permute(rows, self._by_rank, self._by_expert)
            rows = trade(rows, self._receive, self._send, self._group)
        return _spread(rows, self._order, self._place, self._choices)


def _regroup(arriving: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From the order (rank, expert) to (expert, rank), and back.

    Args:
        arriving: ``[ranks, experts]`` how many rows there are of each.
    """
    ranks, experts = arriving.shape
    kinds = torch.arange(experts, device=arriving.device).repeat(ranks).repeat_interleave(arriving.flatten())
    there = kinds.argsort(stable=True)
    return there, torch.empty_like(there).scatter_(0, there, torch.arange(len(there), device=there.device))


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_to_all(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    out = rows.new_empty((sum(receive), rows.shape[1]))
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


def trade(rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank sends ``send[i]`` rows to rank i of the group, in order, and gets ``receive[i]`` from it."""
    return cast(torch.Tensor, _Trade.apply(rows, send, receive, group))  # type: ignore[no-untyped-call]


class _Permute(torch.autograd.Function):
    """Without torch's own backward, which adds into zeros: here every row comes from exactly one."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


def _permute(rows: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, _Permute.apply(rows, there, back))  # type: ignore[no-untyped-call]


def _rows_at(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """``rows[place]``; zero where a place lies behind the last row."""
    if len(rows) == len(place):
        return rows.index_select(0, place)
    padded = torch.cat([rows, rows.new_zeros((1, rows.shape[1]))])
    return padded.index_select(0, place.clamp(max=len(rows)))


class _Gather(torch.autograd.Function):
    """``tokens[order // k]``: a copy of its token for every visit. Backward adds a token's visits up in their order."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, order: torch.Tensor, place: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.k = k
        return tokens.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        return _rows_at(grad, place).view(-1, ctx.k, grad.shape[1]).sum(dim=1), None, None, None


class _Spread(torch.autograd.Function):
    """Rows in the order of their visits: ``[tokens, k, width]``, zero for visits that were not kept."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, place: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(order)
        return _rows_at(rows, place).view(-1, k, rows.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad.flatten(0, 1).index_select(0, order), None, None, None


def _gather(tokens: torch.Tensor, order: torch.Tensor, place: torch.Tensor, k: int) -> torch.Tensor:
    return cast(torch.Tensor, _Gather.apply(tokens, order, place, k))  # type: ignore[no-untyped-call]


def _spread(rows: torch.Tensor, order: torch.Tensor, place: torch.Tensor, k: int) -> torch.Tensor:
    return cast(torch.Tensor, _Spread.apply(rows, order, place, k))  # type: ignore[no-untyped-call]

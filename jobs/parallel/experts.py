"""Tokens on their way to the experts and back: sorted by expert, traded between the ranks that share the experts.

The order is a function of the choices alone: by expert, and for one expert by (rank, token, choice). Nothing is added
up on the way but what one token gets from its own experts, and the shards of an expert's output, so results do not
depend on timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist

from jobs.distributed import Grid
from jobs.parallel.collectives import copy_to_ranks, reduce_from_ranks


class Dispatch:
    """The way of the tokens of one rank through one layer.

    Where tensor-parallel ranks deal the tokens among them (:mod:`jobs.parallel.deal`), each trades its own with the
    ranks of its shard; what arrived is then spread over the shards, and their outputs are added up on the way back.

    Args:
        experts: ``[parts, tokens, k]`` numbers of the experts that each token visits: one part of the tokens for each
            tensor-parallel rank, or just one part, which all of them have.
        kept: ``[parts, tokens, k]`` whether it really does; None for always.
        count: Number of experts over all ranks; each rank of ``grid.expert_group`` has an equal share, in order.
        grid: This rank's place.
    """

    def __init__(self, experts: torch.Tensor, kept: torch.Tensor | None, count: int, grid: Grid) -> None:
        parts, _, self._choices = experts.shape
        self._group = grid.expert_group
        self._dealers = grid.model_group if parts > 1 else None
        self._shards = None if parts > 1 else grid.model_group
        number = experts.flatten(1)
        if kept is not None:
            number = torch.where(
                kept.flatten(1), number, count
            )  # to an expert that does not exist: sorted last, cut off
        mine = grid.model if parts > 1 else 0
        order = number[mine].argsort(stable=True)
        self._place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        sent = _loads(number, count).view(parts, grid.ep, -1).transpose(0, 1).contiguous()  # by where they go
        arriving = sent
        if self._group is not None:
            arriving = torch.empty_like(sent)
            dist.all_to_all_single(arriving, sent, group=self._group)
        # One look at the numbers: where the experts are on a device, everything up to here has to be done first.
        self._send: list[int] = sent[:, mine].sum(dim=1).tolist()
        self._receive: list[int] = arriving[:, mine].sum(dim=1).tolist()
        self._arrived: list[int] = arriving.sum(dim=(0, 2)).tolist()  # on each of the dealers
        self._sizes: list[int] = arriving.sum(dim=(0, 1)).tolist()
        if self._group is not None:
            self._shares = torch.split(_by_expert(arriving.transpose(0, 1).flatten(0, 1)), self._sizes)
        self._order = order[: sum(self._send)]

    def send(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Bring ``[tokens, width]`` to the experts: what each of this rank's experts gets, ``[rows, width]``."""
        rows = _gather(copy_to_ranks(tokens, self._shards), self._order, self._place, self._choices)
        if self._group is None:
            return list(torch.split(rows, self._sizes))
        rows = trade(rows, self._send, self._receive, self._group)
        return _deal(self._spread(rows), self._shares)

    def collect(self, made: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """Bring back what the experts have made of the tokens, and add up what each token gets: ``[tokens, width]``.

        Args:
            made: ``[rows, width]`` of each of this rank's experts, part of a sum over the shards.
            weights: ``[tokens, k]`` what the output of each is multiplied with, fp32.
        """
        if self._group is None:
            rows = torch.cat(list(made))
        else:
            rows = self._added(_merge(made, self._shares))
            rows = trade(rows, self._receive, self._send, self._group)
        # Of parts of a sum the gradient of the weights comes in parts, too; they are whole on every shard.
        weights = copy_to_ranks(weights, self._shards)
        return reduce_from_ranks(_add_up(rows, weights, self._order, self._place), self._shards)

    def _spread(self, rows: torch.Tensor) -> torch.Tensor:
        """What arrived on all of the dealers, in their order. An exchange, for no two have equally many rows."""
        if self._dealers is None:
            return rows
        parts = len(self._arrived)
        copies = rows.expand(parts, *rows.shape).flatten(0, 1)
        return trade(copies, [len(rows)] * parts, self._arrived, self._dealers)

    def _added(self, rows: torch.Tensor) -> torch.Tensor:
        """Of the sum over the dealers, whose shards of the experts have each made a part of it, the rows that arrived
        here."""
        if self._dealers is None:
            return rows
        parts, own = len(self._arrived), sum(self._receive)
        shares = trade(rows, self._arrived, [own] * parts, self._dealers)
        return shares.view(parts, own, rows.shape[1]).sum(dim=0)


def _loads(number: torch.Tensor, count: int) -> torch.Tensor:
    """``[parts, visits] -> [parts, count]``: how many visits of each part go to each expert; others do not count."""
    parts = number.shape[0]
    first = torch.arange(parts, device=number.device).unsqueeze(1) * (count + 1)
    loads = torch.bincount((number + first).flatten(), minlength=parts * (count + 1))
    return loads.view(parts, count + 1)[:, :count].contiguous()


def _by_expert(arriving: torch.Tensor) -> torch.Tensor:
    """Where the rows of the first expert lie among what arrived, in order (rank, expert); then those of the next.

    Args:
        arriving: ``[ranks, experts]`` how many rows there are of each.
    """
    ranks, experts = arriving.shape
    kinds = torch.arange(experts, device=arriving.device).repeat(ranks).repeat_interleave(arriving.flatten())
    return kinds.argsort(stable=True)


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


def _merged(parts: Sequence[torch.Tensor], shares: Sequence[torch.Tensor]) -> torch.Tensor:
    out = parts[0].new_empty((sum(len(part) for part in parts), parts[0].shape[1]))
    for part, places in zip(parts, shares, strict=True):
        out.index_copy_(0, places, part)
    return out


class _Deal(torch.autograd.Function):
    """Without torch's own backward, which adds into zeros: here every row comes from exactly one."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, *shares: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*shares)
        return tuple(rows.index_select(0, places) for places in shares)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _merged(grads, ctx.saved_tensors), *(None for _ in grads)


class _Merge(torch.autograd.Function):
    """The reverse."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> torch.Tensor:
        parts, shares = tensors[:count], tensors[count:]
        ctx.save_for_backward(*shares)
        return _merged(parts, shares)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shares = ctx.saved_tensors
        return None, *(grad.index_select(0, places) for places in shares), *(None for _ in shares)


def _deal(rows: torch.Tensor, shares: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if len(shares) == 1:  # all are for one expert, and in order
        return [rows]
    return list(_Deal.apply(rows, *shares))  # type: ignore[no-untyped-call]


def _merge(parts: Sequence[torch.Tensor], shares: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(shares) == 1:
        return parts[0]
    return cast(torch.Tensor, _Merge.apply(len(parts), *parts, *shares))  # type: ignore[no-untyped-call]


def _with_zero(rows: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows`` with one of zeros behind them, to which all of ``place`` point that lie behind the last."""
    if len(rows) == len(place):
        return rows, place
    return torch.cat([rows, rows.new_zeros((1, rows.shape[1]))]), place.clamp(max=len(rows))


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
        rows, place = _with_zero(grad, place)
        out, *others = (rows.index_select(0, places) for places in place.view(-1, ctx.k).unbind(1))
        out = out.float()
        for other in others:
            out += other
        return out.to(grad.dtype), None, None, None


class _AddUp(torch.autograd.Function):
    """Rows in the order of their visits, weighted: ``[tokens, width]``; a visit that was not kept adds nothing."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, place: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weights, order)
        source, place = _with_zero(rows, place)
        columns = zip(place.view_as(weights).unbind(1), torch.split(weights, 1, dim=1), strict=True)
        places, weight = next(columns)
        out = source.index_select(0, places) * weight  # in fp32, as the weights are
        for places, weight in columns:
            out.addcmul_(source.index_select(0, places), weight)
        return out.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        rows, weights, order = ctx.saved_tensors
        visits = grad.index_select(0, order // weights.shape[1])
        # Of every visit its own number, so the order in which they are put does not matter.
        share = (visits * rows).sum(dim=1, dtype=weights.dtype)
        of_weights = torch.zeros_like(weights).view(-1).index_copy_(0, order, share)
        of_rows = visits * weights.flatten().index_select(0, order).unsqueeze(1)
        return of_rows.to(rows.dtype), of_weights.view_as(weights), None, None


def _gather(tokens: torch.Tensor, order: torch.Tensor, place: torch.Tensor, k: int) -> torch.Tensor:
    return cast(torch.Tensor, _Gather.apply(tokens, order, place, k))  # type: ignore[no-untyped-call]


def _add_up(rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, _AddUp.apply(rows, weights, order, place))  # type: ignore[no-untyped-call]

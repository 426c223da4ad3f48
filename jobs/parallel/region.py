"""What lies between the tensor-parallel layers: whole on every rank, or each rank a part of the sequence (Megatron).

A pair of layers (column-parallel, row-parallel) is entered through :meth:`TensorRegion.enter` and left through
:meth:`TensorRegion.leave`. Without sequence parallelism these are ``copy_to_ranks`` and ``reduce_from_ranks``: what is
outside of a pair is computed by all tensor-parallel ranks from equal inputs. With it (Korthikanti et al., 2022, arXiv
2205.05198) every rank keeps ``s / tp`` tokens of norms and of the residual stream; the sum of a row-parallel layer
becomes a reduce-scatter, the input of a column-parallel one an all-gather, which together move as many bytes as the
sum did. A parameter that is whole on all ranks then sees other tokens on each: its gradients are summed over them
(:meth:`TensorRegion.shared`), in every backward pass, so that every ZeRO stage and every schedule gets whole ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist

from jobs.parallel.collectives import copy_to_ranks, reduce_from_ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRegion:
    """How the tensor-parallel ranks share what lies between their layers.

    Attributes:
        group: The tensor-parallel group; None for a group of one.
        split: Each rank has a part of the sequence; else all have the whole.
    """

    group: dist.ProcessGroup | None = None
    split: bool = False

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The whole sequence, for layers of which every rank computes a part of the outputs.

        Args:
            x: ``[b, s, ...]``, or ``[b, s / tp, ...]`` where the sequence is split.
        """
        return _apply(_GatherSum, x, self.group) if self._splits else copy_to_ranks(x, self.group)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, of which every rank keeps its part where the sequence is split."""
        return _apply(_SumScatter, x, self.group) if self._splits else reduce_from_ranks(x, self.group)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """The whole sequence, for what every rank computes alike, inputs and gradients being equal on all."""
        return _apply(_GatherSlice, x, self.group) if self._splits else x

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of what is equal on all of them; the way back from :meth:`whole`."""
        return _apply(_SliceGather, x, self.group) if self._splits else x

    def shared(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter that is whole on all ranks, to be used on this rank's part of the sequence."""
        return copy_to_ranks(parameter, self.group) if self._splits else parameter

    @property
    def _splits(self) -> bool:
        return self.split and self.group is not None


def _apply(function: type[torch.autograd.Function], x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    return cast(torch.Tensor, function.apply(x, group))  # type: ignore[no-untyped-call]


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return gather_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return scatter_sum(grad, ctx.group), None


class _SumScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return scatter_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_sequence(grad, ctx.group), None


class _GatherSlice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return gather_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return own_part(grad, ctx.group), None


class _SliceGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return own_part(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_sequence(grad, ctx.group), None


def gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[b, s / ranks, ...] -> [b, s, ...]``, the parts in order of the ranks; not differentiable."""
    parts = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(parts, x.contiguous(), group=group)
    return parts.view(-1, *x.shape).transpose(0, 1).flatten(1, 2)


def scatter_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[b, s, ...] -> [b, s / ranks, ...]``: this rank's part of the sum over the ranks; not differentiable."""
    parts = parts_of(x, dist.get_world_size(group)).contiguous()
    out = x.new_empty(parts.shape[1:])
    dist.reduce_scatter_tensor(out, parts.flatten(0, 1), group=group)
    return out


def own_part(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[b, s, ...] -> [b, s / ranks, ...]``: this rank's part; not differentiable."""
    return parts_of(x, dist.get_world_size(group))[dist.get_rank(group)].contiguous()


def parts_of(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """``[b, s, ...] -> [ranks, b, s / ranks, ...]``."""
    return x.reshape(x.shape[0], ranks, x.shape[1] // ranks, *x.shape[2:]).transpose(0, 1)

"""The two conjugate operators of tensor parallelism: one communicates in backward only, the other in forward only.

With them, everything outside a pair (``copy_to_ranks`` ... ``reduce_from_ranks``) is computed by all tensor-parallel
ranks from equal inputs: activations, and the gradients of replicated parameters, are equal on all of them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grad.contiguous().clone(), ctx.group), None


class _ReduceFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return all_reduce(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def copy_to_ranks(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Identity; in backward the sum of the gradients of all ranks of ``group`` (None: a group of one)."""
    return x if group is None else cast(torch.Tensor, _CopyToRanks.apply(x, group))  # type: ignore[no-untyped-call]


def reduce_from_ranks(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum over all ranks of ``group`` (None: a group of one); identity in backward."""
    return x if group is None else cast(torch.Tensor, _ReduceFromRanks.apply(x, group))  # type: ignore[no-untyped-call]


def all_reduce(
    x: torch.Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    """Reduce ``x`` in place over ``group`` (None: a group of one) and return it; not differentiable."""
    if group is not None:
        dist.all_reduce(x, op=op, group=group)
    return x

"""Long sequences over several ranks: outside of attention each has a part of the tokens, inside a part of the heads.

DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv 2309.14509). One all-to-all before attention gives every rank all tokens
of its heads, one after it gives the tokens back; between them attention is that of one rank. To DeepSpeed the ranks of
a sequence are replicas, each with some of the tokens: ZeRO of any stage spreads its state over them, a pipeline needs
nothing more, and the mean over replicas that it makes of the gradients is what the scale of our loss expects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist

from jobs.parallel.collectives import all_reduce


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRanks:
    """The ranks that share a sequence.

    Attributes:
        group: Their group, in order of the tokens; None for a group of one.
        size: Number of them.
    """

    group: dist.ProcessGroup | None = None
    size: int = 1

    def to_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Some heads of all tokens from all heads of some tokens.

        Args:
            q: ``[b, heads, s / size, d]``.
            k: ``[b, kv heads, s / size, d]``. If there are too few to go round, copies of them go.
            v: As ``k``.

        Returns:
            ``[b, heads / size, s, d]``, and likewise for ``k`` and ``v``; each query head still has its key/value head.
        """
        if self.group is None:
            return q, k, v
        copies = math.lcm(k.shape[1], self.size) // k.shape[1]
        if copies > 1:
            k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        # One exchange for the three: to every rank go its heads of q, then of k, then of v.
        parts = [x.reshape(x.shape[0], self.size, -1, *x.shape[2:]) for x in (q, k, v)]
        mixed = _apply(_ToHeads, torch.cat(parts, dim=2), self.group)
        queries, pairs = parts[0].shape[2], parts[1].shape[2]
        return mixed[:, :queries], mixed[:, queries : queries + pairs], mixed[:, queries + pairs :]

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """``[b, heads / size, s, d] -> [b, heads, s / size, d]``: the way back."""
        return x if self.group is None else _apply(_ToTokens, x, self.group).flatten(1, 2)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks; not differentiable."""
        return x if self.group is None else all_reduce(x.clone(), self.group)

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that have earlier tokens; not differentiable."""
        if self.group is None:
            return torch.zeros_like(x)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)[: dist.get_rank(self.group)].sum(dim=0)


def _apply(function: type[torch.autograd.Function], x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return cast(torch.Tensor, function.apply(x, group))  # type: ignore[no-untyped-call]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return heads_from_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return tokens_from_heads(grad, ctx.group), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return tokens_from_heads(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return heads_from_tokens(grad, ctx.group), None


def heads_from_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[b, ranks, heads, s / ranks, d]``, part i for rank i, to ``[b, heads, s, d]``; not differentiable."""
    out = _exchange(x.transpose(0, 1), group)  # [ranks, b, heads, s / ranks, d]: part i from rank i
    return out.permute(1, 2, 0, 3, 4).flatten(2, 3)


def tokens_from_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[b, heads, s, d]`` to ``[b, ranks, heads, s / ranks, d]``, part i from rank i; not differentiable."""
    ranks = dist.get_world_size(group)
    b, heads, length, width = x.shape
    parts = x.reshape(b, heads, ranks, length // ranks, width).permute(2, 0, 1, 3, 4)
    return _exchange(parts, group).transpose(0, 1)


def _exchange(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = parts.contiguous()
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=group)
    return out

"""The vocabulary split over the tensor-parallel ranks: embedding, output projection and cross entropy.

The vocabulary is padded to a multiple of the tensor-parallel degree. Padding rows are zero, no token selects them and
the softmax leaves them out, so their gradient is zero and they stay zero. Logits are never gathered: the loss needs
two small all-reduces per micro-batch, of one (maximum) and two (sum, target logit) numbers per token.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from jobs.models.init import ParameterFactory
from jobs.parallel.collectives import all_reduce
from jobs.parallel.region import TensorRegion

IGNORE = -100  # target of a position that weighs nothing


class VocabParallelEmbedding(nn.Module):
    """``tokens [b, s] -> [b, s, hidden]``, or this rank's part of the sequence.

    Args:
        make: Makes the parameters.
        name: Global name, without ``.weight``.
        vocab: Number of tokens, without padding.
        hidden: Width of an embedding.
    """

    def __init__(self, make: ParameterFactory, name: str, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = make.make(f"{name}.weight", (vocab, hidden), axis=0)
        self.region = make.grid.region
        width = -(-vocab // make.grid.tp)
        self._start = make.grid.model * width
        self._width = width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of ``tokens``, which are whole on every rank."""
        if self.region.group is None:
            return F.embedding(tokens, self.weight)
        local = tokens - self._start
        mine = (local >= 0) & (local < self._width)
        found = F.embedding(local.clamp(0, self._width - 1), self.weight)
        return self.region.leave(found * mine.unsqueeze(-1).to(found.dtype))


class VocabParallelProjection(nn.Module):
    """``[b, s, hidden] -> [b, s, padded vocab / tp]``: logits of this rank's part of the vocabulary.

    Args:
        weight: The local rows, ``[padded vocab / tp, hidden]``; may belong to an embedding as well (tied weights).
        region: The tensor-parallel ranks.
    """

    def __init__(self, weight: nn.Parameter, region: TensorRegion) -> None:
        super().__init__()
        self.weight = weight
        self._region = region

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Local logits of the whole sequence; ``x`` is equal on all ranks, or each one's part of the sequence."""
        return project(x, self.weight, self._region)


def project(x: torch.Tensor, weight: torch.Tensor, region: TensorRegion) -> torch.Tensor:
    """Local logits of the whole sequence from hidden states and the local rows of the projection."""
    return F.linear(region.enter(x), weight)


class _CrossEntropy(torch.autograd.Function):
    """Forward leaves the softmax of the local logits for backward: one buffer of the size of the logits, in fp32."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, start: int, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        shifted = logits.float()
        shifted = shifted - all_reduce(shifted.amax(dim=-1), group, dist.ReduceOp.MAX).unsqueeze(-1)
        local = targets - start
        mine = (local >= 0) & (local < logits.shape[-1])
        index = local.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
        target = torch.where(mine, shifted.gather(-1, index).squeeze(-1), 0.0)
        softmax = shifted.exp_()
        total, target = all_reduce(torch.stack([softmax.sum(dim=-1), target]), group)
        softmax.div_(total.unsqueeze(-1))
        weighs = targets != IGNORE
        ctx.save_for_backward(softmax, index, mine, weighs)
        ctx.dtype = logits.dtype
        return torch.where(weighs, total.log() - target, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        softmax, index, mine, weighs = ctx.saved_tensors
        target = softmax.gather(-1, index) - mine.unsqueeze(-1).to(softmax.dtype)
        # In place, to keep one buffer of this size; a plain scatter is deterministic on CUDA, an adding one is not.
        out = softmax.scatter_(-1, index, target).mul_((grad * weighs).unsqueeze(-1))
        return out.to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, vocab: int, rank: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Cross entropy per token, in fp32, from logits that are split over the vocabulary.

    Args:
        logits: ``[b, s, padded vocab / tp]``, this rank's part.
        targets: ``[b, s]`` token numbers, equal on all ranks; :data:`IGNORE` where nothing is to be predicted.
        vocab: Number of tokens, without padding.
        rank: Tensor-parallel rank.
        group: Tensor-parallel group; None for a group of one.

    Returns:
        ``[b, s]``, equal on all ranks, 0 where the target is ignored.
    """
    start = rank * logits.shape[-1]
    real = max(0, min(vocab - start, logits.shape[-1]))
    if real < logits.shape[-1]:
        padding = torch.arange(logits.shape[-1], device=logits.device) >= real
        logits = logits.masked_fill(padding, float("-inf"))
    return cast(torch.Tensor, _CrossEntropy.apply(logits, targets, start, group))  # type: ignore[no-untyped-call]

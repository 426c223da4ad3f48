"""Tokens on their way to experts, dealt to the tensor-parallel ranks so that each crosses the network once.

All tensor-parallel ranks of a replica need the same tokens for their shards of the experts, and so do those of the
replicas that have the other experts. Each sends only its own part to its peers in the other replicas; there the parts
are put together again, over the tensor-parallel group, where links are fast (as in DeepSpeed's ``drop_tokens`` and
``gather_tokens`` and in Megatron-Core's dispatcher). With Megatron's sequence parallelism a rank's part is the one that
it has anyway. What the router says of the tokens is small and is made known to all, so that which experts take them,
for which there is room, and what the losses are does not depend on how they are dealt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from jobs.distributed import Grid
from jobs.parallel.region import TensorRegion, parts_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Deal:
    """Who has which tokens of a micro-batch while they visit experts.

    Attributes:
        region: What lies around the experts.
        ranks: Tensor-parallel ranks that deal the tokens among them; 1 where none are sent, or there is just one rank:
            each has all then.
        rank: Which of them this one is.
    """

    region: TensorRegion
    ranks: int = 1
    rank: int = 0

    @classmethod
    def of(cls, grid: Grid) -> Deal:
        """The deal on one rank."""
        if grid.ep == 1 or grid.tp == 1:
            return cls(region=grid.region)
        return cls(region=grid.region, ranks=grid.tp, rank=grid.model)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Those that deal tokens among them; None where each has all. A parameter sees other tokens on each."""
        return self.region.group if self.ranks > 1 else None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens, ``[rows, tokens, width]``, of what comes out of the layer before."""
        if self.ranks == 1:
            return self.region.whole(x)
        return x if self.region.split else self._cut.part(self._row(x))

    def whole(self, own: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """What is known of all tokens, ``[b, s, ...]``, from what each rank knows of its own.

        Args:
            own: ``[rows, tokens, ...]`` of this rank's.
            like: What :meth:`take` got.
        """
        if self.ranks == 1:
            return own
        whole = self._cut.whole(own)
        if self.region.split:
            return whole
        rows, tokens = like.shape[:2]  # in one row until now, filled up
        return whole[0, : rows * tokens].reshape(rows, tokens, *whole.shape[2:])

    def parts(self, x: torch.Tensor) -> torch.Tensor:
        """``[b, s, ...] -> [ranks, tokens, ...]``: of what is known of all tokens the part that each rank has.

        Where tokens do not go round, what is filled up with is zero.
        """
        if self.ranks == 1:
            return x.flatten(0, 1).unsqueeze(0)
        return parts_of(x if self.region.split else self._row(x), self.ranks).flatten(1, 2)

    def fills(self, like: torch.Tensor) -> bool:
        """Whether the tokens of ``[b, s, ...]`` do not go round."""
        return not self.region.split and like.shape[0] * like.shape[1] % self.ranks > 0

    def give(self, own: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """What the layer after expects, from this rank's ``[tokens, width]``; the way back from :meth:`take`."""
        if self.ranks == 1:
            rows = like.shape[0]
            return self.region.part(own.view(rows, -1, own.shape[1]))
        return own.view_as(like) if self.region.split else self.whole(own.unsqueeze(0), like)

    def _row(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens in one row, filled up to a number that goes round."""
        row = x.flatten(0, 1).unsqueeze(0)
        short = -row.shape[1] % self.ranks
        return F.pad(row, (0, 0, 0, short)) if short else row

    @property
    def _cut(self) -> TensorRegion:
        return TensorRegion(group=self.region.group, split=True)

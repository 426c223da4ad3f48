"""What a rank really gives to others while tokens visit experts: every exchange of numbers is counted as it is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist

from jobs.distributed import Grid


@dataclass(kw_only=True, slots=True)
class Exchanges:
    """Of one rank.

    Attributes:
        sent_bytes: Bytes that it gives to exchanges, those for itself included, by the group: ``experts``,
            ``shards``, ``others``.
        crossed: Rows that it gives to other ranks of the group that shares the experts, exchange by exchange.
    """

    sent_bytes: Counter[str] = field(default_factory=Counter)
    crossed: list[int] = field(default_factory=list)

    def take_crossed(self) -> int:
        """The sum of the rows since the last call."""
        rows, self.crossed = sum(self.crossed), []
        return rows


@contextmanager
def counted(grid: Grid) -> Iterator[Exchanges]:
    """Count what is traded by ``all_to_all_single`` as long as the context lasts."""
    kinds = {"shards": grid.model_group, "experts": grid.expert_group}
    names = {group: name for name, group in kinds.items() if group is not None}
    found, real = Exchanges(), dist.all_to_all_single

    def count(out: torch.Tensor, given: torch.Tensor, *sizes: Any, **group: Any) -> Any:
        if given.is_floating_point():
            name = names.get(cast(dist.ProcessGroup, group.get("group")), "others")
            found.sent_bytes[name] += given.nbytes
            if name == "experts":
                _, send = sizes
                found.crossed.append(sum(send) - send[dist.get_rank(grid.expert_group)])
        return real(out, given, *sizes, **group)

    dist.all_to_all_single = count  # type: ignore[assignment]
    try:
        yield found
    finally:
        dist.all_to_all_single = real

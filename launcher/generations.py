"""Which generation of the memory tier a gang goes on from. Pure.

Safety is in the order, which is that of the checkpoints on disk (:mod:`jobs.checkpoint.fence`): a node that was cut off
may come back with steps that the run has meanwhile done anew. A generation counts only if the parts of all its ranks
are there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from jobs.checkpoint.fence import Branch, in_order
from jobs.checkpoint.layout import Token
from jobs.checkpoint.memory import Address, Generation, Holding, Located, MemoryPoint
from strategies.schedule import Skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Stock:
    """What one node holds.

    Attributes:
        node: The node.
        address: Its persister.
        held: The sealed parts.
    """

    node: str
    address: Address
    held: tuple[Holding, ...]


def choose(
    stocks: Sequence[Stock],
    *,
    beyond: Generation | None,
    branch: Branch | None,
    skips: Sequence[Skip],
    rejected: Collection[str],
    before: int = 0,
) -> MemoryPoint | None:
    """The generation to restore.

    Args:
        stocks: What the surviving nodes hold.
        beyond: The state on disk that would be restored otherwise; None for none.
        branch: What decides which ones count; None where all do.
        skips: Samples that the run leaves out; a generation must have left out the same.
        rejected: Names of generations that could not be restored before.
        before: Only generations of earlier steps; 0 for any (:class:`launcher.rollback.Rollback`).

    Returns:
        None when the disk, or the beginning, is as good.
    """
    gathered = _gathered(stocks)
    for generation in in_order(gathered, branch):
        if beyond is not None and (generation.token, generation.step) <= (beyond.token, beyond.step):
            break
        if str(generation) not in rejected and (not before or generation.step < before):
            point = _complete(generation, gathered[generation], skips)
            if point is not None:
                return point
    return None


def _gathered(stocks: Sequence[Stock]) -> Mapping[Generation, list[tuple[Holding, Stock]]]:
    parts: dict[tuple[int, int, int], list[tuple[Holding, Stock]]] = {}
    for stock in stocks:
        for held in stock.held:
            parts.setdefault((held.step, held.epoch, held.attempt), []).append((held, stock))
    return {Generation(step, Token(*token)): found for (step, *token), found in parts.items()}


def _complete(
    generation: Generation, parts: Sequence[tuple[Holding, Stock]], skips: Sequence[Skip]
) -> MemoryPoint | None:
    """Where the part of each rank is, the rank's own node before a replica; None if one is missing."""
    wanted = sorted((skip.step, skip.samples) for skip in skips if skip.step <= generation.step)
    where: dict[int, list[tuple[Holding, Stock]]] = {}
    world = max(held.world for held, _ in parts)
    for skipped in {held.skips for held, _ in parts}:
        if sorted(tuple(skip) for skip in skipped if skip[0] <= generation.step) != wanted:
            return None
    for held, stock in sorted(parts, key=lambda part: (not part[0].own, part[1].node)):
        if held.world != world:
            return None
        where.setdefault(held.rank, []).append((held, stock))
    if set(where) != set(range(world)):
        return None
    return MemoryPoint(
        step=generation.step,
        epoch=generation.token.epoch,
        attempt=generation.token.attempt,
        parts=tuple(_located(where[rank]) for rank in range(world)),
    )


def _located(found: Sequence[tuple[Holding, Stock]]) -> Located:
    """The part of one rank, with all who hold it."""
    (held, stock), *others = found
    return Located(
        rank=held.rank,
        bytes=held.bytes,
        node=stock.node,
        address=stock.address,
        others=tuple((other.node, other.address) for _, other in others),
    )

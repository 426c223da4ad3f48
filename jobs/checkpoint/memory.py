"""Names and records of the memory tier, as ranks, persisters and the controller exchange them. Standard library only.

A *generation* is the state after one step, written by one gang: (step, token). It is complete when the part of every
rank is sealed on a node that is there: its own, or the one that holds a replica.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jobs.checkpoint.layout import Token
from strategies.codec import from_json, to_json

_NAME = re.compile(r"memory:(\d+):e(\d{4,})-a(\d{4,})")


class Generation(NamedTuple):
    """One state of the whole gang."""

    step: int
    token: Token

    def __str__(self) -> str:
        return f"memory:{self.step}:{self.token}"


def generation_of(name: str) -> Generation | None:
    """The generation that a resume point names; None when it names something on disk."""
    found = _NAME.fullmatch(name)
    return Generation(int(found[1]), Token(int(found[2]), int(found[3]))) if found else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a persister listens.

    Attributes:
        host: Network address.
        port: TCP port.
        incarnation: Random word, so that a successor on the same port is not taken for it.
    """

    host: str
    port: int
    incarnation: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """One sealed part in the memory of a node.

    Attributes:
        step: Step of the generation.
        epoch: Of its token.
        attempt: Of its token.
        rank: Whose part it is.
        world: Ranks of the gang that wrote it.
        bytes: Size of its data.
        own: Written by a rank of this very node; a replica otherwise.
        skips: Samples that its gang left out, as (step, samples).
    """

    step: int
    epoch: int
    attempt: int
    rank: int
    world: int
    bytes: int
    own: bool
    skips: tuple[tuple[int, int], ...] = ()

    @property
    def generation(self) -> Generation:
        """What it is a part of."""
        return Generation(self.step, Token(self.epoch, self.attempt))

    def told(self) -> list[Any]:
        """As it travels: the controller of a large gang is told a hundred thousand of them at once."""
        numbers = [self.step, self.epoch, self.attempt, self.rank, self.world, self.bytes]
        return [*numbers, self.own, [list(skip) for skip in self.skips]]

    @classmethod
    def read(cls, row: Any) -> Holding:
        """What :meth:`told` made; raises TypeError or ValueError for anything else."""
        *numbers, own, skips = row
        step, epoch, attempt, rank, world, size = numbers
        if type(own) is not bool or set(map(type, numbers)) != {int}:
            raise TypeError(f"a part is not told as {row}")
        left_out = tuple((int(at), int(samples)) for at, samples in skips) if skips else ()
        return cls(step=step, epoch=epoch, attempt=attempt, rank=rank, world=world, bytes=size, own=own, skips=left_out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """Where the part of a rank is to be had.

    Attributes:
        rank: Whose part.
        bytes: Size of its data.
        node: Name of the node.
        address: Its persister.
        others: Nodes that hold the same part, with their persisters.
    """

    rank: int
    bytes: int
    node: str
    address: Address
    others: tuple[tuple[str, Address], ...] = ()

    @property
    def holders(self) -> tuple[tuple[str, Address], ...]:
        """All that have it, the best first."""
        return ((self.node, self.address), *self.others)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPoint:
    """A complete generation and where its parts are: ``attempts/N/memory.json``.

    Attributes:
        step: Step of the generation.
        epoch: Of its token.
        attempt: Of its token.
        parts: One for every rank of the writers, in their order.
    """

    step: int
    epoch: int
    attempt: int
    parts: tuple[Located, ...]

    @property
    def generation(self) -> Generation:
        """Which generation."""
        return Generation(self.step, Token(self.epoch, self.attempt))

    def table(self) -> dict[str, Any]:
        """As JSON values: what is the same for all parts on a node once; who else holds them behind all of those."""
        nodes: dict[tuple[int, str, Address], list[list[int]]] = {}
        for part in self.parts:
            for place, (node, address) in enumerate(part.holders):
                nodes.setdefault((min(place, 1), node, address), []).append([part.rank, part.bytes])
        rows = [
            {"node": node, "address": to_json(at), "parts": parts}
            for (_, node, at), parts in sorted(nodes.items(), key=lambda item: item[0][0])
        ]
        return {"step": self.step, "epoch": self.epoch, "attempt": self.attempt, "nodes": rows}

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> MemoryPoint:
        """What :meth:`table` made; raises KeyError, TypeError, ValueError or ConfigError for anything else."""
        found: dict[int, Located] = {}
        for row in table["nodes"]:
            at, node = from_json(Address, row["address"]), str(row["node"])
            for number, size in row["parts"]:
                rank = int(number)
                first = found.get(rank)
                if first is None:
                    found[rank] = Located(rank=rank, bytes=int(size), node=node, address=at)
                else:
                    found[rank] = replace(first, others=(*first.others, (node, at)))
        step, epoch, attempt = (int(table[name]) for name in ("step", "epoch", "attempt"))
        return cls(step=step, epoch=epoch, attempt=attempt, parts=tuple(found[rank] for rank in sorted(found)))


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamInfo:
    """What is the same for every generation of one rank of one attempt.

    Attributes:
        epoch: Of the token.
        attempt: Of the token.
        rank: The rank.
        world: Ranks of the gang.
        image: Its slices, as :meth:`jobs.checkpoint.image.Image.rows` gives them.
        about: Run id, plan, model and all tensors, as JSON values; rank 0 only.
        skips: Samples that the gang leaves out, as (step, samples).
    """

    epoch: int
    attempt: int
    rank: int
    world: int
    image: tuple[Any, ...]
    about: Mapping[str, Any]
    skips: tuple[tuple[int, int], ...] = ()

    @property
    def token(self) -> Token:
        """Who writes."""
        return Token(self.epoch, self.attempt)

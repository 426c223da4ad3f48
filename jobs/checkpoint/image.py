"""How the state of one rank lies in a buffer: by kind, and in it slice after slice, as in a shard. Standard library only.

The copy out of the engine fills such a buffer; the persister writes the shard from it, and readers of the memory tier
find their slices in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.checkpoint.shardfile import ELEMENT_BYTES, KINDS, ShardHeader, Slice, StoredSlice


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """The layout of a buffer.

    Attributes:
        slices: What is in it, in order.
        elements: Elements per kind.
        starts: Where each slice begins in its kind, in elements.
    """

    slices: tuple[Slice, ...]
    elements: int = field(init=False)
    starts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        starts, at = [], 0
        for piece in self.slices:
            starts.append(at)
            at += piece.elements
        object.__setattr__(self, "starts", tuple(starts))
        object.__setattr__(self, "elements", at)

    @property
    def bytes(self) -> int:
        """Size of the buffer."""
        return self.elements * ELEMENT_BYTES * len(KINDS)

    def offset(self, kind: str, index: int) -> int:
        """Where slice ``index`` of a kind begins, in elements from the start of the buffer."""
        return KINDS.index(kind) * self.elements + self.starts[index]

    def pieces(self, buffer: memoryview) -> list[tuple[Slice, Mapping[str, memoryview]]]:
        """Each slice with its bytes per kind."""
        return [(piece, dict(self._views(buffer, index))) for index, piece in enumerate(self.slices)]

    def _views(self, buffer: memoryview, index: int) -> Iterator[tuple[str, memoryview]]:
        for kind in KINDS:
            low = self.offset(kind, index) * ELEMENT_BYTES
            yield kind, buffer[low : low + self.slices[index].elements * ELEMENT_BYTES]

    def header(self, path: Path, rank_state: Mapping[str, Any]) -> ShardHeader:
        """The slice table for readers. Nothing is digested in memory: what is sealed there is whole."""
        stored = (
            StoredSlice(
                slice=piece,
                offsets={kind: self.offset(kind, index) * ELEMENT_BYTES for kind in KINDS},
                blocks={},
            )
            for index, piece in enumerate(self.slices)
        )
        return ShardHeader(path=path, slices=tuple(stored), rank_state=rank_state)

    def rows(self) -> list[list[Any]]:
        """As JSON values."""
        return [[piece.name, piece.shape, piece.box, piece.start, piece.stop] for piece in self.slices]


def image_of(rows: Sequence[Sequence[Any]]) -> Image:
    """The inverse of :meth:`Image.rows`."""
    slices = (
        Slice(
            name=name,
            shape=tuple(shape),
            box=tuple((low, high) for low, high in box),
            start=start,
            stop=stop,
        )
        for name, shape, box, start, stop in rows
    )
    return Image(slices=tuple(slices))

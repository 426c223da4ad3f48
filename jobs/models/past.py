"""Keys and values of the tokens that a model has seen, so that a text goes on without going through it again.

A forward pass over whole rows is followed by passes over one token of each row: the keys and values of the former are
kept, those of the latter put behind them. Rows may be of any lengths. What a shorter one has behind its end is of no
text: it is not seen, and overwritten as the row grows.
"""

from __future__ import annotations

import torch

from jobs.models.packing import Layout


class Next(Layout):
    """One more token of every row.

    Args:
        places: Its place in the row, ``[b]``.
        positions: Its position in its document, ``[b]``.
        room: Places that are kept of a row.
    """

    def __init__(self, places: torch.Tensor, positions: torch.Tensor, room: int) -> None:
        super().__init__(positions[:, None])
        self.places = places
        self._room = room

    def sees(self) -> torch.Tensor:
        """Which places each token sees, ``[b, 1, 1, room]``: those of its document up to its own."""
        place = torch.arange(self._room, device=self.places.device)
        begins = self.places - self.positions[:, 0]
        return ((place >= begins[:, None]) & (place <= self.places[:, None]))[:, None, None]


class Past:
    """What the attention of one rank's layers keeps. It keeps nothing unless it is told to.

    Attributes:
        next: Where the tokens of the pass that runs belong; None in a pass over whole rows.
    """

    def __init__(self) -> None:
        self.next: Next | None = None
        self._room = 0
        self._kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, room: int) -> None:
        """A pass over whole rows comes; ``room`` places are kept of each of them, 0 for none."""
        self._room, self.next, self._kept = room, None, {}

    def go_on(self, places: torch.Tensor, positions: torch.Tensor) -> None:
        """A pass over one more token of each row comes; see :class:`Next`."""
        self.next = Next(places, positions, self._room)

    def join(self, name: str, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens that may be seen.

        Args:
            name: Of the layer.
            k: Those of this pass, ``[b, heads, s, d]``, turned to their positions.
            v: As ``k``.
        """
        if not self._room:
            return k, v
        if self.next is None:
            shape = (*k.shape[:2], self._room, k.shape[3])
            self._kept[name] = (k.new_zeros(shape), v.new_zeros(shape))
            for kept, fresh in zip(self._kept[name], (k, v), strict=True):
                kept[:, :, : fresh.shape[2]] = fresh
            return k, v
        rows = torch.arange(len(k), device=k.device)
        for kept, fresh in zip(self._kept[name], (k, v), strict=True):
            kept[rows, :, self.next.places] = fresh[:, :, 0]
        return self._kept[name]

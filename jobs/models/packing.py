"""Several documents in one sequence: attention stays within each, and positions start anew with each.

Which tokens belong together is seen from the tokens alone, and every stage of a pipeline needs it, not only the first.
So every stage is given the tokens of its replica before a step, and takes them micro-batch by micro-batch, in the order
in which forward passes come. Between stages nothing more than the activations travels. Ranks that each have a part of a
sequence put its tokens together first.

What waits for a backward pass are the positions, and no mask where attention is recomputed: a mask grows with the
square of the sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
import torch.distributed as dist

from jobs.parallel.region import gather_sequence


class Layout:
    """How the documents of a micro-batch lie.

    Args:
        positions: Position of every token in its document, ``[b, s]``.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self.positions = positions
        self._mask: torch.Tensor | None = None

    def sees(self) -> torch.Tensor:
        """Which tokens (last axis) a token (the axis before) sees, ``[b, 1, s, s]``."""
        place = torch.arange(self.positions.shape[1], device=self.positions.device)
        begins = (place - self.positions)[:, :, None]
        return ((place >= begins) & (place <= place[:, None]))[:, None]

    def mask(self, dtype: torch.dtype, *, keep: bool) -> torch.Tensor:
        """What is added to the scores of attention, ``[b, 1, s, s]``: 0 for what a token sees, else minus infinity.

        Args:
            dtype: That of the scores; of another one, every call of attention would make a copy and keep that.
            keep: All blocks get the same one, which each needs until its backward pass. Else it is made anew.
        """
        if self._mask is not None and self._mask.dtype == dtype:
            return self._mask
        hidden = self.sees().logical_not_()
        made = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        if keep:
            self._mask = made
        return made


def layout_of(tokens: torch.Tensor, end_id: int) -> Layout:
    """The documents in rows of tokens, each of which ends with ``end_id``, the last of a row perhaps without."""
    ends = tokens == end_id  # an end belongs to the document that it ends
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    first = torch.ones_like(ends)
    first[:, 1:] = ends[:, :-1]
    begins = torch.where(first, place, torch.zeros_like(place)).cummax(dim=1).values
    return Layout(place - begins)


class Documents:
    """The layout of the micro-batch whose forward pass runs on this rank.

    Args:
        end_id: The token that ends a document.
        group: The ranks that have the other parts of the same sequences, in order; None where each has the whole.
    """

    def __init__(self, end_id: int, group: dist.ProcessGroup | None = None) -> None:
        self._end_id = end_id
        self._group = group
        self._waiting: tuple[deque[torch.Tensor], ...] = ()
        self._layout: Layout | None = None

    def load(self, batches: Iterable[torch.Tensor], device: torch.device) -> None:
        """The tokens of the micro-batches to come, in order. Collective among the ranks that share them."""
        whole = [self._whole(tokens.to(device)) for tokens in batches]
        self._waiting = (deque(whole), deque(whole))  # under DualPipeV each passes through this rank twice

    def begin(self, phase: int = 0) -> None:
        """The forward pass of the next micro-batch begins: on the way down (0) or up again (1) through the stages."""
        self._layout = layout_of(self._waiting[phase].popleft(), self._end_id)

    def show(self, tokens: torch.Tensor) -> None:
        """The forward pass of a micro-batch of these tokens begins. Collective among the ranks that share them."""
        self._layout = layout_of(self._whole(tokens), self._end_id)

    def positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positions of whole rows of tokens in their documents, ``[b, s]``; shows nothing to any layer."""
        return layout_of(tokens, self._end_id).positions

    def _whole(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if self._group is None else gather_sequence(tokens, self._group)

    @property
    def layout(self) -> Layout:
        """How the documents of the current micro-batch lie."""
        assert self._layout is not None, "no forward pass has begun"
        return self._layout

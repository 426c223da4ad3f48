"""What a training loop asks of who makes its checkpoints: the rank itself, or the persister of the node behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from jobs.checkpoint.memory import generation_of
from jobs.location import Location, locate
from jobs.spec import RankEnv
from strategies.errors import PhalanxError


class Saver(Protocol):
    """What the loop calls. Every method is collective.

    Attributes:
        copies_every: Steps between two copies in memory as of now; 0 for none.
    """

    copies_every: int

    def open(self) -> None:
        """Once, when every rank has its state."""

    def keep(self, step: int, extra: Mapping[str, Any]) -> None:
        """After every step at which no checkpoint on disk is due."""

    def stalled_s(self) -> float:
        """Seconds for which this rank has stood still for copies in memory, since it was asked last; not collective.

        Ask when a step has ended. What a checkpoint on disk has cost is reported with it instead.
        """

    def copy(self, step: int, extra: Mapping[str, Any]) -> None:
        """Copy this step into memory, and wait until it is safe there; only where states are kept in memory."""

    def save(self, step: int, extra: Mapping[str, Any], *, must: bool = False) -> Location:
        """A checkpoint on disk is due; returns the path of its manifest, which need not exist yet.

        Args:
            step: The step that is complete.
            extra: What the caller wants back.
            must: Make it even if the one before is still being written; else it is left out then.

        Raises:
            CheckpointConflict: Another gang has taken over; on every rank.
            StorageError: Nothing can be written without training standing still; on every rank.
        """

    def finish(self, patience_s: float = 0.0) -> PhalanxError | None:
        """Wait until the newest checkpoint is on disk, and its step safe on all ranks.

        Args:
            patience_s: How long it is tried again where it cannot be written.

        Returns:
            Why it could not be written; on every rank.

        Raises:
            CheckpointConflict: Another gang has taken over; on every rank.
        """

    @property
    def in_memory(self) -> bool:
        """Whether states are kept in the memory of nodes."""


def warn(text: str) -> None:
    """Tell people, if there is something to tell."""
    if text:
        print(f"warning: {text}", flush=True)


def restored_from(env: RankEnv) -> Location | None:
    """The checkpoint on disk that this gang goes on from, if it is one."""
    return locate(env.resume_from) if env.resume_from and generation_of(env.resume_from) is None else None

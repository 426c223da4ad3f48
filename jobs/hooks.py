"""The points of the training loop at which others may act: fault injection, tests, user callbacks. Pure."""

from __future__ import annotations

from typing import Any, Protocol


class Hooks(Protocol):
    """What the loop calls. ``step`` counts from 1: step ``n`` is the n-th optimizer step of the run."""

    def model_ready(self, module: Any) -> None:
        """Once, before anything else: ``module`` is this rank's part of the model, a torch module."""

    def step_begin(self, step: int) -> None:
        """Before step ``step`` takes its samples, which may have been read already."""

    def step_end(self, step: int) -> None:
        """After step ``step`` has changed the weights, before a checkpoint of it is made."""

    def checkpoint_begin(self, step: int) -> None:
        """Before the first byte of a checkpoint of step ``step`` is written; the copy of its state has begun."""

    def holds_commit(self, step: int) -> bool:
        """Whether :meth:`checkpoint_shards_written` must be called; what writes behind the rank has to wait for it."""

    def checkpoint_shards_written(self, step: int) -> None:
        """After this rank's shard is durable, before the manifest exists."""

    def restore_begin(self) -> None:
        """Before a checkpoint is read."""


class NoHooks:
    """Does nothing, everywhere."""

    def model_ready(self, module: Any) -> None: ...

    def step_begin(self, step: int) -> None: ...

    def step_end(self, step: int) -> None: ...

    def checkpoint_begin(self, step: int) -> None: ...

    def holds_commit(self, step: int) -> bool:
        return False

    def checkpoint_shards_written(self, step: int) -> None: ...

    def restore_begin(self) -> None: ...

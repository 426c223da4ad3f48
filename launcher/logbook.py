"""What a controller writes: one event after the other, each durable before anything that depends on it is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher import progress
from launcher.lock import ControllerLock
from launcher.run import EventKind, Run, RunEvent, apply
from launcher.store import RunStore


class Fenced(Exception):
    """A later epoch exists: this controller must touch nothing any more."""


class Logbook:
    """The event log of a run, for the controller of one epoch.

    Args:
        store: The run.
        lock: The right to control, already won.
        observer: Called with every event.

    Attributes:
        run: The run, as all events tell it.
    """

    def __init__(self, store: RunStore, lock: ControllerLock, observer: Callable[[RunEvent], None]) -> None:
        self.run: Run = store.run()
        self._store = store
        self._lock = lock
        self._observer = observer

    def require_ours(self, end_gang: Callable[[], None]) -> None:
        """Make sure that the run is still this controller's.

        Args:
            end_gang: Called where what is there is not the run's directory any more: nobody else knows this one's
                ranks, to end them.

        Raises:
            Fenced: Another controller has taken over, or another run.
        """
        if self._lock.lost():
            if self._lock.displaced():
                end_gang()
            raise Fenced

    def record(self, kind: EventKind, *, attempt: int, **data: Any) -> None:
        """Write one event.

        Raises:
            Fenced: Another controller has taken over; nothing was written.
            StorageError: The log cannot be written.
        """
        if self._lock.lost():
            raise Fenced
        event = self._store.draft(kind, epoch=self._lock.epoch, attempt=attempt, **data)
        after = apply(self.run, event)  # an event that cannot follow is our bug, and must not reach the log
        self._store.commit(event)
        # The first word of an epoch: a predecessor that was between asking and writing may have written meanwhile.
        self.run = self._store.run() if kind is EventKind.CONTROLLER_STARTED else after
        self._observer(event)

    def new_faults(self) -> list[dict[str, Any]]:
        """Proofs of injected faults that are not in the log yet."""
        return [proof for proof in progress.fault_records(self._store.paths) if proof["id"] not in self.run.faults]

    def record_faults(self, *, attempt: int) -> None:
        """Write down which injected faults have fired."""
        for proof in self.new_faults():
            self.record(EventKind.FAULT_FIRED, attempt=attempt, fault=proof["id"], record=proof)

"""Recording how a run ended when its controller cannot any more, even on a full disk.

A run directory holds a little ballast from the beginning. Where the log has no room for its last line, the ballast is
thrown overboard; the next resume takes on new.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from launcher.lock import ControllerLock
from launcher.run import EventKind
from launcher.store import RunStore, write_atomic
from strategies.errors import PhalanxError, StorageError

BALLAST_BYTES = 1 << 16


def take_ballast(store: RunStore) -> None:
    """Reserve room for the end of the log.

    Raises:
        StorageError: There is none.
    """
    path = _ballast(store)
    if not path.exists():
        write_atomic(path, bytes(BALLAST_BYTES))


def conclude(store: RunStore, lock: ControllerLock, kind: EventKind, reason: str) -> None:
    """Record an end that the controller did not live to see. Does nothing when the run has ended, or is another's.

    Raises:
        StorageError: The log cannot be written.
    """
    if lock.lost() or store.run().state.terminal:
        return
    try:
        store.append(kind, epoch=lock.epoch, reason=reason)
    except StorageError:
        with contextlib.suppress(OSError):
            _ballast(store).unlink(missing_ok=True)
        store.append(kind, epoch=lock.epoch, reason=reason)


def in_a_line(error: PhalanxError) -> str:
    """What and why of an error, as a reason in the log."""
    return f"{error.what.rstrip('.')}: {error.why}" if error.why else error.what


def _ballast(store: RunStore) -> Path:
    return store.paths.control / "ballast"

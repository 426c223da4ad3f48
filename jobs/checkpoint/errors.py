"""What can go wrong with checkpoint storage, as errors that say what to do next."""

from __future__ import annotations

import errno

from jobs.location import Location, Url
from strategies.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CorruptCheckpoint(StorageError):
    """A committed checkpoint is not what its manifest promises.

    Args:
        path: The manifest.
        reason: What does not match, naming the file.
    """

    def __init__(self, path: str | Location, reason: str) -> None:
        super().__init__(
            f"The checkpoint {path} is damaged.",
            why=reason,
            hint="Mend it first, or go on: an older one is used then, and the damaged one goes when others replace it.",
        )
        self.path = str(path)
        self.reason = reason


class AbsentFile(CorruptCheckpoint):
    """A file of a committed checkpoint is not where it should be. Perhaps its file system is not: nothing is proved."""

    def __init__(self, path: str | Location, reason: str) -> None:
        super().__init__(path, reason)
        self.what = f"A file of the checkpoint {path} is not there."
        self.hint = (
            "Check that its file system is mounted on every node, then resume the run. A checkpoint that has lost a "
            "file for good is damaged: it is passed over, an older one is used."
        )


class OtherVersion(CorruptCheckpoint):
    """Another version of phalanx has written a manifest. Nothing is wrong with it.

    Args:
        path: The manifest.
        there: Version of the document.
        here: The one that is understood here.
    """

    def __init__(self, path: str | Location, there: object, here: int) -> None:
        reason = (
            f"its format has version {there}, and this phalanx reads {here}: go on with the one that has written it"
        )
        super().__init__(path, reason)
        self.what = f"The checkpoint {path} was written by another version of phalanx."
        self.hint = "Install that version (env.json of the run tells it) on every node, then resume the run."


class OutOfReach(AbsentFile):
    """Who holds a part of a generation in memory is gone, or too slow. It may be held elsewhere: nothing is proved."""

    def __init__(self, path: str | Location, reason: str) -> None:
        super().__init__(path, reason)
        self.what = f"A part of {path} is out of reach."
        self.hint = "The gang starts again, from what the nodes that are left hold then."


class CheckpointConflict(StorageError):
    """Another writer has committed, or holds a higher token: this writer has been fenced."""


class Unsaved(StorageError):
    """The last checkpoint of a run could not be written for as long as it is tried."""


def storage_error(doing: str, path: str | Location, error: OSError) -> StorageError:
    """Explain a failed system call.

    Args:
        doing: The action, as in "write the checkpoint shard".
        path: The file or folder.
        error: What the operating system said.
    """
    if isinstance(path, Url) or "://" in str(path):
        hint = "Check checkpoint.url, that the store answers, and the credentials in the environment of every node."
    elif error.errno in FULL:
        hint = "Free space there (or lower checkpoint.keep), then resume the run: committed checkpoints are intact."
    else:
        hint = "Check that the file system is mounted, healthy and writable, then resume the run."
    return StorageError(f"Cannot {doing} at {path}.", why=f"{error.strerror or error}", hint=hint)


def is_full(error: StorageError) -> bool:
    """Whether there was no room: that does not pass by itself, as an outage does."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL

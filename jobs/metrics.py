"""``metrics.jsonl``: one line per optimizer step, from one writer at a time, readable at any moment."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.checkpoint.errors import storage_error


def tells_of_a_step(line: Mapping[str, Any]) -> bool:
    """Whether a line is one of ours: a user's code may write into the same file."""
    return all(isinstance(line.get(name), int | float) for name in ("step", "attempt", "time"))


def append_whole(fd: int, line: bytes) -> None:
    """Append a line in one write, if there is room. What a killed writer left unfinished stays a line of its own.

    Args:
        fd: The file, open for reading and appending.
        line: With its end.

    Raises:
        OSError: It was not written, or only a part of it was; says what the system says.
    """
    size = os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":
        line = b"\n" + line
    if (written := os.write(fd, line)) != len(line):
        os.write(fd, line[written:])  # a disk that fills takes a part first; asked for the rest, it says why not
        if os.pread(fd, len(line), size) != line:
            raise OSError(errno.EIO, f"only {written} of {len(line)} bytes were written at once")


class MetricsWriter:
    """Appends lines. Floats keep all their digits (``repr``), so that equal lines mean equal bits.

    Args:
        path: The file; made if missing.

    Raises:
        StorageError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise storage_error("open the metrics", path, error) from error

    def append(self, line: dict[str, Any]) -> None:
        """Add one line (:func:`append_whole`). What a killed writer left unfinished stays a line of its own.

        Raises:
            StorageError: The file cannot be written.
        """
        try:
            append_whole(self._fd, json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise storage_error("write the metrics", self._path, error) from error

    def sync(self) -> None:
        """Make all lines durable; raises StorageError."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise storage_error("write the metrics", self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

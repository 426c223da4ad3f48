"""``metrics.jsonl``: one line per optimizer step, from one writer at a time, readable at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.checkpoint.errors import storage_error


def tells_of_a_step(line: Mapping[str, Any]) -> bool:
    """Whether a line is one of ours: a user's code may write into the same file."""
    return all(isinstance(line.get(name), int | float) for name in ("step", "attempt", "time"))


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
        """Add one line, in one write. What a killed writer left unfinished stays a line of its own.

        Raises:
            StorageError: The file cannot be written.
        """
        try:
            start = b"" if self._complete() else b"\n"
            data = start + json.dumps(line).encode() + b"\n"
            if os.write(self._fd, data) != len(data):
                raise OSError(28, "the disk is full")
        except OSError as error:
            raise storage_error("write the metrics", self._path, error) from error

    def _complete(self) -> bool:
        size = os.fstat(self._fd).st_size
        return size == 0 or os.pread(self._fd, 1, size - 1) == b"\n"

    def sync(self) -> None:
        """Make all lines durable; raises StorageError."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise storage_error("write the metrics", self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

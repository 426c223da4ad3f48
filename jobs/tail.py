"""Following a file of JSON lines that somebody else is writing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any


class Tail:
    """The complete lines that are added to a growing file of JSON lines, each once.

    Args:
        path: The file; it may appear later.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self, most_bytes: int = -1) -> list[dict[str, Any]]:
        """Lines since the last call; damaged ones are left out, as is everything while the file cannot be read.

        Args:
            most_bytes: Read no more at a time, which must be longer than any line; -1 for all there is.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(most_bytes)
        except OSError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        found = []
        for line in complete.splitlines():
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                found += [value] if isinstance(value, dict) else []
        return found

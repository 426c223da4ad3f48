"""Folders that are there for what will be in them, and go if there will be nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def made_for(folder: Path) -> Iterator[None]:
    """The folder exists; at the end it goes, with the parents that were made for it, unless something is in it.

    Raises:
        OSError: It cannot be made.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]  # the deepest first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            for one in missing:
                if one.exists():
                    one.rmdir()

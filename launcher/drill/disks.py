"""File systems of their own for the checkpoints of one rehearsal: one small, one that can be frozen. Root only."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from strategies.errors import ClusterError

Kind = Literal["", "small", "freezable"]
SMALL = "24m"
_IMAGE_BYTES = 64 * 2**20


@contextlib.contextmanager
def mounted(kind: Kind, folder: Path, image: Path) -> Iterator[None]:
    """``folder`` as a file system of its own.

    Args:
        kind: ``small``: a tmpfs of a few megabytes. ``freezable``: ext4 in a file. "": leave it as it is.
        folder: Made if it is missing.
        image: The file that holds ``freezable``.

    Raises:
        ClusterError: It cannot be made.
    """
    if not kind:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "small":
        _command("mount", "-t", "tmpfs", "-o", f"size={SMALL}", "phalanx-drill", str(folder))
    else:
        with open(image, "wb") as file:
            file.truncate(_IMAGE_BYTES)
        _command("mkfs.ext4", "-q", "-F", str(image))
        _command("mount", "-o", "loop", str(image), str(folder))
    try:
        yield
    finally:
        if kind == "freezable":
            subprocess.run(["fsfreeze", "--unfreeze", str(folder)], capture_output=True, check=False)
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
        image.unlink(missing_ok=True)


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"The file system of the rehearsal: {' '.join(words)} failed.", why=done.stderr.strip())

"""Where state on disks can be tested: tmpfs of older kernels has no direct I/O, and users may lock little memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from jobs.disks import require_locked
from strategies.errors import ConfigError

LOCKED_BYTES = 32 << 20
"""What a rank of a test with state on disks locks at most."""


def no_direct_io(folder: Path) -> str:
    """Why files in a folder cannot be opened for direct I/O; empty if they can."""
    path = folder / f".direct-{os.getpid()}"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return f"the file system of {folder} has no direct I/O"
    finally:
        path.unlink(missing_ok=True)
    return ""


def no_locked_memory(size: int) -> str:
    """Why a process of this user cannot lock so many bytes; empty if it can."""
    try:
        require_locked(size)
    except ConfigError as error:
        return error.what
    return ""


def require_direct_io(folder: Path) -> None:
    """Skip the test unless files in a folder can be opened for direct I/O."""
    if why := no_direct_io(folder):
        pytest.skip(why)


def require_state_on_disks(folder: Path) -> None:
    """Skip the test unless ranks can keep state in a folder: direct I/O, and memory that may be locked for it."""
    if why := no_direct_io(folder) or no_locked_memory(LOCKED_BYTES):
        pytest.skip(why)

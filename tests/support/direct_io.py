"""Where state on disks can be tested: tmpfs of older kernels has no direct I/O."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest


def require_direct_io(folder: Path) -> None:
    """Skip the test unless files in a folder can be opened for direct I/O."""
    path = folder / "direct"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip(f"the file system of {folder} has no direct I/O")
    finally:
        path.unlink(missing_ok=True)

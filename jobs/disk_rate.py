"""How fast a disk is for programs: a file written and synced, and read again past the page cache.

A file that is measured has no name: nothing of it is left however the process ends.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

from jobs.mounts import TABLE, mount_of

BLOCK_BYTES = 4 << 20
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
"""File systems without a disk behind them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskTimes:
    """What one file took.

    Attributes:
        size: Bytes of the file.
        write_s: Seconds to write and sync it.
        read_s: Seconds to read it again.
        direct: Neither went through the page cache (O_DIRECT); else what was written was dropped from it before
            reading, which a file system may decline.
    """

    size: int
    write_s: float
    read_s: float
    direct: bool


def file_system(folder: Path) -> str:
    """Kind of the file system that a folder is on, by the kernel's name; empty where that cannot be told."""
    try:
        mount = mount_of(os.path.realpath(folder), TABLE.read_text())
    except OSError:
        return ""
    return mount.kind if mount is not None else ""


def measure(folder: Path, size: int) -> DiskTimes:
    """Write a file of ``size`` bytes, sync it, and read it again.

    Args:
        folder: Where; it has to be there.
        size: Bytes, rounded up to whole blocks of :data:`BLOCK_BYTES`.

    Raises:
        OSError: The file cannot be made, written or read.
    """
    file, direct = _nameless(folder)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:  # aligned to a page, as O_DIRECT wants it
            block.write(os.urandom(BLOCK_BYTES))  # nothing that a file system could compress
            blocks = -(-size // BLOCK_BYTES)
            began = time.perf_counter()
            for index in range(blocks):
                _whole(os.pwrite(file, block, index * BLOCK_BYTES))
            os.fsync(file)
            write_s = time.perf_counter() - began
            if not direct:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            for index in range(blocks):
                _whole(os.preadv(file, [block], index * BLOCK_BYTES))
            read_s = time.perf_counter() - began
    finally:
        os.close(file)
    return DiskTimes(size=blocks * BLOCK_BYTES, write_s=write_s, read_s=read_s, direct=direct)


def _whole(count: int) -> None:
    if count != BLOCK_BYTES:
        raise OSError(errno.EIO, f"{count} of {BLOCK_BYTES} bytes went through")


def _nameless(folder: Path) -> tuple[int, bool]:
    """A file without a name, and whether it goes past the page cache; not every file system can do either."""
    path = folder / f".phalanx-disk-{os.getpid()}-{os.urandom(4).hex()}"
    for direct in (os.O_DIRECT, 0):
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | direct, 0o600)
        except OSError as error:
            path.unlink(missing_ok=True)  # a refused O_DIRECT has made it already
            if not direct or error.errno != errno.EINVAL:
                raise
        else:
            path.unlink()
            return file, bool(direct)
    raise AssertionError("unreachable")


def largest(folder: Path, limit: int, seconds: float, *, first: int = 16 << 20) -> DiskTimes:
    """The file whose writing takes long enough to be told from noise, or the largest that may be.

    Args:
        folder: Where.
        limit: Bytes that a file may have.
        seconds: How long writing should take.
        first: Bytes to begin with.
    """
    size = max(BLOCK_BYTES, min(first, limit))
    found = measure(folder, size)
    while found.write_s < seconds and 4 * size <= limit:
        size *= 4
        found = measure(folder, size)
    return found

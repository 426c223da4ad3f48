"""Shared memory that ranks copy into: allocated and faulted in ahead, used again and again."""

from __future__ import annotations

import mmap
import os
import threading
from itertools import count

_ZEROS = bytes(4 << 20)
_numbers = count(1)


class Buffer:
    """One piece of anonymous shared memory. Its memory is free once nobody maps it any more.

    Args:
        size: Bytes.

    Attributes:
        number: Names it on the connections to ranks.
        size: Bytes.
        fd: To be passed to the rank that fills it.
    """

    def __init__(self, size: int) -> None:
        self.number = next(_numbers)
        self.size = size
        self.fd = os.memfd_create(f"phalanx-{self.number}", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._faulted = threading.Event()
        self._faulted.set()
        self._closed = False
        self._map: mmap.mmap | None = None

    def fault_in(self) -> None:
        """Make its pages exist, in the background: a first copy must not wait for the kernel to clear them."""
        self._faulted.clear()
        # Of its own: once we are closed, the number of ours may be that of another file.
        threading.Thread(target=self._fill, args=(os.dup(self.fd),), daemon=True).start()

    def _fill(self, fd: int) -> None:
        try:
            for at in range(0, self.size, len(_ZEROS)):
                if self._closed:
                    break
                os.pwrite(fd, _ZEROS[: min(len(_ZEROS), self.size - at)], at)
        except OSError:
            pass  # the copy will meet the same want of memory, and say so
        finally:
            os.close(fd)
            self._faulted.set()

    def wait(self) -> None:
        """Until nothing fills it but its user."""
        self._faulted.wait()

    @property
    def view(self) -> memoryview:
        """Its bytes."""
        if not self.size:
            return memoryview(b"")
        if self._map is None:
            self._map = mmap.mmap(self.fd, self.size)
        return memoryview(self._map)

    def close(self) -> None:
        """Give it up; whoever still looks at it keeps it alive."""
        self._closed = True
        os.close(self.fd)
        self._map = None

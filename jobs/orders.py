"""A word from the controller to a running rank: after which step it is to leave. Pure.

The agent keeps the word in a small piece of memory that its ranks inherit, so that looking costs a rank a microsecond
in every step, needs no other rank and no file system. All ranks look when they have done a step, so the number must be
there before the first of them has; nothing else makes them leave at the same one.
"""

from __future__ import annotations

import os
import struct

_WORD = struct.Struct("<q")


class OrderBook:
    """The agent's side; one for the ranks of one attempt on one node.

    Raises:
        OSError: There is no memory or no file descriptor left.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("phalanx-orders", os.MFD_CLOEXEC)
        self.after = 0
        self._write()

    def share(self) -> int:
        """A descriptor for a rank, :class:`Orders` reads it; it is the caller's to close."""
        return os.dup(self._fd)

    def leave(self, after: int, *, reached: int) -> None:
        """Leave after step ``after``. An order that some rank here may just obey stays.

        Args:
            after: The step.
            reached: The highest step that a rank here has completed.
        """
        if self.after and reached <= self.after:
            return
        self.after = after
        self._write()

    def _write(self) -> None:
        os.pwrite(self._fd, _WORD.pack(self.after), 0)

    def close(self) -> None:
        """Forget it; ranks keep what they have."""
        os.close(self._fd)


class Orders:
    """The rank's side.

    Args:
        fd: Descriptor from the agent, or -1.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def leaves_after(self, step: int) -> bool:
        """Whether the ranks leave when this step is done, before the next one."""
        if self._fd < 0:
            return False
        word = os.pread(self._fd, _WORD.size, 0)
        return len(word) == _WORD.size and _WORD.unpack(word)[0] == step

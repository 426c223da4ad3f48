"""A word from the controller to a running rank: after which step it is to leave, and what it saves then. Pure.

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
        self._in_memory = False
        self._write()

    def share(self) -> int:
        """A descriptor for a rank, :class:`Orders` reads it; it is the caller's to close."""
        return os.dup(self._fd)

    def leave(self, after: int, *, reached: int, in_memory: bool = False) -> None:
        """Leave after step ``after``. An order that some rank here may just obey stays.

        Args:
            after: The step.
            reached: The highest step that a rank here has completed.
            in_memory: A copy in memory is enough; who has said so may still ask for one on disk, after the same step.
        """
        stays = bool(self.after) and reached <= self.after
        if stays and (after != self.after or in_memory):
            return
        self.after, self._in_memory = after, in_memory
        self._write()

    def _write(self) -> None:
        os.pwrite(self._fd, _WORD.pack(self.after << 1 | self._in_memory), 0)

    def close(self) -> None:
        """Forget it; ranks keep what they have."""
        os.close(self._fd)


class Orders:
    """The rank's side.

    Args:
        fd: Descriptor from the agent, or -1.

    Attributes:
        in_memory: The newest word that was seen asks for no more than a copy in memory. Other ranks may have seen
            another one for the same step: what counts is what one of them has.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.in_memory = False

    def leaves_after(self, step: int) -> bool:
        """Whether the ranks leave when this step is done, before the next one."""
        if self._fd < 0:
            return False
        word = os.pread(self._fd, _WORD.size, 0)
        if len(word) != _WORD.size:
            return False
        after, in_memory = divmod(_WORD.unpack(word)[0], 2)
        self.in_memory = bool(in_memory)
        return bool(after == step)

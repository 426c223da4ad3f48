"""File systems that hold up whoever uses them. Needs root.

One that is frozen takes no writes, and nothing ends a process that writes there: stands for a driver that takes its
time, and for a server of files that is being started again. One that is silent answers nothing at all, as a share that
is mounted hard and whose link is down.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.drill import disks
from launcher.drill.needs import Need, missing
from strategies.errors import ClusterError
from tests.support.jobspecs import GPT, make_plan


class FreezableDisk:
    """A file system of its own.

    Args:
        folder: Where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def freeze(self) -> None:
        """Every writer stands still from now on."""
        subprocess.run(["fsfreeze", "--freeze", str(self._folder)], check=True, capture_output=True)

    def thaw(self) -> None:
        """They go on."""
        subprocess.run(["fsfreeze", "--unfreeze", str(self._folder)], check=True, capture_output=True)


@contextlib.contextmanager
def freezable_disk(folder: Path, image: Path) -> Iterator[FreezableDisk]:
    """``folder`` as a file system that can be frozen; it is thawed at the end."""
    lacking = missing([Need.FREEZE], make_plan(GPT, 1))
    if lacking:
        pytest.skip(lacking)
    with contextlib.ExitStack() as stack:
        disk = FreezableDisk(folder)
        try:
            stack.enter_context(disks.mounted("freezable", folder, image))
            disk.freeze()
            disk.thaw()
        except (ClusterError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine does not let us freeze a file system of our own: {error}")
        yield disk


@contextlib.contextmanager
def frozen_disk(folder: Path, image: Path) -> Iterator[Callable[[], None]]:
    """``folder`` as a file system on which every writer stands still, until what is yielded is called."""
    with freezable_disk(folder, image) as disk:
        disk.freeze()
        yield disk.thaw


@contextlib.contextmanager
def silent_share(folder: Path) -> Iterator[Callable[[], None]]:
    """Over ``folder``: whoever looks there waits, until what is yielded is called. Files that are open stay usable."""
    try:
        server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)  # it will not say a word
    except OSError as error:
        pytest.skip(f"this machine has no /dev/fuse: {error}")
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, server)  # whoever waits there is told that nobody will come
        options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"phalanx-silent", os.fsencode(folder), b"fuse", 0, options) != 0:
            pytest.skip(f"this machine does not let us mount a share: {os.strerror(ctypes.get_errno())}")
        stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
        yield stack.close

"""Memory cgroups: one of the kernel's own for a process that is to run short, or files that look like some."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cgroup import memory_group


@contextlib.contextmanager
def limited(size: int) -> Iterator[Path]:
    """A group below our own whose processes may use ``size`` bytes; gone at the end, which nobody may be in by then.

    Skips the test where the kernel does not let us make one.
    """
    own = memory_group()
    if own is None:
        pytest.skip("there is no memory cgroup here that can be seen")
    folder = own.folder / f"phalanx-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made below {own.folder}: {error}")
    try:
        limits = [file for name in ("memory.max", "memory.limit_in_bytes") if (file := folder / name).exists()]
        if not limits:
            pytest.skip("the group that these tests run in gives no memory controller to groups below it")
        limits[0].write_text(str(size))
        with contextlib.suppress(OSError):
            (folder / "memory.swap.max").write_text("0")
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """A process that has just ended is still in its group for a moment."""
    deadline = time.monotonic() + 10.0
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


class Tree:
    """Files that say what a kernel might.

    Args:
        root: A fresh folder.
        version: Of the cgroups.
        mounted: Which part of the hierarchy is mounted.
    """

    def __init__(self, root: Path, version: int, mounted: str = "/") -> None:
        self.proc = root / "proc"
        self.top = root / "cgroup"
        self._version = version
        self._mounted = mounted
        kind = "cgroup cgroup rw,memory" if version == 1 else "cgroup2 cgroup2 rw"
        other = "30 23 0:28 / /elsewhere rw - tmpfs tmpfs rw,mode=755"
        self._write(self.proc / "self" / "mountinfo", f"{other}\n35 31 0:32 {mounted} {self.top} rw - {kind}\n")

    def put(self, pid: int | str, path: str) -> None:
        """A process is in a group."""
        lines = f"4:memory:{path}\n0::/\n" if self._version == 1 else f"0::{path}\n"
        self._write(self.proc / str(pid) / "cgroup", f"12:cpu,cpuacct:/other\n{lines}")

    def group(self, inside: str, *, limit: int | None = None, kills: int = 0, below: int = 0) -> None:
        """A group, by its path below the mount.

        Args:
            inside: Its path.
            limit: In bytes.
            kills: Its own victims.
            below: Victims in groups below it.
        """
        folder = self.top / inside
        if self._version == 1:
            self._write(folder / "memory.limit_in_bytes", f"{limit or 9223372036854771712}\n")
            self._write(folder / "memory.oom_control", f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")
        else:
            self._write(folder / "memory.max", f"{limit or 'max'}\n")
            self._write(folder / "memory.events.local", f"low 0\noom {kills}\noom_kill {kills}\noom_group_kill 0\n")
            self._write(folder / "memory.events", f"low 0\noom 0\noom_kill {kills + below}\noom_group_kill 0\n")

    def machine(self, kills: int) -> None:
        """What the whole machine counts."""
        self._write(self.proc / "vmstat", f"nr_free_pages 6\noom_kill {kills}\nnr_tlb 1\n")

    @staticmethod
    def _write(file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

"""The memory that a process may use, and whom the kernel has killed for want of it: what Linux says in files.

Of cgroups both versions are read: a process is charged to the nearest group above it that counts memory, and may use as
much as the tightest of that and all groups around it allows. Groups outside of a container cannot be seen from inside.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.mounts import mounts

PROC = Path("/proc")
_UNLIMITED = 1 << 60  # version 1 says "no limit" as a number of about 2^63


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryGroup:
    """The group that the memory of a process is charged to.

    Attributes:
        folder: Its folder.
        top: Folder of the outermost group that can be seen.
        name: Its name, as the kernel says it.
    """

    folder: Path
    top: Path
    name: str

    def limit_bytes(self) -> int | None:
        """The tightest limit of the group and those around it; None where there is none."""
        limits = [limit for folder in _upwards(self.folder, self.top) if (limit := _limit_of(folder)) is not None]
        return min(limits, default=None)

    def oom_kills(self) -> int | None:
        """Processes of this very group that the kernel has killed for want of memory, whosever limit it was.

        None where the kernel does not count them (version 1 before Linux 4.13).
        """
        for name in ("memory.events.local", "memory.events", "memory.oom_control"):
            count = _count(self.folder / name)
            if count is not None:
                return count
        return None


def memory_group(pid: int | str = "self", proc: Path = PROC) -> MemoryGroup | None:
    """The group of a process; None where there is none, or it cannot be seen from here."""
    try:
        groups = (proc / str(pid) / "cgroup").read_text().splitlines()
        table = (proc / "self" / "mountinfo").read_text()
    except OSError:
        return None
    paths: dict[str, str] = {}
    for line in groups:
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for controller in ("memory", ""):  # version 1 where it has the memory, else version 2
        if controller in paths:
            for root, top in _mounted(table, controller):
                found = _group_below(root, top, paths[controller])
                if found is not None:
                    return found
    return None


def _mounted(table: str, controller: str) -> Iterator[tuple[str, Path]]:
    """Which part of the hierarchy is mounted where; ``controller`` is empty for version 2."""
    for mount in mounts(table):
        if mount.kind == "cgroup" and controller in mount.options if controller else mount.kind == "cgroup2":
            yield mount.root, Path(mount.point)


def _group_below(root: str, top: Path, path: str) -> MemoryGroup | None:
    inside = path if root == "/" else path.removeprefix(root)
    if (root != "/" and not path.startswith(root)) or ".." in inside.split("/"):
        return None
    for folder in _upwards(top / inside.lstrip("/"), top):
        if (folder / "memory.events").exists() or (folder / "memory.oom_control").exists():
            return MemoryGroup(folder=folder, top=top, name=path)
    return None


def _upwards(folder: Path, top: Path) -> Iterator[Path]:
    yield folder
    while folder != top:
        folder = folder.parent
        yield folder


def _limit_of(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            limit = int((folder / name).read_text())
        except (OSError, ValueError):  # not here; or "max"
            continue
        return limit if limit < _UNLIMITED else None
    return None


def _count(file: Path) -> int | None:
    """The ``oom_kill`` of a file of names and numbers."""
    try:
        rows = dict(line.split(maxsplit=1) for line in file.read_text().splitlines() if " " in line)
        return int(rows["oom_kill"])
    except (OSError, KeyError, ValueError):
        return None


def oom_kills_of_machine(proc: Path = PROC) -> int | None:
    """Processes of the whole machine that the kernel has killed for want of memory; None where it does not say."""
    return _count(proc / "vmstat")


def usable_memory(proc: Path = PROC) -> int:
    """Bytes of memory that this process may use: those of the machine, or of its group where that is less."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = memory_group(proc=proc)
    limit = group.limit_bytes() if group is not None else None
    return installed if limit is None else min(installed, limit)

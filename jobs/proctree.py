"""Who descends from whom on this machine, read from /proc; and how to kill a whole tree. Standard library only.

As a program, ``python -I -S proctree.py PID...`` kills the trees below these ids: for a member of the tree, which would
die with its parent before it had killed them all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One live process.

    Attributes:
        pid: Its id.
        parent: Id of its parent.
        name: Name of its executable, as the kernel shortens it (15 bytes).
    """

    pid: int
    parent: int
    name: str


def processes() -> dict[int, Process]:
    """Every process that is not a zombie, by id."""
    found = {}
    for entry in os.listdir("/proc"):
        process = _read(entry) if entry.isdecimal() else None
        if process is not None:
            found[process.pid] = process
    return found


def _read(entry: str) -> Process | None:
    try:
        line = Path("/proc", entry, "stat").read_text(errors="replace")
    except OSError:  # gone since it was listed
        return None
    name, rest = line[line.index("(") + 1 : line.rindex(")")], line[line.rindex(")") + 1 :].split()
    return None if rest[0] in "ZX" else Process(pid=int(entry), parent=int(rest[1]), name=name)


def ancestors(pid: int) -> Iterator[Process]:
    """Parent, grandparent and so on of ``pid``, as far as they live."""
    table = processes()
    current = table.get(pid)
    while current is not None and current.parent in table:
        current = table[current.parent]
        yield current


def descendants(roots: Collection[int]) -> set[int]:
    """The live ones of ``roots`` and all below them."""
    table = processes()
    children: dict[int, list[int]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    waiting = [root for root in roots if root in table]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return found


def kill_trees(roots: Collection[int], spare: Collection[int] = ()) -> set[int]:
    """SIGKILL ``roots`` and all below them, such that none can start another in between.

    Args:
        roots: Tops of the trees.
        spare: Ids that are left alone.

    Returns:
        The ids that were killed.
    """
    stopped: set[int] = set()
    while fresh := descendants(roots) - stopped - set(spare):
        for pid in fresh:  # a stopped process forks no more, and keeps its children findable under it
            _signal(pid, signal.SIGSTOP)
        stopped |= fresh
    for pid in stopped:
        _signal(pid, signal.SIGKILL)
    return stopped


def kill_own_trees(roots: Collection[int]) -> None:
    """As :func:`kill_trees`, where this process is in one of the trees; returns before it is dead."""
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *map(str, roots)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    kill_trees([int(argument) for argument in sys.argv[1:]], spare=[os.getpid()])

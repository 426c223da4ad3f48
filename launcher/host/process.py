"""Processes of this machine: which are ours, which are alive, and how to be sure that none is left.

Everything that an agent starts carries a mark in its environment. A process can leave its parent, its group and its
session, but not the environment it was started with, so the mark finds what every other bookkeeping has lost.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

_EXITING = 0x4  # PF_EXITING of the kernel's task flags
_TELLING = "DTtRSIZX"  # states of tasks: of several the first explains why their process does not end

MARK = "PHALANX_HOST"
"""Environment variable that marks a process: ``<incarnation of the agent>.<generation of its pool>``."""


def is_running(pid: int) -> bool:
    """Whether ``pid`` exists and is not a zombie."""
    return state(pid) not in ("", "Z", "X")


def _stat(pid: int, task: str = "") -> list[str]:
    """The fields of the kernel's ``stat`` from the third on; none when there is no such process, or task of it."""
    try:
        return Path(f"/proc/{pid}/{task}stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def state(pid: int) -> str:
    """One letter for the kernel's view of ``pid`` (``R``, ``S``, ``Z``, ...); empty when it does not exist."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def is_ending(pid: int) -> bool:
    """Whether ``pid`` has begun to exit, is a zombie, or does not exist: whatever ends it has happened already."""
    fields = _stat(pid)
    return not fields or fields[0] in "ZX" or bool(int(fields[6]) & _EXITING)


def birth(pid: int) -> int:
    """When ``pid`` was started (ticks since the machine's start), which tells it from a later one; 0 for none."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def has_ended(pid: int, born: int) -> bool:
    """Whether the process that was started at ``born`` holds nothing any more: no memory, no file, no device.

    It shows no environment long before that, and its first thread may be a zombie while others still end.
    """
    fields = _stat(pid)
    return not fields or int(fields[19]) != born or (fields[0] in "ZX" and int(fields[17]) <= 1)


def standing(pid: int) -> str:
    """Where a process that does not end stands, for people: its state and, if known, the place in the kernel."""
    try:
        tasks = [f"task/{name}/" for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return ""
    states = {task: fields[0] for task in tasks if (fields := _stat(pid, task))}
    if not states:
        return ""
    stuck = min(states, key=lambda task: _TELLING.find(states[task]))
    try:
        place = Path(f"/proc/{pid}/{stuck}wchan").read_text().strip()
    except OSError:
        place = ""
    return f"state {states[stuck]}" + (f" in {place}" if place not in ("", "0") else "")


def parent_and_session(pid: int) -> tuple[int, int]:
    """Parent's process id and session id of ``pid``; zeros when it does not exist."""
    fields = _stat(pid)
    return (int(fields[1]), int(fields[3])) if fields else (0, 0)


def environment(pid: int) -> dict[str, str]:
    """The environment that ``pid`` was started with; empty when it cannot be read."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.partition(b"=") for item in raw.split(b"\0") if item)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def command_line(pid: int) -> list[str]:
    """Arguments of ``pid``; empty when it cannot be read."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(item) for item in raw.split(b"\0")[:-1]]


def all_pids() -> list[int]:
    """Every process id of this machine that is visible."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def marked(prefix: str) -> list[int]:
    """Living processes whose mark begins with ``prefix``, this process left out."""
    own = os.getpid()
    needle = f"{MARK}={prefix}".encode()
    found = []
    for pid in all_pids():
        try:
            raw = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if pid != own and any(item.startswith(needle) for item in raw.split(b"\0")) and is_running(pid):
            found.append(pid)
    return found


def kill_marked(prefix: str, *, timeout_s: float = 10.0) -> list[int]:
    """SIGKILL all processes whose mark begins with ``prefix``, again and again until none is left.

    Returns:
        Process ids that were still there after ``timeout_s`` (in the kernel's uninterruptible sleep, for example).
    """
    deadline = time.monotonic() + timeout_s
    while left := marked(prefix):
        for pid in left:
            send(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        time.sleep(0.01)
    return []


def send(pid: int, signum: int) -> None:
    """Send a signal to a process; one that is gone is no error."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return


def send_group(group: int, signum: int) -> bool:
    """Send a signal to a process group; returns whether there was one."""
    try:
        os.killpg(group, signum)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll ``condition`` every 20 ms until it holds or ``timeout_s`` is over; returns whether it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True

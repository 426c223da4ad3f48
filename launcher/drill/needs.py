"""What this machine lets a drill do. Looks, and changes nothing that stays."""

from __future__ import annotations

import enum
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec

from strategies.plan import ParallelPlan


class Need(enum.StrEnum):
    """Something that a fault needs; the value is how a person reads it."""

    NETWORK = "root and iproute2 (ip netns)"
    SHAPING = "a kernel with the tbf queueing discipline (tc)"
    TMPFS = "root, to mount a tmpfs"
    FREEZE = "root, mkfs.ext4 and fsfreeze, to mount a file system of its own and to freeze it"
    RAY = "Ray (pip install 'phalanx[ray]')"
    TWO_NODES = "a plan of two nodes or more"


def missing(needs: Iterable[Need], plan: ParallelPlan) -> str:
    """What of ``needs`` is not there, as a list for people; "" when nothing is missing."""
    lacking = [need.value for need in needs if not (plan.world_size > 1 if need is Need.TWO_NODES else _has(need))]
    return "; ".join(lacking)


@cache
def _has(need: Need) -> bool:
    probes: dict[Need, Callable[[], bool]] = {
        Need.NETWORK: lambda: _is_root("ip") and _quiet("ip", "netns", "list"),
        Need.SHAPING: lambda: _is_root("ip", "tc") and _shapes(),
        Need.TMPFS: lambda: _is_root("mount", "umount"),
        Need.FREEZE: lambda: _is_root("mount", "umount", "losetup", "mkfs.ext4", "fsfreeze"),
        Need.RAY: lambda: find_spec("ray") is not None,
    }
    return probes[need]()


def _is_root(*programs: str) -> bool:
    return os.geteuid() == 0 and all(shutil.which(program) for program in programs)


def _shapes() -> bool:
    """Whether the kernel has the discipline: tried on the loopback interface of a namespace that is thrown away."""
    name = f"phxp{os.getpid()}"
    if not _quiet("ip", "netns", "add", name):
        return False
    try:
        shape = ("tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", "8mbit", "burst", "16kb", "latency", "50ms")
        return _quiet("ip", "netns", "exec", name, *shape)
    finally:
        _quiet("ip", "netns", "del", name)


def _quiet(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0

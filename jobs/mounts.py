"""The table of mounts, as the kernel shows it to a process (proc(5), mountinfo). Pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TABLE = Path("/proc/self/mountinfo")


class Mount(NamedTuple):
    """One file system in its place.

    Attributes:
        root: Which part of it is mounted.
        point: Where; without a slash at its end.
        kind: The kernel's name of it.
        options: Of the mount and of the file system.
    """

    root: str
    point: str
    kind: str
    options: tuple[str, ...]


def mounts(table: str) -> Iterator[Mount]:
    """The rows of a table; a line that is none is passed over."""
    for line in table.splitlines():
        head, _, tail = line.partition(" - ")
        fields, rest = head.split(), tail.split()
        if len(fields) < 6 or len(rest) < 3:
            continue
        point = fields[4].replace("\\040", " ").rstrip("/")
        yield Mount(fields[3], point, rest[0], (*fields[5].split(","), *rest[2].split(",")))


def mount_of(path: str, table: str) -> Mount | None:
    """What a real path is on: of the mounts above it the deepest, and of those the last."""
    found: Mount | None = None
    for mount in mounts(table):
        above = path == mount.point or path.startswith(mount.point + "/")
        if above and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found

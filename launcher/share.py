"""What machines see of each other's files in a shared folder, and when. Reads the table of mounts only.

Records that decide something (:func:`launcher.store.create_exclusive`) are made by ``link``, which the server does or
refuses, whatever a client believes. Reading is another matter: NFS shows what it has seen. A file that is opened anew
is asked for again (close-to-open), unless the mount has ``nocto``: then an old content may be shown for ``acregmax``.
That a file is *not* there is believed until the folder is looked at again, which a change of our own in it brings
about. Other shared file systems (Lustre, GPFS, CephFS) are coherent; those without hard links are refused.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
_KEPT_S = 60.0  # acregmax, where the mount does not say otherwise
_NFS = ("nfs", "nfs4")


def stale_s(path: Path, mounts: Path = MOUNTS) -> float:
    """Seconds for which a file that another machine has written may be seen as it was before; 0 as a rule."""
    kind, options = "", [""]
    with contextlib.suppress(OSError):
        kind, options = _mount_of(os.path.realpath(path), mounts.read_text())
    if kind not in _NFS or "nocto" not in options or "noac" in options:
        return 0.0
    told = dict(one.split("=", 1) for one in options if "=" in one)
    with contextlib.suppress(ValueError):
        return float(told.get("acregmax") or told.get("actimeo") or _KEPT_S)
    return _KEPT_S


def _mount_of(path: str, table: str) -> tuple[str, list[str]]:
    """Kind and options of the file system of a path: of the mounts above it the deepest, and of those the last."""
    found, deepest = ("", [""]), -1
    for line in table.splitlines():
        head, _, tail = line.partition(" - ")
        fields, rest = head.split(), tail.split()
        if len(fields) < 6 or len(rest) < 3:
            continue
        point = fields[4].replace("\\040", " ").rstrip("/")
        if (path == point or path.startswith(point + "/")) and len(point) >= deepest:
            found, deepest = (rest[0], [*fields[5].split(","), *rest[2].split(",")]), len(point)
    return found


def look_again(folder: Path, name: str) -> None:
    """Change a folder, so that a client that keeps what is not there asks the server anew; raises OSError."""
    mark = folder / f".{name}"
    mark.touch()
    mark.unlink(missing_ok=True)

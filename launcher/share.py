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

from jobs.mounts import TABLE, mount_of

_KEPT_S = 60.0  # acregmax, where the mount does not say otherwise
_NFS = ("nfs", "nfs4")


def stale_s(path: Path, table: Path = TABLE) -> float:
    """Seconds for which a file that another machine has written may be seen as it was before; 0 as a rule."""
    mount = None
    with contextlib.suppress(OSError):
        mount = mount_of(os.path.realpath(path), table.read_text())
    if mount is None or mount.kind not in _NFS or "nocto" not in mount.options or "noac" in mount.options:
        return 0.0
    told = dict(one.split("=", 1) for one in mount.options if "=" in one)
    with contextlib.suppress(ValueError):
        return float(told.get("acregmax") or told.get("actimeo") or _KEPT_S)
    return _KEPT_S


def look_again(folder: Path, name: str) -> None:
    """Change a folder, so that a client that keeps what is not there asks the server anew; raises OSError."""
    mark = folder / f".{name}"
    mark.touch()
    mark.unlink(missing_ok=True)

"""``phalanx plan --report``: the estimate as one page that opens anywhere, also without a network."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strategies.errors import StorageError
from strategies.plan import ParallelPlan
from strategies.specs import ClusterSpec


def write_report(path: Path, document: Mapping[str, Any], plan: ParallelPlan, cluster: ClusterSpec) -> None:
    """Write the page, whole or not at all; an older page of that name is replaced.

    Args:
        path: Where to.
        document: What ``plan --json`` prints, with an ``estimate``.
        plan: The plan of the document.
        cluster: The machine of the document.

    Raises:
        StorageError: The folder does not exist, or cannot be written to.
    """
    from launcher.report.page import page

    text = page(document, plan, cluster)
    require_place(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
            os.replace(name, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise StorageError(f"The report {path} cannot be written.", why=str(error)) from error


def require_place(path: Path) -> None:
    """Raise StorageError if a report cannot be written there; cheap, for before the work."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise StorageError(f"The report cannot be written: there is no folder {folder}.", hint=f"mkdir -p {folder}")
    if path.is_dir():
        raise StorageError(f"The report cannot be written: {path} is a folder.", hint=f"--report {path}/plan.html")

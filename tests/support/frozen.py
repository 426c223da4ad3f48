"""Ranks that SIGKILL does not end: they write to a file system that is frozen. Stands for a driver that takes its time.

Needs root.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.drill import disks
from launcher.drill.needs import Need, missing
from strategies.errors import ClusterError
from tests.support.jobspecs import GPT, make_plan


@contextlib.contextmanager
def frozen_disk(folder: Path, image: Path) -> Iterator[Callable[[], None]]:
    """``folder`` as a file system on which every writer stands still, until what is yielded is called."""
    lacking = missing([Need.FREEZE], make_plan(GPT, 1))
    if lacking:
        pytest.skip(lacking)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(disks.mounted("freezable", folder, image))
            subprocess.run(["fsfreeze", "--freeze", str(folder)], check=True, capture_output=True)
        except (ClusterError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine does not let us freeze a file system of our own: {error}")
        yield lambda: _thaw(folder)
        subprocess.run(["fsfreeze", "--unfreeze", str(folder)], check=False, capture_output=True)


def _thaw(folder: Path) -> None:
    subprocess.run(["fsfreeze", "--unfreeze", str(folder)], check=True, capture_output=True)

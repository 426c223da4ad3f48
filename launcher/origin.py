"""Where the next attempt begins: in memory, on disk, or at the start. What cannot be used is put on record first."""

from __future__ import annotations

from collections.abc import Callable

from jobs.paths import RunPaths
from jobs.spec import JobSpec
from launcher import progress
from launcher.memory_tier import MemoryTier
from launcher.progress import ResumePoint
from launcher.run import Run


def find(
    paths: RunPaths, job: JobSpec, memory: MemoryTier, *, run: Callable[[], Run], reject: Callable[[str, str], None]
) -> ResumePoint:
    """The newest state that can be had, as far as that can be seen without reading all of it.

    Args:
        paths: The run's files.
        job: What the attempt will do.
        memory: What the nodes hold.
        run: The run as its log tells it now.
        reject: Puts on record that a checkpoint, named by its path, is not used, and why.

    Raises:
        StorageError: The checkpoints cannot be looked at.
    """
    marked = job.kind != "pretrain"  # what is done lies in folders with a mark, not in manifests
    while True:
        disk = progress.on_disk(paths, script=marked, rejected=run().rejected)
        for path, reason in disk.damaged:
            if path not in run().rejected:
                reject(path, reason)
        point = memory.better(disk, run(), job)
        flaw = progress.missing(point, script=marked)
        if not flaw:
            return point
        reject(point.path, flaw)

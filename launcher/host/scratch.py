"""State that ranks keep on the disks of their node goes with them."""

from __future__ import annotations

import sys

from jobs import disks
from jobs.checkpoint.layout import Token
from jobs.paths import RunPaths
from jobs.spec import read_job
from launcher.host import process
from launcher.host.beside import Beside
from launcher.host.ranks import Ranks
from strategies.errors import PhalanxError


def clear(ranks: Ranks, paths: RunPaths, beside: Beside, *, mark: str) -> None:
    """What ranks have left on disks is of no use to anybody; they are gone, or it is still theirs.

    Args:
        ranks: Of the last attempt.
        paths: The run directory, which says whether they had any; where it does not answer, all stays.
        beside: Reads it.
        mark: What the marks of our processes begin with.
    """
    if ranks.kind != "pretrain":
        return
    try:
        job = beside.do(lambda: read_job(paths.job(ranks.attempt)), None)
    except PhalanxError as error:
        print(f"if there is state on disks, it stays: {error}", file=sys.stderr, flush=True)
        return
    if job is not None and disks.on_disks(job.plan) and not process.marked(mark):
        disks.sweep(job, Token(ranks.epoch, ranks.attempt), [rank["rank"] for rank in ranks.describe()["ranks"]])

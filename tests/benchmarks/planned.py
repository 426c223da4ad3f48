"""The largest run of this project, gpt4_1800b on 3,125 nodes, as the planner sees it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from launcher import build
from launcher.config import compose
from strategies.estimate import Estimator
from strategies.failures import Process, Standby
from strategies.plan import ParallelPlan
from strategies.reliability import plan_process
from strategies.specs import BatchSpec, ModelSpec
from tests.support.scale.pace import Pace

NODES, GANG = 3125, 3120
FOLDED = 15  # one replica of the plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """gpt4_1800b as the planner sees it: ``what`` and ``standby`` are what ``phalanx plan`` prints a goodput for."""

    model: ModelSpec
    plan: ParallelPlan
    batch: BatchSpec
    step_s: float
    what: Process
    standby: Standby

    def on(self, nodes: int) -> ParallelPlan:
        """The plan for fewer nodes: fewer replicas of the same shape."""
        return self.plan if nodes == GANG else replace(self.plan, dp=nodes // FOLDED, ep=1)


def gpt4() -> Planned:
    """Composed and estimated."""
    config = compose(["experiment=gpt4_1800b"])
    sketch = build.outline(config)
    work = build.workload(config, sketch)
    assert work is not None
    step_s = sum(Estimator(work).timing.step(sketch.plan))
    what, standby = plan_process(work, sketch.plan, step_s)
    return Planned(model=sketch.model, plan=sketch.plan, batch=work.batch, step_s=step_s, what=what, standby=standby)


@contextmanager
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: a hundred days are up to 74,000 durable lines."""
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def pace(planned: Planned, restart_s: float, *, memory_every: int = 1, disk_every: int = 0) -> Pace:
    """The planner's times, with its own intervals unless others are asked for."""
    what = planned.what
    return Pace(
        step_s=planned.step_s,
        copy_s=what.copy_s,
        replica_s=what.replica_s,
        write_s=what.write_s,
        fetch_s=what.replica_s / 10,
        memory_every=memory_every,
        disk_every=disk_every or round(what.rounded(planned.step_s).disk_s / planned.step_s),
        restart_s=restart_s,
    )

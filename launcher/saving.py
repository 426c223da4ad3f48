"""When a run makes its checkpoints, where, and how long reading them may take: what is left to derive."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jobs.location import locate
from jobs.spec import CheckpointSpec
from launcher.request import START_TIMEOUT_S, RecoverySpec
from launcher.schema import Config
from strategies.errors import ConfigError
from strategies.plan import ParallelPlan
from strategies.reliability import restart_from_disk_s
from strategies.workload import Workload

RESTARTS = 3.0
"""An attempt may take so many times what the planner expects of a restart from disk (a choice: it is no promise)."""


def address(url: str | None, absolute: Callable[[str], str]) -> str | None:
    """Where checkpoints are kept; None for the run directory."""
    if not url:
        return None
    try:
        place = locate(url)
    except ConfigError:  # is refused anyway (:mod:`launcher.contradictions`)
        return url
    return absolute(str(place)) if isinstance(place, Path) else str(place)


def checkpoint_spec(config: Config, work: Workload | None, plan: ParallelPlan, run_dir: Path) -> CheckpointSpec:
    """The checkpoint policy; what only computes has nothing that is worth keeping in memory."""
    policy = config.checkpoint
    return CheckpointSpec(
        every=disk_steps(config, work, plan),
        memory_every=0 if config.job.infers else policy.memory_every,
        keep=policy.keep,
        url=f"{policy.url}/{run_dir.name}" if policy.url else None,
        patience_s=policy.patience_s,
    )


def disk_steps(config: Config, work: Workload | None, plan: ParallelPlan) -> int:
    """Steps between checkpoints on disk; where it is left to the planner and it knows no times, the usual number."""
    if config.checkpoint.every is not None:
        return config.checkpoint.every
    from strategies.estimate import best_disk_steps  # only here: other configurations need no planner

    return CheckpointSpec().every if work is None else best_disk_steps(work, plan)


def patient(recovery: RecoverySpec, work: Workload | None, plan: ParallelPlan) -> RecoverySpec:
    """The same, waiting for a first step as long as reading the checkpoint may take on this cluster."""
    if recovery.start_timeout_s is not None:
        return recovery
    expected_s = 0.0
    if work is not None and work.hardware.storage_bandwidth and work.hardware.host_bandwidth:
        expected_s = restart_from_disk_s(work, plan)
    return replace(recovery, start_timeout_s=float(math.ceil(max(START_TIMEOUT_S, RESTARTS * expected_s))))

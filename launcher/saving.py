"""When a run makes its checkpoints, and where: from the configuration to what the ranks are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jobs.location import locate
from jobs.spec import CheckpointSpec
from launcher.schema import Config
from strategies.plan import ParallelPlan
from strategies.workload import Workload


def address(url: str | None, absolute: Callable[[str], str]) -> str | None:
    """Where checkpoints are kept, checked; None for the run directory.

    Raises:
        ConfigError: Nothing is known of such a place, or it carries credentials.
    """
    if not url:
        return None
    place = locate(url)
    return absolute(str(place)) if isinstance(place, Path) else str(place)


def checkpoint_spec(config: Config, work: Workload | None, plan: ParallelPlan, run_dir: Path) -> CheckpointSpec:
    """The checkpoint policy; what only computes has nothing that is worth keeping in memory."""
    policy = config.checkpoint
    return CheckpointSpec(
        every=disk_steps(config, work, plan),
        memory_every=0 if config.job.infers else policy.memory_every,
        keep=policy.keep,
        url=f"{policy.url}/{run_dir.name}" if policy.url else None,
    )


def disk_steps(config: Config, work: Workload | None, plan: ParallelPlan) -> int:
    """Steps between checkpoints on disk; where it is left to the planner and it knows no times, the usual number."""
    if config.checkpoint.every is not None:
        return config.checkpoint.every
    from strategies.estimate import best_disk_steps  # only here: other configurations need no planner

    return CheckpointSpec().every if work is None else best_disk_steps(work, plan)

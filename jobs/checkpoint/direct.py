"""Checkpoints of a gang without host agents: every rank writes its own part, and training waits for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jobs.checkpoint.keeping import restored_from, warn
from jobs.checkpoint.retention import tidied
from jobs.checkpoint.save import save
from jobs.hooks import Hooks
from jobs.location import Location
from jobs.paths import RunPaths
from jobs.report import Reporter
from jobs.spec import JobSpec, RankEnv


class DirectSaver:
    """The rank writes for itself, and waits: for gangs without host agents. There is no memory tier.

    Args:
        engine: The engine.
        job: The job.
        env: This rank.
        hooks: Whom to tell.
        reporter: Where rank 0 reports ``checkpoint``.
    """

    def __init__(self, engine: Any, job: JobSpec, env: RankEnv, hooks: Hooks, reporter: Reporter) -> None:
        self.copies_every = 0
        self._engine = engine
        self._job = job
        self._env = env
        self._hooks = hooks
        self._reporter = reporter
        self._paths = RunPaths(env.run_dir)
        self._base = restored_from(env)

    def open(self) -> None:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""

    def keep(self, step: int, extra: Mapping[str, Any]) -> None:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""

    def stalled_s(self) -> float:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""
        return 0.0

    def copy(self, step: int, extra: Mapping[str, Any]) -> None:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""
        raise AssertionError("no state is kept in memory here")

    @property
    def in_memory(self) -> bool:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""
        return False

    def finish(self, patience_s: float = 0.0) -> None:
        """See :class:`~jobs.checkpoint.keeping.Saver`; it is on disk when :meth:`save` returns."""

    def save(self, step: int, extra: Mapping[str, Any], *, must: bool = False) -> Location:
        """See :class:`~jobs.checkpoint.keeping.Saver`."""
        token = (self._env.epoch, self._env.attempt)
        saved = save(
            self._engine,
            run_paths=self._paths,
            job=self._job,
            step=step,
            token=token,
            extra=extra,
            hooks=self._hooks,
            base=self._base,
        )
        self._base = saved.path
        if self._env.rank == 0:
            told = dataclasses.asdict(saved) | {"path": str(saved.path)}
            self._reporter.send("checkpoint", step=step, **told)
            warn(tidied(self._paths.checkpoints, self._job.checkpoint.keep, token=token))
        return saved.path

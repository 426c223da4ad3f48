"""What a failure leaves of the checkpoints, as real manifests in the run directory.

The controller takes the resume point from the manifests that are committed on disk. Only the newest matter, so one is
written when a failure makes somebody look: the newest that the disk has committed, and, where the failure left the
memory tier intact, the newest that memory holds, as if its holders had written it out. A manifest has no shards: what
it would promise is not simulated.
"""

from __future__ import annotations

import shutil

from jobs.checkpoint.layout import Place, Token
from jobs.checkpoint.manifest import Manifest, TrainerState, commit
from jobs.paths import RunPaths
from jobs.spec import JobSpec


class Storage:
    """Both tiers of one run.

    Args:
        paths: The run.
        job: What is trained.

    Attributes:
        memory: Newest step that memory holds; 0 for none.
        disk: Newest step that the disk holds; 0 for none.
    """

    def __init__(self, paths: RunPaths, job: JobSpec) -> None:
        self._paths = paths
        self._job = job
        self._written: dict[int, Place] = {}
        self.memory = 0
        self.disk = 0

    def saved(self, *, memory: int, disk: int) -> None:
        """Newer saves are committed."""
        self.memory, self.disk = max(self.memory, memory), max(self.disk, disk)

    def settle(self, token: tuple[int, int], *, memory_lost: bool, now: float) -> None:
        """A failure: make the run directory show what is left, and nothing else."""
        if memory_lost:
            self.memory = 0
        left = {self.memory, self.disk} - {0}
        for step in left - set(self._written):
            self._written[step] = self._write(step, Token(*token), now)
        for step in set(self._written) - left:
            shutil.rmtree(self._written.pop(step).step_dir)

    def _write(self, step: int, token: Token, now: float) -> Place:
        place = Place(self._paths.checkpoints, step, token)
        place.shard_dir.mkdir(parents=True)
        trainer = TrainerState(optimizer_steps=step, learning_rates=(), counters={}, loss_scaler={})
        manifest = Manifest(
            run_id=self._job.run_id,
            step=step,
            epoch=token.epoch,
            attempt=token.attempt,
            time=now,
            plan=self._job.plan,
            model=self._job.model,
            tensors={},
            shards=(),
            trainer=trainer,
            extra={},
        )
        commit(self._paths.checkpoints, manifest)
        return place

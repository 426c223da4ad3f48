"""What ranks have saved: on disk as real manifests, in the memory of nodes as the holdings that they tell.

The controller takes the resume point from the manifests that are committed, and from what the nodes say that they hold.
Of the manifests only the newest matters, so one is written when a failure makes somebody look. It has no shards: what
it would promise is not simulated.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.checkpoint.fence import forget_older
from jobs.checkpoint.layout import Place, Token
from jobs.checkpoint.manifest import Manifest, TrainerState, commit
from jobs.checkpoint.memory import Address, Holding
from jobs.paths import RunPaths
from jobs.spec import JobSpec
from launcher.host.persist.service import other_node

SHARE_BYTES = 1 << 30  # of one rank; nothing is read of it


class Disk:
    """The disk tier of one run.

    Args:
        paths: The run.
        job: What is trained.

    Attributes:
        step: Newest step that is committed; 0 for none.
    """

    def __init__(self, paths: RunPaths, job: JobSpec) -> None:
        self._paths = paths
        self._job = job
        self._place: Place[Path] | None = None
        self.step = 0

    def commit(self, step: int, token: Token, now: float) -> None:
        """The newest step that a gang has committed; an older one than is known changes nothing."""
        if step <= self.step:
            return
        self.step = step
        place = Place(self._paths.checkpoint_dir, step, token)
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
        forget_older(self._paths.checkpoints)  # as retention does after a commit
        if self._place is not None:
            shutil.rmtree(self._place.step_dir)
        self._place = place


@dataclass(frozen=True, kw_only=True, slots=True)
class Shelf:
    """What one node holds in memory: the two newest generations of its own ranks and of those it keeps replicas of.

    Attributes:
        token: The gang that wrote them.
        steps: The generations.
        own: Ranks of the node.
        replicas: Ranks of the other node.
        world: Ranks of the gang.
    """

    token: Token
    steps: tuple[int, ...]
    own: Sequence[int]
    replicas: Sequence[int]
    world: int

    def told(self) -> list[list[Any]]:
        """As a persister tells it."""
        epoch, attempt = self.token
        return [
            Holding(
                step=step, epoch=epoch, attempt=attempt, rank=rank, world=self.world, bytes=SHARE_BYTES, own=own
            ).told()
            for step in self.steps
            for own, ranks in ((True, self.own), (False, self.replicas))
            for rank in ranks
        ]


@functools.cache
def guests(nodes: int, *, apart: bool) -> dict[int, int]:
    """Place in the gang to the place whose replicas are kept there: by the rule of the persisters, or, not ``apart``,
    by that of a system that takes the neighbour."""
    at = [Address(host="", port=place, incarnation="") for place in range(nodes)]
    targets = {place: other_node(at[place], at) for place in (0, nodes // 3, nodes - 1)}
    if targets[0] is None:
        return {}
    away = targets[0].port if apart else 1
    found = {(place + away) % nodes: place for place in range(nodes)}
    for place, target in targets.items() if apart else ():
        assert target is not None
        assert found[target.port] == place, "the rule is the same distance for all"
    return found

"""The launch request: what a dry run prints and what submit sends. A pure function of the configuration."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from jobs.spec import JobSpec
from strategies.codec import to_json
from strategies.specs import ClusterSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverySpec:
    """When to give up, and how patient to be. Durations in seconds.

    Attributes:
        max_restarts: Restarts (all kinds together) before the run fails; a person's resume renews them.
        same_error_limit: The same traceback at the same step this many times ends the run.
        wait_for_nodes_s: How long to wait for a missing node when no spare is left and no smaller plan may be used.
        shrink: Go on with a smaller plan when nodes are missing; scripts never do.
        shrink_after_s: How long to wait before that; null means as long as waiting is cheaper than one more restart.
        grow: Go back to the larger plan, at a checkpoint, when its nodes are there again.
        min_nodes: With fewer nodes it waits; null means whatever is legal.
        start_timeout_s: From placing the ranks to their first step.
        save_timeout_s: A checkpoint that takes longer is taken for stuck.
        detect_s: An agent that is silent for so long is lost.
        lease_s: Without controller and without progress for so long, an agent kills its ranks and leaves.
        grace_s: From SIGTERM to SIGKILL when ranks are stopped on purpose.
        backoff_s: Pause before the second restart without progress; doubles up to ``backoff_max_s``.
        backoff_max_s: Longest pause.
    """

    max_restarts: int = 16
    same_error_limit: int = 2
    wait_for_nodes_s: float = 300.0
    shrink: bool = True
    shrink_after_s: float | None = 60.0
    grow: bool = True
    min_nodes: int | None = None
    start_timeout_s: float = 300.0
    save_timeout_s: float = 1800.0
    detect_s: float = 5.0
    lease_s: float = 60.0
    grace_s: float = 5.0
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingSpec:
    """Experiment tracking.

    Attributes:
        kind: ``wandb`` or ``none``.
        project: W&B project.
        mode: ``offline`` writes to the run directory only; ``online`` also uploads.
    """

    kind: Literal["none", "wandb"] = "wandb"
    project: str = "phalanx"
    mode: Literal["offline", "online"] = "offline"


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchRequest:
    """Everything that a run is made of.

    Attributes:
        run_name: Unique name in its parent folder.
        run_dir: Absolute path of the run directory.
        job: What every rank does; its ``plan`` is the plan of the first attempt.
        cluster: Where it runs.
        recovery: What happens on failures.
        tracking: Where metrics go besides ``metrics.jsonl``.
        overrides: What the user typed.
        version: Version of this document.
    """

    run_name: str
    run_dir: str
    job: JobSpec
    cluster: ClusterSpec
    recovery: RecoverySpec
    tracking: TrackingSpec
    overrides: tuple[str, ...] = ()
    version: int = 1

    @property
    def digest(self) -> str:
        """SHA-256 of the request's canonical JSON."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()

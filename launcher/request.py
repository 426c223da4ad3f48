"""The launch request: what a dry run prints and what submit sends. A pure function of the configuration."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal

from jobs.spec import JobSpec
from strategies.codec import to_json
from strategies.specs import ClusterSpec

START_TIMEOUT_S = 300.0
"""From placing the ranks to their first step, where nothing says that it takes longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """Restarts within ``recovery.budget_window_s`` by what had failed; null: as many as ``recovery.max_restarts``.

    Attributes:
        error: A rank raised an error, or exited with one.
        memory: A device or a node had too little memory.
        hardware: A node, a device, a rank or a link was lost.
        hang: No progress.
        numeric: Training blew up.
        storage: A checkpoint was damaged.
        start: No first step in time.
        preemption: A node was taken away with notice; null: without limit, and never counted in ``max_restarts``.
    """

    error: int | None = 4
    memory: int | None = 2
    hardware: int | None = None
    hang: int | None = 8
    numeric: int | None = 4
    storage: int | None = 4
    start: int | None = 3
    preemption: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverySpec:
    """When to give up, and how patient to be. Durations in seconds.

    Attributes:
        max_restarts: Restarts (all kinds together) within ``budget_window_s`` before the run fails; a person's resume
            renews them.
        budget_window_s: Failures that are older do not count any more; null: none is forgotten.
        budgets: Restarts by what had failed.
        no_progress_limit: So many restarts in a row without a newer checkpoint or a newer step end the run; after a
            fall-back to an older checkpoint, newer than that. So many fall-backs without a step that is the highest of
            all end it, too.
        exclude_after: So many failures of one node within ``exclude_window_s`` exclude it; null: never. Without one of
            its devices a node is excluded in any case.
        exclude_window_s: Older failures do not count against a node.
        exclude_for_s: For so long; a person's resume takes it back at once.
        replace_stragglers: Leave at the next checkpoint when a rank is slow and a spare can take its node's place.
        preempt_grace_s: From the notice that a node will be taken away (SIGTERM to its agent) to the end of its ranks.
        same_error_limit: The same traceback at the same step this many times ends the run; before the first step of an
            attempt only if no other node can be tried.
        wait_for_nodes_s: How long to wait for a missing node when no spare is left and no smaller plan may be used, and
            for checkpoints of which none can be used.
        shrink: Go on with a smaller plan when nodes are missing; scripts never do.
        shrink_after_s: How long to wait before that; null means as long as waiting is cheaper than one more restart
            later, by what restarts have taken (60 s where none is known yet, and at least that after a person's
            resume), and at least ``detect_s`` + 5 s, in which an agent comes up again. Never longer than
            ``wait_for_nodes_s``.
        grow: Go back to the larger plan, at a checkpoint, when its nodes are there again.
        min_nodes: With fewer nodes it waits; null means whatever is legal.
        start_timeout_s: From placing the ranks to their first step; null means three times what the planner expects of
            a restart from disk, and never less than :data:`START_TIMEOUT_S`.
        save_timeout_s: A checkpoint that takes longer is taken for stuck.
        detect_s: An agent that is silent for so long is lost.
        lease_s: Without controller and without progress for so long, an agent kills its ranks and leaves.
        grace_s: From SIGTERM to SIGKILL when ranks are stopped on purpose.
        kill_patience_s: From SIGKILL of a rank to its end, which a driver or a mount can hold up; a node that takes
            longer is given up, and carries no ranks for ``exclude_for_s``.
        backoff_s: Pause before the second restart without progress; doubles up to ``backoff_max_s``.
        backoff_max_s: Longest pause.
    """

    max_restarts: int = 16
    budget_window_s: float | None = 3600.0
    budgets: Budgets = field(default_factory=Budgets)
    no_progress_limit: int = 8
    exclude_after: int | None = 3
    exclude_window_s: float = 3600.0
    exclude_for_s: float = 14400.0
    replace_stragglers: bool = False
    preempt_grace_s: float = 25.0
    same_error_limit: int = 2
    wait_for_nodes_s: float = 300.0
    shrink: bool = True
    shrink_after_s: float | None = None
    grow: bool = True
    min_nodes: int | None = None
    start_timeout_s: float | None = None
    save_timeout_s: float = 1800.0
    detect_s: float = 5.0
    lease_s: float = 60.0
    grace_s: float = 5.0
    kill_patience_s: float = 60.0
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0

    @property
    def first_step_s(self) -> float:
        """How long an attempt may take to its first step."""
        return START_TIMEOUT_S if self.start_timeout_s is None else self.start_timeout_s


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

"""What the planner had promised for a run, beside what came true. Reads nothing; the same keys in both documents.

What nobody can predict is null.

===============  ======================================================================================================
``step_s``       seconds of one optimizer step, without stalls (measured: mean over steps that count)
``stall_s``      seconds that a step waits for one checkpoint on disk (measured: mean over all that were tried)
``detect_s``     seconds from a failure until the controller knows (predicted: the longest, ``recovery.detect_s``;
                 measured: mean over incidents, as of the next four, see :mod:`launcher.account`)
``decide_s``     seconds from then until all old ranks are gone and it is decided what follows (not predicted)
``place_s``      seconds from then until the new ranks exist (not predicted)
``restore_s``    seconds from then until they train (predicted: of it, reading the state, in the mean over the tiers)
``replay_s``     seconds of work that a failure undoes (predicted: in the mean over the tiers)
``restart_s``    seconds from knowing of a failure until the ranks train again (predicted: what the cluster's
                 description says, and reading the state; measured: mean over incidents that recovered)
``goodput``      share of the wall time that is productive (predicted: at the run's own checkpoint intervals and
                 the cluster's failure rate, over a long run)
===============  ======================================================================================================

The prediction has ``step_low_s`` and ``step_high_s``, the 90 % band, as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.account import ORPHANED, Account
from launcher.request import LaunchRequest
from strategies.errors import ConfigError
from strategies.plan import ParallelPlan

PHASES = ("detect", "decide", "place", "restore", "replay")
KEYS = ("step_s", "stall_s", *(f"{phase}_s" for phase in PHASES), "restart_s", "goodput")


def predicted(request: LaunchRequest, plan: ParallelPlan) -> dict[str, Any]:
    """The planner's numbers of a plan, or ``{"why": ...}`` where it has none.

    Args:
        request: Model, batch and machine.
        plan: The plan; smaller than the request's where nodes are missing.
    """
    job = request.job
    if job.kind == "script":
        return {"why": "nobody knows what a step of a script takes"}
    if job.infers:
        return {"why": "the planner knows steps of training only"}
    if request.cluster.hardware is None:
        return {"why": f"nothing is known about the hardware of cluster={request.cluster.name} (phalanx cluster probe)"}
    from strategies.estimate import Estimator  # only here: most that is shown of runs needs no planner
    from strategies.saving import Saving
    from strategies.workload import Workload, run_tokens

    work = Workload(
        model=job.model,
        batch=job.batch,
        cluster=request.cluster.watched(request.recovery.detect_s),
        precision=job.train.precision,
        tokens=float(run_tokens(job.batch, job.train.steps)),
        saving=Saving(job.checkpoint.every, job.checkpoint.memory_every, job.checkpoint.memory_share),
        packing=job.data.packing,
    )
    try:
        estimate = Estimator(work).estimate(plan)
    except ConfigError as error:
        return {"why": error.what}
    outlook = estimate.outlook
    return {
        "step_s": estimate.step_s,
        "step_low_s": estimate.low_s,
        "step_high_s": estimate.high_s,
        "stall_s": outlook.save_disk_s,
        "detect_s": outlook.detect_s,
        "decide_s": None,
        "place_s": None,
        "restore_s": outlook.restore_s,
        "replay_s": outlook.replay_s,
        "restart_s": work.hardware.restart_s + outlook.restore_s,
        "goodput": outlook.goodput,
    }


def measured(books: Account) -> dict[str, Any]:
    """The same of what happened; null where nothing did."""
    tries = books.saves + books.failed_saves
    failures = [one for one in books.incidents if one.kind != ORPHANED]
    return {
        "step_s": books.seconds["productive"] / books.steps if books.steps else None,
        "stall_s": books.disk_stall_s / tries if tries else None,
        **{f"{phase}_s": _mean([one.seconds[phase] for one in failures]) for phase in PHASES},
        "restart_s": _mean([one.restart_s for one in failures if one.recovered]),
        "goodput": books.goodput,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def without_numbers(prediction: Mapping[str, Any]) -> bool:
    """Whether there is no prediction to compare with."""
    return "why" in prediction

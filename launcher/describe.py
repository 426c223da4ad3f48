"""One run as a document: what ``status --json`` prints and what the texts for people are made of. Reads files only.

Of what a run has cost:

===============  ======================================================================================================
``ledger``       seconds per class (:mod:`launcher.account`), and ``wall``, their sum
``goodput``      productive / wall
``data``         ``seconds`` of the productive ones in which rank 0 waited for its samples, and their ``share``
``incidents``    one per failure: ``number``, ``attempt``, ``kind``, ``cause``, ``node``, ``rank`` (-1: none), ``at``
                 (UTC seconds), ``step``, ``steps_lost``, ``action``, ``recovered``; seconds ``detect_s``, ``decide_s``,
                 ``place_s``, ``restore_s``, ``replay_s``, ``wait_s``, and ``total_s``, their sum; of those, null where
                 not known, ``teardown_s`` (of decide), ``device_s``, ``communicators_s``, ``engine_s`` and ``state_s``
                 (of restore)
``predicted``    the planner's numbers (:mod:`launcher.forecast`), or ``why`` there are none
``measured``     the same of what happened
``attempts``     with ``errors``: what the ranks died of, equal errors grouped (:mod:`launcher.rank_errors`)
``excluded``     nodes that carry no ranks for now: ``node``, ``until`` (UTC seconds), ``reason``
``unsaved``      checkpoints that could not be written since the newest that was: ``since`` (UTC seconds), ``times``,
                 and of the last one ``step`` and ``reason``; null where the newest was written
``stragglers``   ranks that were found slow: ``attempt``, ``failure``, ``ratio`` (own time of a step over its peers')
``dying``        what was killed and is waited for now, by ``node``: ``left``, rows of ``rank``, ``pid`` and ``state``
``clocks``       nodes whose clock differs from the controller's: ``node``, ``ahead_s``, ``within_s``
``slow_starts``  nodes whose ranks started as fresh processes, not from the warm pool, and why
===============  ======================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.checkpoint import list_checkpoints
from jobs.paths import RunPaths
from launcher import clocks, forecast, progress, rank_errors, skips, stopping
from launcher.account import INCIDENT_CLASSES, PARTS, Incident
from launcher.attempts import Attempt
from launcher.ledger import account
from launcher.lock import holder_alive, newest_epoch
from launcher.request import LaunchRequest
from launcher.run import EventKind, Run, RunEvent, RunState, fold
from launcher.sizing import plan_of
from launcher.store import RunStore
from strategies.codec import to_json
from strategies.errors import StorageError
from strategies.plan import ParallelPlan

SCHEMA_VERSION = 1
_INCIDENT_FIELDS = (
    "number",
    "attempt",
    "kind",
    "cause",
    "node",
    "rank",
    "at",
    "step",
    "steps_lost",
    "action",
    "recovered",
)
WATCH_S = 2.5  # a controller on another machine beats every second


def describe(store: RunStore, now: float, *, watch_s: float = WATCH_S) -> dict[str, Any]:
    """Everything that the run directory says.

    Args:
        store: The run.
        now: UTC seconds, the end of the accounting of a live run.
        watch_s: How long to watch the heartbeat of a controller on another machine; 0 leaves such a one unknown.

    Raises:
        StorageError: The run directory is damaged.
    """
    request, events = store.request(), store.events()
    if not events:
        raise StorageError(
            f"The log of '{store.name}' says nothing.",
            why=f"{store.paths.events} is missing, empty or damaged",
            hint="Bring it back. What was saved is not lost: phalanx checkpoint ls, phalanx resume.",
        )
    run, script = fold(events), request.job.kind == "script"
    alive = None if run.state.terminal else _controller_alive(store.paths, watch_s)
    last, offset = progress.last_metric(store.paths), clocks.Offset.of(events)
    end = now if alive is not False else max(float(last.get("time", 0.0)) - offset.ahead_s, events[-1].time)
    books = account(events, store.metrics(), end, script=script)
    return {
        "schema_version": SCHEMA_VERSION,
        "run": store.name,
        "dir": str(store.paths.root.absolute()),
        "state": run.state.value,
        "reason": run.reason,
        "orphaned": alive is False,
        "kind": request.job.kind,
        "step": _step(run, last),
        "steps": None if request.job.kind == "script" else request.job.train.steps,
        "submitted": run.submitted,
        "ended": run.ended,
        "epoch": run.epoch,
        "loss": _losses(store, last),
        "tokens_per_s": last.get("tokens_per_s"),
        "moe": last.get("moe"),
        "attempts": [_attempt(attempt, store.paths) for attempt in run.attempts],
        "excluded": _excluded(run, events, now),
        "stragglers": [{"attempt": e.attempt, **e.data} for e in events if e.kind is EventKind.STRAGGLER_FOUND],
        "dying": stopping.awaited(events),
        "clocks": offset.off,
        "slow_starts": [{"attempt": e.attempt, **e.data} for e in events if e.kind is EventKind.POOL_UNSAFE],
        "ranks": _ranks(store.paths, run),
        "steps_lost": run.steps_lost,
        "restarts": run.restarts,
        "recoveries": recoveries(events),
        "incidents": [_incident(one) for one in books.incidents],
        "checkpoint": _checkpoint(store.paths, events, script=request.job.kind != "pretrain"),
        "unsaved": _unsaved(events),
        "skips": skips.skipped(request.job, run),
        "faults": progress.fault_records(store.paths),
        "ledger": dict(books.seconds),
        "goodput": books.goodput,
        "data": {"seconds": books.data_s, "share": books.data_share},
        "stalls": {"memory_s": books.memory_s, "disk_s": books.disk_stall_s},
        "copies_every": last.get("copies_every"),
        "predicted": forecast.predicted(request, _plan(request, run)),
        "measured": forecast.measured(books),
        "weights_digest": run.weights_digest,
        "sample": _text(store.paths.sample),
        "results": progress.results(store.paths) if request.job.infers else None,
    }


def _excluded(run: Run, events: Sequence[RunEvent], now: float) -> list[dict[str, Any]]:
    why = {str(e.data["node"]): str(e.data["reason"]) for e in events if e.kind is EventKind.NODE_EXCLUDED}
    still = sorted((until, node) for node, until in run.excluded.items() if until > now)
    return [{"node": node, "until": until, "reason": why.get(node, "")} for until, node in still]


def brief(store: RunStore) -> dict[str, Any]:
    """One line of the table of runs; cheap, and it never waits. A damaged run is a line too."""
    try:
        run, request = store.run(), store.request()
        last = progress.last_metric(store.paths)
        return {
            "run": store.name,
            "state": run.state.value,
            "orphaned": not run.state.terminal and _controller_alive(store.paths, 0.0) is False,
            "step": _step(run, last),
            "steps": None if request.job.kind == "script" else request.job.train.steps,
            "attempts": len(run.attempts),
            "steps_lost": run.steps_lost,
            "loss": last.get("loss"),
            "submitted": run.submitted,
            "plan": plan_line(request, run),
            "reason": run.reason,
        }
    except Exception as error:  # a run directory that someone damaged must not hide the others
        return {"run": store.name, "state": "damaged", "reason": str(error).splitlines()[0] if str(error) else ""}


def recoveries(events: Sequence[RunEvent]) -> list[float]:
    """Seconds from each failure until the ranks trained again; failures without an end are left out."""
    found: list[float] = []
    failed_at: float | None = None
    for event in events:
        if event.kind is EventKind.FAILURE_DETECTED and failed_at is None:
            failed_at = min(event.time, float(event.data.get("failed_at") or event.time))
        elif event.kind is EventKind.RESUME_REQUESTED:
            failed_at = None
        elif event.kind is EventKind.TRAINING_STARTED and failed_at is not None:
            found.append(max(0.0, event.began - failed_at))
            failed_at = None
    return found


def plan_line(request: LaunchRequest, run: Run | None = None) -> str:
    """The plan in one line; of a script it says only how many ranks there are.

    Args:
        request: The plan that is asked for.
        run: Its newest attempt may have a smaller one.
    """
    plan = request.job.plan
    if run is not None and run.attempt is not None and run.attempt.wanted is not None:
        smaller = plan_of(run.attempt)
        return f"{smaller.describe() if smaller else 'a smaller plan'} (nodes are missing)"
    return f"script on {plan.world_size} ranks" if request.job.kind == "script" else plan.describe()


def _step(run: Run, last: Mapping[str, Any]) -> int:
    """The last step that is done: of an ended run as recorded, of a live one as measured."""
    if run.state is RunState.SUCCEEDED:
        return run.step
    return int(last.get("step", run.step))


def _plan(request: LaunchRequest, run: Run) -> ParallelPlan:
    """The plan that the newest attempt runs."""
    return (plan_of(run.attempt) if run.attempt else None) or request.job.plan


def _losses(store: RunStore, last: Mapping[str, Any]) -> dict[str, Any] | None:
    first = next(store.metrics(), None)
    return {"first": first["loss"], "last": last["loss"]} if first and last else None


def _incident(one: Incident) -> dict[str, Any]:
    """Seconds by class as ``detect_s`` to ``wait_s``, and ``total_s``; their parts as ``teardown_s`` to ``state_s``."""
    plain = {name: getattr(one, name) for name in _INCIDENT_FIELDS}
    classes = {f"{name}_s": one.seconds[name] for name in INCIDENT_CLASSES}
    return {**plain, **classes, "total_s": one.total_s, **{f"{part}_s": one.parts.get(part) for part in PARTS}}


def _attempt(attempt: Attempt, paths: RunPaths) -> dict[str, Any]:
    return {
        "number": attempt.number,
        "plan": to_json(attempt.plan),
        "nodes": list(attempt.nodes),
        "started": attempt.started,
        "ended": attempt.ended,
        "cause": attempt.cause,
        "first_step": attempt.first_step,
        "last_step": attempt.last_step,
        "reason": attempt.reason,
        "wanted": to_json(attempt.wanted),
        "resume_from": attempt.resume_from,
        "restored_s": attempt.restored_s,
        "errors": rank_errors.read(paths, attempt.number),
    }


def _ranks(paths: RunPaths, run: Run) -> list[dict[str, Any]]:
    """Ranks of the live attempt; none when nothing runs."""
    attempt = run.attempt
    if attempt is None or attempt.ended is not None or run.state.terminal:
        return []
    try:
        rows = json.loads(paths.ranks(attempt.number).read_text())
    except (OSError, ValueError):
        return []
    return rows if isinstance(rows, list) else []


def _checkpoint(paths: RunPaths, events: Sequence[RunEvent], *, script: bool) -> dict[str, Any] | None:
    if script:
        point = progress.resume_point(paths, script=True)
        return {"step": point.step, "path": point.path} if point.path else None
    try:
        found = list_checkpoints(paths.checkpoints)
    except StorageError:  # a store that does not answer: what the log knows
        commits = [event.data for event in events if event.kind is EventKind.CHECKPOINT_COMMITTED]
        return {"step": commits[-1]["step"], "path": commits[-1]["path"]} if commits else None
    return {"step": found[0].step, "path": str(found[0].path)} if found else None


def _unsaved(events: Sequence[RunEvent]) -> dict[str, Any] | None:
    """Checkpoints that could not be written since the newest that was; None where the newest was."""
    failed: list[RunEvent] = []
    for event in events:
        if event.kind is EventKind.CHECKPOINT_FAILED:
            failed.append(event)
        elif event.kind is EventKind.CHECKPOINT_COMMITTED:
            failed = []
    if not failed:
        return None
    last = failed[-1].data
    return {"since": failed[0].time, "times": len(failed), "step": last["step"], "reason": last["reason"]}


def _controller_alive(paths: RunPaths, watch_s: float) -> bool | None:
    """Whether a controller lives; None when that cannot be known without watching."""
    epoch = newest_epoch(paths)
    if not epoch:
        return False
    if holder_alive(paths, epoch, silence_s=watch_s):
        return True
    return False if watch_s or (paths.controllers / f"{epoch}.released").exists() else _local_verdict(paths, epoch)


def _local_verdict(paths: RunPaths, epoch: int) -> bool | None:
    from launcher.lock import machine

    try:
        holder = json.loads((paths.controllers / f"{epoch}.json").read_text())
    except (OSError, ValueError):
        return None
    return False if holder.get("machine") == machine() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None

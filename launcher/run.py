"""What a run is: a fold over its events. Pure; the log on disk is :mod:`launcher.store`.

::

    queued -> starting -> running -> succeeded
                 ^  |        |
                 |  v        v
               recovering <--+        any live state -> failed | cancelled
    failed, cancelled -> queued   (only by a person's resume)
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.checkpoint.memory import generation_of
from launcher import roster
from launcher.attempts import Attempt, Fall, Ruling
from launcher.headway import Headway
from launcher.rollback import Rollback
from strategies.codec import from_json
from strategies.schedule import Skip

LATE_S = 1.0
"""Clocks of two machines that agree may differ by as much: what was so a moment before was so when it was recorded."""


class RunState(enum.Enum):
    """State of a run; :attr:`terminal` says whether it ends by itself."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    RECOVERING = "recovering"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether nothing happens any more unless a person resumes the run."""
        return self in (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED)


class EventKind(enum.StrEnum):
    """Every kind of event, with the fields of its ``data``."""

    RUN_SUBMITTED = "run_submitted"  # request: digest
    CONTROLLER_STARTED = "controller_started"  # host, pid, adopted
    # plan, wanted (if not the plan), nodes or moved (launcher.roster), resume_from, unfenced (why, if so), first_step,
    # reason: start | restart | resume | grow | move (a node was taken away with notice, or swapped: no failure),
    # waited_s (for nodes, up to now; not at the start), skip (after a rollback)
    ATTEMPT_PLANNED = "attempt_planned"
    FENCE_LAID = "fence_laid"  # reason: the attempt was planned unfenced
    # began (UTC seconds): this and the next may be recorded long after they were so, by a controller that came later
    RANKS_SPAWNED = "ranks_spawned"  # ranks: how many, resume_from, began
    # as reported: step, restored_bytes; of the slowest rank device_s, engine_s, restored_s, of the last communicators_s
    # and began
    TRAINING_STARTED = "training_started"
    CHECKPOINT_COMMITTED = "checkpoint_committed"  # step, path, bytes, written_bytes, stall_s
    CHECKPOINT_FAILED = "checkpoint_failed"  # step, reason, stall_s, told (UTC seconds, its node's): training goes on
    CHECKPOINT_REJECTED = "checkpoint_rejected"  # path, reason, absent: it was looked at, not read
    FAULT_FIRED = "fault_fired"  # fault, and the record that the injector left
    FAILURE_DETECTED = "failure_detected"  # failure, last_step, failed_at
    # cause, failure, node, rank, step, samples, signature (after all evidence is in: all that the decision needs;
    # failure is "" if it left on purpose), last_step
    GANG_STOPPED = "gang_stopped"
    RANKS_DYING = "ranks_dying"  # node, left: rows of rank, pid, state, that SIGKILL has not ended yet; waited_s
    # action, reason, delay_s, skip (samples to leave out from now on, or null), rollback, waited_s (for nodes)
    DECISION = "decision"
    WAITING_FOR_NODES = "waiting_for_nodes"  # have, need, why
    NODE_EXCLUDED = "node_excluded"  # node, until (UTC seconds), reason
    NODE_READMITTED = "node_readmitted"  # nodes, reason
    STRAGGLER_FOUND = "straggler_found"  # failure, ratio: own time of a step over that of its peers
    CLOCK_SKEWED = "clock_skewed"  # node, ahead_s: of the controller's clock (about 0: it agrees again), within_s
    CUT_OFF = "cut_off"  # patience_s: nothing is heard of any node, all are waited for
    POOL_UNSAFE = "pool_unsafe"  # node, reason: ranks there start as fresh processes
    RESUME_REQUESTED = "resume_requested"  # overrides, changes, request: digest; last_step if its end is not recorded
    CANCEL_REQUESTED = "cancel_requested"  # by
    RUN_SUCCEEDED = "run_succeeded"  # step, weights_digest
    RUN_FAILED = "run_failed"  # reason
    RUN_CANCELLED = "run_cancelled"  # reason


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEvent:
    """One line of the event log.

    Attributes:
        seq: Number of the line, from 1.
        time: UTC seconds.
        epoch: Incarnation of the controller that wrote it; 0 for the client.
        attempt: Attempt it is about; 0 for none.
        kind: What happened.
        data: Fields of this kind.
    """

    seq: int
    time: float
    epoch: int
    attempt: int
    kind: EventKind
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def began(self) -> float:
        """When it was so (UTC seconds): when it was recorded, unless a node says that it was long before."""
        began = float(self.data.get("began") or self.time)
        return began if self.time - began > LATE_S else self.time


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """All that the event log says of a run."""

    state: RunState = RunState.QUEUED
    epoch: int = 0
    submitted: float = 0.0
    ended: float | None = None
    reason: str = ""
    attempts: tuple[Attempt, ...] = ()
    headway: Headway = field(default_factory=Headway)
    step: int = 0
    steps_lost: int = 0
    restarts: int = 0  # since the last person's submit or resume
    failures: tuple[Fall, ...] = ()  # since the last person's submit or resume
    ruling: Ruling | None = None  # the newest since the newest attempt has ended; None while there is none
    excluded: Mapping[str, float] = field(default_factory=dict)  # node -> until when (UTC seconds)
    rejected: frozenset[str] = frozenset()  # checkpoints that are not used any more
    absent: frozenset[str] = frozenset()  # those of them whose files were not there: a person's resume looks again
    faults: tuple[str, ...] = ()
    skips: tuple[Skip, ...] = ()  # decided after blow-ups; for ever, whoever resumes the run
    rollback: Rollback = field(default_factory=Rollback)  # since the last person's submit or resume
    request: str = ""
    weights_digest: str | None = None

    @property
    def attempt(self) -> Attempt | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def undecided(self) -> Fall | None:
        """What has ended the newest attempt, while nothing was decided about it: a controller fell between the two."""
        attempt = self.attempt
        return self.failures[-1] if self.failures and attempt and attempt.failure and not self.ruling else None

    @property
    def committed_step(self) -> int:
        """See :class:`launcher.headway.Headway`."""
        return self.headway.committed_step

    @property
    def found_damaged(self) -> frozenset[str]:
        """Checkpoints that a person's resume does not use either."""
        return self.rejected - self.absent


class IllegalEvent(RuntimeError):
    """An event that cannot follow from the state: our own bug, or a log edited by hand."""


_TO: dict[EventKind, RunState] = {
    EventKind.RUN_SUBMITTED: RunState.QUEUED,
    EventKind.RESUME_REQUESTED: RunState.QUEUED,
    EventKind.ATTEMPT_PLANNED: RunState.STARTING,
    EventKind.TRAINING_STARTED: RunState.RUNNING,
    EventKind.FAILURE_DETECTED: RunState.RECOVERING,
    EventKind.GANG_STOPPED: RunState.RECOVERING,
    EventKind.RUN_SUCCEEDED: RunState.SUCCEEDED,
    EventKind.RUN_FAILED: RunState.FAILED,
    EventKind.RUN_CANCELLED: RunState.CANCELLED,
}

_LIVE = frozenset({RunState.QUEUED, RunState.STARTING, RunState.RUNNING, RunState.RECOVERING})

ALLOWED: dict[RunState, frozenset[RunState]] = {
    RunState.QUEUED: _LIVE - {RunState.RUNNING} | {RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED},
    RunState.STARTING: _LIVE | {RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED},
    RunState.RUNNING: _LIVE - {RunState.STARTING} | {RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED},
    RunState.RECOVERING: _LIVE - {RunState.RUNNING} | {RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED},
    RunState.SUCCEEDED: frozenset(),
    RunState.FAILED: frozenset({RunState.QUEUED}),
    RunState.CANCELLED: frozenset({RunState.QUEUED}),
}


def apply(run: Run, event: RunEvent) -> Run:
    """One step of the fold.

    Raises:
        IllegalEvent: The event's state change is not in :data:`ALLOWED`, or the run is submitted a second time.
    """
    target = _TO.get(event.kind)
    if target is not None:
        again = event.kind is EventKind.RUN_SUBMITTED and run.submitted
        if again or target not in ALLOWED[run.state]:
            raise IllegalEvent(f"event {event.seq} '{event.kind}' is not allowed in state '{run.state.value}'")
        run = run if target is run.state else replace(run, state=target)
    run = run if event.epoch <= run.epoch else replace(run, epoch=event.epoch)
    handler = _HANDLERS.get(event.kind)
    return handler(run, event) if handler else run


def fold(events: Iterable[RunEvent]) -> Run:
    """The run that these events, in order, describe.

    What a controller wrote after a later one had taken over does not count, nor does an event that its state forbids:
    a log must stay readable whatever happened to those who wrote it.
    """
    run = Run()
    newest: RunEvent | None = None  # of commits in a row, which say no more than it does: most of a long log are such
    for event in events:
        if event.kind is EventKind.CHECKPOINT_COMMITTED and event.epoch == run.epoch:
            newest = event if newest is None else max(newest, event, key=lambda one: int(one.data["step"]))
        else:
            run, newest = advance(advance(run, newest) if newest else run, event), None
    return advance(run, newest) if newest else run


def advance(run: Run, event: RunEvent) -> Run:
    """One step of :func:`fold`."""
    if 0 < event.epoch < run.epoch:
        return run
    with contextlib.suppress(IllegalEvent):
        return apply(run, event)
    return run


def _resume_requested(run: Run, event: RunEvent) -> Run:
    if run.attempt is not None and run.attempt.ended is None:
        run = _with_attempt(run, last_step=_last_step(run, event))
    closed = _close_attempt(run, event, "orphaned: its controller was gone and a person resumed the run")
    return replace(
        closed,
        ended=None,
        reason="",
        restarts=0,
        headway=closed.headway.renewed(),
        failures=(),
        ruling=None,
        excluded={},
        rejected=run.found_damaged,
        absent=frozenset(),
        rollback=Rollback(),
        request=str(event.data.get("request", run.request)),
    )


def _planned(run: Run, event: RunEvent) -> Run:
    data = event.data
    run = _close_attempt(run, event, "replaced")
    run = _idle(run, event) if data.get("waited_s") else run
    attempt = Attempt(
        number=event.attempt,
        epoch=event.epoch,
        plan=data["plan"],
        nodes=roster.read(run.attempts[-1].nodes if run.attempts else (), data),
        started=event.time,
        first_step=data["first_step"],
        last_step=data["first_step"] - 1,
        resume_from=data["resume_from"],
        reason=data["reason"],
        wanted=data.get("wanted"),
    )
    lost = max(0, run.attempts[-1].last_step - attempt.last_step) if run.attempts else 0
    on_disk = generation_of(attempt.resume_from) is None
    return replace(
        run,
        attempts=(*run.attempts, attempt),
        ruling=None,
        steps_lost=run.steps_lost + lost,
        restarts=run.restarts + (attempt.reason == "restart"),
        headway=run.headway.planned(attempt.last_step, on_disk=on_disk, reason=attempt.reason),
        skips=run.rollback.skips(run.skips, from_json(Skip, data["skip"]) if data.get("skip") else None),
        rollback=replace(run.rollback, before=0),
    )


def _training(run: Run, event: RunEvent) -> Run:
    started = run.attempt.started if run.attempt is not None else event.time
    return _with_attempt(run, trained=max(started, event.began), restored_s=event.data.get("restored_s"))


def _committed(run: Run, event: RunEvent) -> Run:
    step = int(event.data["step"])
    return replace(run, headway=run.headway.committed(step), step=max(step, run.step))


def _stopped(run: Run, event: RunEvent) -> Run:
    data = event.data
    kind, run = str(data.get("failure", "")), replace(run, ruling=None)
    if kind:
        fall = Fall(
            kind=kind,
            time=event.time,
            node=str(data.get("node", "")),
            signature=str(data.get("signature", "")),
            step=int(data.get("step", 0)),
            samples=int(data.get("samples", 0)),
        )
        run = replace(run, failures=(*run.failures, fall))
    ended = {"ended": event.time, "cause": data.get("cause"), "failure": kind, "last_step": _last_step(run, event)}
    return _progressed(_with_attempt(run, **ended))


def _progressed(run: Run) -> Run:
    return replace(run, headway=run.headway.reached(run.attempts[-1].last_step if run.attempts else 0))


def _readmitted(run: Run, event: RunEvent) -> Run:
    back = set(event.data["nodes"])
    return replace(run, excluded={node: until for node, until in run.excluded.items() if node not in back})


def _last_step(run: Run, event: RunEvent) -> int:
    return max(int(event.data.get("last_step", 0)), run.attempts[-1].last_step if run.attempts else 0)


def _decided(run: Run, event: RunEvent) -> Run:
    data, skip = event.data, event.data.get("skip")
    run = _idle(run, event) if data.get("action") == "wait" or data.get("delay_s") else run
    if run.attempt is None or run.attempt.ended is not None:
        action, reason = str(data.get("action", "")), str(data.get("reason", ""))
        delay_s = float(data.get("delay_s") or 0.0)
        run = replace(run, ruling=Ruling(action=action, reason=reason, time=event.time, delay_s=delay_s))
    run = replace(run, rollback=from_json(Rollback, data["rollback"])) if data.get("rollback") else run
    return replace(run, skips=(*run.skips, from_json(Skip, skip))) if skip else run


def _idle(run: Run, event: RunEvent) -> Run:
    if run.attempt is None or run.attempt.ended is None or run.attempt.idle_from is not None:
        return run
    return _with_attempt(run, idle_from=event.time - float(event.data.get("waited_s") or 0.0))


def _rejected(run: Run, event: RunEvent) -> Run:
    path = {str(event.data["path"])}
    return replace(run, rejected=run.rejected | path, absent=run.absent | (path if event.data.get("absent") else set()))


def _ended(run: Run, event: RunEvent) -> Run:
    reason = str(event.data.get("reason", ""))
    run = _close_attempt(run, event, reason or event.kind.removeprefix("run_"))
    return replace(
        run,
        ended=event.time,
        reason=reason,
        step=max(run.step, int(event.data.get("step", 0))),
        weights_digest=event.data.get("weights_digest", run.weights_digest),
    )


def _close_attempt(run: Run, event: RunEvent, cause: str) -> Run:
    lives = run.attempt is not None and run.attempt.ended is None
    return _with_attempt(run, ended=event.time, cause=cause) if lives else run


def _with_attempt(run: Run, **changes: Any) -> Run:
    return replace(run, attempts=(*run.attempts[:-1], replace(run.attempts[-1], **changes))) if run.attempts else run


_HANDLERS = {
    EventKind.RUN_SUBMITTED: lambda run, e: replace(run, submitted=e.time, request=str(e.data.get("request", ""))),
    EventKind.RESUME_REQUESTED: _resume_requested,
    EventKind.ATTEMPT_PLANNED: _planned,
    EventKind.CHECKPOINT_COMMITTED: _committed,
    EventKind.CHECKPOINT_REJECTED: _rejected,
    EventKind.TRAINING_STARTED: _training,
    EventKind.FAILURE_DETECTED: lambda run, e: _progressed(_with_attempt(run, last_step=_last_step(run, e))),
    EventKind.GANG_STOPPED: _stopped,
    EventKind.NODE_EXCLUDED: lambda run, e: replace(run, excluded={**run.excluded, e.data["node"]: e.data["until"]}),
    EventKind.NODE_READMITTED: _readmitted,
    EventKind.DECISION: _decided,
    EventKind.FAULT_FIRED: lambda run, e: replace(run, faults=(*run.faults, str(e.data["fault"]))),
    EventKind.RUN_SUCCEEDED: _ended,
    EventKind.RUN_FAILED: _ended,
    EventKind.RUN_CANCELLED: _ended,
}

"""Every second of a run in one class, and of a failure in one incident. Pure: events and metrics in, seconds out.

=================  ====================================================================================
start              from submit (or a person's resume) until ranks exist and have started, without restore
productive         optimizer steps that count
checkpoint_stall   steps waiting for a checkpoint to be copied and written
detect             from the failure (or the last sign of life) until the controller knew
decide             from knowing until every old rank is gone and the decision is recorded; and, when ranks leave on
                   purpose at a checkpoint, until they are gone
place              from the decision until the new ranks exist
restore            from the new ranks' existence until their first step begins
replay             work that was lost and done again
wait               backing off, waiting for nodes, or down until a person resumed
finish             from the last step to the recorded end: last digest, tear-down
=================  ====================================================================================

The classes sum to the wall time, whatever the clocks do: time never goes back here. Detect to wait are also kept for
each incident; what belongs to none (growing back, a person's resume) is the rest. A failure during a recovery is an
incident of its own, and work that is done again belongs to the incident that lost it last.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.run import EventKind, RunEvent

CLASSES = (
    "start",
    "productive",
    "checkpoint_stall",
    "detect",
    "decide",
    "place",
    "restore",
    "replay",
    "wait",
    "finish",
)

INCIDENT_CLASSES = ("detect", "decide", "place", "restore", "replay", "wait")
"""Classes that a failure costs."""

ORPHANED = "orphaned"
"""Kind of an incident that nobody detected: controller and ranks were gone until a person resumed the run."""

_ENDS = (EventKind.RUN_SUCCEEDED, EventKind.RUN_FAILED, EventKind.RUN_CANCELLED)
_WHILE_TRAINING = (EventKind.CHECKPOINT_COMMITTED, EventKind.DECISION)  # to grow: the ranks go on until they may leave


@dataclass(kw_only=True, slots=True)
class Incident:
    """One failure and what it cost.

    Attributes:
        number: From 1.
        attempt: The attempt that it ended.
        kind: A :class:`launcher.recovery.FailureKind` (after all evidence), or :data:`ORPHANED`.
        cause: One sentence for people.
        node: Node that it happened on, or "".
        rank: Rank that it happened to, or -1.
        at: When it happened (UTC seconds).
        step: Last step that was complete.
        steps_lost: Complete steps that had to be done again.
        action: What was decided: ``restart``, ``shrink``, ``give_up``, ``resume`` (by a person), or "" so far.
        recovered: The ranks trained again; False while they do not yet, or if they never did before the next failure.
        seconds: Per class of :data:`INCIDENT_CLASSES`.
    """

    number: int
    attempt: int
    kind: str
    cause: str
    node: str = ""
    rank: int = -1
    at: float
    step: int
    steps_lost: int = 0
    action: str = ""
    recovered: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(INCIDENT_CLASSES, 0.0))

    @property
    def total_s(self) -> float:
        """All that it cost."""
        return sum(self.seconds.values())

    @property
    def restart_s(self) -> float:
        """From its detection until the ranks trained again (or the next failure came)."""
        return sum(self.seconds[name] for name in ("decide", "place", "restore", "wait"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """A run's time.

    Attributes:
        seconds: Per class of :data:`CLASSES`, and ``wall``, their sum.
        incidents: Failures, oldest first.
        steps: Optimizer steps that count.
        saves: Checkpoints committed.
    """

    seconds: Mapping[str, float]
    incidents: Sequence[Incident]
    steps: int
    saves: int

    @property
    def goodput(self) -> float:
        """Share of the wall time that was productive."""
        return self.seconds["productive"] / self.seconds["wall"] if self.seconds["wall"] else 0.0

    @property
    def rest(self) -> dict[str, float]:
        """Seconds per class that belong to no incident; with the incidents they sum to ``seconds``."""
        inside = {name: sum(one.seconds[name] for one in self.incidents) for name in INCIDENT_CLASSES}
        return {name: self.seconds[name] - inside.get(name, 0.0) for name in CLASSES}


def account(
    events: Iterable[RunEvent], metrics: Iterable[Mapping[str, Any]], now: float, *, script: bool = False
) -> Account:
    """Account for the wall time of a run.

    Args:
        events: All events, in order.
        metrics: Lines of metrics.jsonl; read once, and not kept.
        now: End of the accounting for a run that has not ended (UTC seconds).
        script: The ranks are a user's script, which reports no steps.
    """
    book = Book(script=script)
    lines, held = iter(metrics), list[Mapping[str, Any]]()

    def feed(until: float, *, all_of_it: bool) -> None:
        while book.training and (line := held.pop() if held else next(lines, None)) is not None:
            later = int(line["attempt"]) > book.training or (not all_of_it and float(line["time"]) > until)
            if later:
                held.append(line)
                return
            book.add(line, until)

    for event in events:
        if not book.is_stale(event):
            feed(event.time, all_of_it=book.ends_training(event))
            book.enter(event)
    feed(now, all_of_it=True)
    return book.account(now)


def ledger(
    events: Iterable[RunEvent], metrics: Iterable[Mapping[str, Any]], now: float, *, script: bool = False
) -> dict[str, float]:
    """The seconds of :func:`account` alone."""
    return dict(account(events, metrics, now, script=script).seconds)


class Book:
    """The account of a run, kept as its events and steps become known. Its size grows with failures only.

    Args:
        script: The ranks are a user's script, which reports no steps.
    """

    def __init__(self, *, script: bool = False) -> None:
        self._script = script
        self._seconds = dict.fromkeys(CLASSES, 0.0)
        self._incidents: list[Incident] = []
        self._open: Incident | None = None  # its recovery goes on
        self._loser: Incident | None = None  # ended the newest attempt; what it lost is known at the next one
        self._owner: dict[int, Incident] = {}  # a step that is to be done again -> who lost it
        self._class = "start"
        self._since: float | None = None
        self._epoch = 0
        self._restart = False
        self.training = 0
        """Attempt whose steps are being made, 0 for none."""
        self._attempt = 0  # the newest
        self._unfinished = False  # it has no recorded end
        self._last_step = 0  # of the newest attempt, as events tell
        self._computed = 0  # the same, as metrics tell
        self._done = 0  # highest step that any attempt has completed
        self._owed = 0.0  # stall of committed checkpoints that no step has paid for yet
        self._steps = self._saves = 0
        self._ended = False

    def add(self, line: Mapping[str, Any], now: float) -> None:
        """A step is complete.

        Args:
            line: Of metrics.jsonl; one of an attempt that is over is only noted as done.
            now: No step can have ended later, whatever the clock of its rank says (UTC seconds).
        """
        step, attempt = int(line["step"]), int(line["attempt"])
        if attempt == self.training and self._since is not None:
            until = max(self._since, min(float(line["time"]), now))
            self._pay_stall(until)
            again = step <= self._done
            self._put("replay" if again else "productive", until - self._since, self._owner.pop(step, None))
            self._since = until
            self._steps += not again
            self._computed = max(self._computed, step)
        self._done = max(self._done, step)

    @staticmethod
    def ends_training(event: RunEvent) -> bool:
        """Whether no step of the present attempt counts after an event."""
        return event.kind in _HANDLERS and event.kind not in _WHILE_TRAINING

    def is_stale(self, event: RunEvent) -> bool:
        """It was written by a controller that had been replaced."""
        return 0 < event.epoch < self._epoch

    def enter(self, event: RunEvent) -> None:
        """Something has happened."""
        if self.is_stale(event):
            return
        self._epoch = max(self._epoch, event.epoch)
        if self._since is None:
            self._since = event.time
        handler = _HANDLERS.get(event.kind)
        if handler is not None:
            handler(self, event)

    def account(self, now: float) -> Account:
        """All of it as of now; the book can be kept on."""
        book = copy.deepcopy(self)
        if not book._ended:
            book._charge(now, tail="productive")  # a step in progress is work, not the end
        seconds = {**book._seconds, "wall": sum(book._seconds.values())}
        return Account(seconds=seconds, incidents=tuple(book._incidents), steps=book._steps, saves=book._saves)

    # --- charging -------------------------------------------------------------------------------------------------

    def _put(self, name: str, seconds: float, incident: Incident | None) -> None:
        self._seconds[name] += seconds
        if incident is not None and name in INCIDENT_CLASSES:
            incident.seconds[name] += seconds

    def _pay_stall(self, until: float) -> None:
        assert self._since is not None
        stall = min(self._owed, until - self._since)
        self._put("checkpoint_stall", stall, None)
        self._owed -= stall
        self._since += stall

    def _charge(self, until: float, *, tail: str = "finish") -> None:
        """What has passed goes to the present class; while steps are made, what follows the last one to ``tail``."""
        if self._since is None:
            return
        until = max(until, self._since)  # a clock that was set back must not make negative seconds
        if self.training:
            self._pay_stall(until)
        self._put(tail if self.training else self._class, until - self._since, self._open)
        self._since = until

    def _turn(self, name: str) -> None:
        """The class of what follows."""
        self._class, self.training, self._owed = name, 0, 0.0

    # --- events ---------------------------------------------------------------------------------------------------

    def _on_committed(self, event: RunEvent) -> None:
        self._saves += 1
        if event.attempt == self.training:
            self._owed += max(0.0, float(event.data.get("stall_s", 0.0)))

    def _on_planned(self, event: RunEvent) -> None:
        self._charge(event.time)
        reason, first = event.data.get("reason"), int(event.data.get("first_step", 1))
        self._restart = reason in ("restart", "grow")
        self._turn("place" if self._restart else "start")
        if self._loser is not None:
            self._loser.steps_lost += max(0, self._last_step - first + 1)
            self._owner.update(dict.fromkeys(range(first, self._computed + 1), self._loser))
        if reason != "restart":
            self._open = None
        self._loser, self._attempt, self._unfinished = None, event.attempt, True
        self._last_step = self._computed = first - 1

    def _on_spawned(self, event: RunEvent) -> None:
        self._charge(event.time)
        self._turn("restore" if self._restart or event.data.get("resume_from") else "start")

    def _on_training(self, event: RunEvent) -> None:
        self._charge(event.time)
        self._turn("productive")
        self.training = event.attempt
        if self._open is not None:
            self._open.recovered, self._open = True, None

    def _on_failure(self, event: RunEvent) -> None:
        self._note_last_step(event)
        if self._loser is not None:  # more of what is known already: a new controller found the recovery half done
            self._charge(event.time)
            self._turn("decide")
            return
        failed_at = float(event.data.get("failed_at") or event.time)
        failure = event.data.get("failure")
        known = failure if isinstance(failure, Mapping) else {}
        before = self._open
        incident = self._begin(str(known.get("kind", "unknown")), str(known.get("detail", "")), failed_at)
        incident.node, incident.rank = str(known.get("node", "")), int(known.get("rank", -1))
        # While steps are made, work is lost by this failure; while recovering, time is spent on the one before.
        self._open = incident if self.training else before
        self._charge(min(failed_at, event.time), tail="productive" if self._script else "replay")
        self._open = incident
        self._charge(event.time, tail="detect") if self.training else self._detect(event.time)
        self._turn("decide")

    def _detect(self, until: float) -> None:
        self._class = "detect"
        self._charge(until)

    def _begin(self, kind: str, cause: str, at: float) -> Incident:
        incident = Incident(
            number=len(self._incidents) + 1,
            attempt=self._attempt,
            kind=kind,
            cause=cause,
            at=at,
            step=self._last_step,
        )
        self._incidents.append(incident)
        self._loser = incident
        return incident

    def _on_stopped(self, event: RunEvent) -> None:
        data = event.data
        self._note_last_step(event)
        self._unfinished = False
        if data.get("failure", "?"):
            self._charge(event.time)
            self._turn("decide")
            if self._loser is not None:
                self._judge(self._loser, data)
        else:  # with no failure there is nothing to decide: the ranks have left as they were asked to
            self._charge(event.time, tail="decide")
            self._turn("place")

    def _judge(self, incident: Incident, data: Mapping[str, Any]) -> None:
        """All evidence is in."""
        incident.kind, incident.cause = str(data.get("failure", incident.kind)), str(data.get("cause", incident.cause))
        incident.node, incident.rank = str(data.get("node", incident.node)), int(data.get("rank", incident.rank))

    def _on_decision(self, event: RunEvent) -> None:
        action = str(event.data.get("action", ""))
        if action == "grow":
            return  # the ranks go on until their next checkpoint
        self._charge(event.time)
        if self._open is not None:
            self._open.action = action
        self._turn("wait" if float(event.data.get("delay_s") or 0.0) > 0 else "place")

    def _on_waiting(self, event: RunEvent) -> None:
        self._charge(event.time)
        self._turn("wait")

    def _on_resume(self, event: RunEvent) -> None:
        """A person continues: the run was down since its recorded end, or since the last that is known of it."""
        self._note_last_step(event)
        if self._unfinished and self._loser is None and not self._ended:
            self._open = self._begin(ORPHANED, "its controller was gone and a person resumed the run", event.time)
            self._open.at = min(event.time, self._since if self._since is not None else event.time)
        if not self.training:
            self._class = "wait"
        self._charge(event.time, tail="wait")
        if self._open is not None:
            self._open.action = "resume"
        self._open, self._ended, self._unfinished = None, False, False
        self._turn("start")

    def _on_end(self, event: RunEvent) -> None:
        self._charge(event.time)
        self._turn("wait")
        self._open, self._ended, self._unfinished = None, True, False

    def _note_last_step(self, event: RunEvent) -> None:
        self._last_step = max(self._last_step, int(event.data.get("last_step") or 0))


_HANDLERS = {
    EventKind.ATTEMPT_PLANNED: Book._on_planned,
    EventKind.RANKS_SPAWNED: Book._on_spawned,
    EventKind.TRAINING_STARTED: Book._on_training,
    EventKind.CHECKPOINT_COMMITTED: Book._on_committed,
    EventKind.FAILURE_DETECTED: Book._on_failure,
    EventKind.GANG_STOPPED: Book._on_stopped,
    EventKind.DECISION: Book._on_decision,
    EventKind.WAITING_FOR_NODES: Book._on_waiting,
    EventKind.RESUME_REQUESTED: Book._on_resume,
    **dict.fromkeys(_ENDS, Book._on_end),
}

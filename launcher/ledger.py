"""Every second of a run in one class, and of a failure in one incident. Pure: events and metrics in, an account out.

The classes sum to the wall time, whatever the clocks do: time never goes back here, and what the log knows of the clock
of rank 0's node is taken off the times of its steps. Ranks that have started and trained while no controller was there
have done so when they say, not when it was recorded.

Detect to wait are also kept for each incident; what belongs to none (growing back, a person's resume) is the rest. A
failure during a recovery is an incident of its own, and work that is done again belongs to the incident that lost it
last. The parts of an incident are named when what they are of is over: the end of the old ranks at its event, and what
ranks have told of their start when they train.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from launcher.account import CLASSES, INCIDENT_CLASSES, ORPHANED, Account, Incident
from launcher.clocks import Offset
from launcher.run import EventKind, RunEvent

_ENDS = (EventKind.RUN_SUCCEEDED, EventKind.RUN_FAILED, EventKind.RUN_CANCELLED)
_TOLD = {"device": "device_s", "communicators": "communicators_s", "engine": "engine_s", "state": "restored_s"}
_WHILE_TRAINING = (
    EventKind.CHECKPOINT_COMMITTED,
    EventKind.CHECKPOINT_FAILED,
    EventKind.DECISION,  # to grow: the ranks go on until they may leave
)


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
    book.follow(events, metrics, now)
    return book.account(now)


def ledger(
    events: Iterable[RunEvent], metrics: Iterable[Mapping[str, Any]], now: float, *, script: bool = False
) -> dict[str, float]:
    """The seconds of :func:`account` alone."""
    return dict(account(events, metrics, now, script=script).seconds)


class Book:
    """The account of a run, kept as its events and steps become known.

    Its size grows with failures, and with steps only as long as no event tells that their attempt has begun.

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
        self._latest = float("-inf")  # when something was recorded that had been so for long
        self._epoch = 0
        self._restart = False
        self.training = 0
        """Attempt whose steps are being made, 0 for none."""
        self._attempt = 0  # the newest
        self._unfinished = False  # it has no recorded end
        self._last_step = 0  # of the newest attempt, as events tell
        self._computed = 0  # the same, as metrics tell
        self._done = 0  # highest step that any attempt has completed
        self._owed = 0.0  # stall of checkpoints, written or not, that no step has paid for yet
        self._steps = self._saves = self._failed_saves = 0
        self._data_s = 0.0  # of productive steps
        self._memory_s = 0.0  # of stalls
        self._ended = False
        self._offset = Offset()
        self._early: deque[Mapping[str, Any]] = deque()  # from the first of an attempt that no event tells of yet

    def follow(self, events: Iterable[RunEvent], lines: Iterable[Mapping[str, Any]], now: float) -> None:
        """Take in what is new, each once.

        Args:
            events: New events, in order.
            lines: New lines of metrics.jsonl, in order; read once, and not kept.
            now: The present (UTC seconds).
        """
        source = iter(lines)
        for event in events:
            if not self.is_stale(event):
                self._feed(source, event.time, all_of_it=self.ends_training(event))
                self.enter(event)
        self._feed(source, now, all_of_it=True)
        for line in source:
            if self._early or self._is_early(line):
                self._early.append(line)
            else:
                self.add(line, now)

    def _is_early(self, line: Mapping[str, Any]) -> bool:
        """Its attempt is to come, or it trains already and the event that says so is to come."""
        ahead = int(line["attempt"]) - self._attempt
        return ahead > 0 or (ahead == 0 and self._unfinished and not self.training and self._loser is None)

    def _feed(self, source: Iterator[Mapping[str, Any]], until: float, *, all_of_it: bool) -> None:
        """Steps of the present attempt: all of them, or those that are complete by ``until``."""
        while self.training:
            line = self._early.popleft() if self._early else next(source, None)
            if line is None:
                return
            if int(line["attempt"]) > self.training or (not all_of_it and self._time(line) > until):
                self._early.appendleft(line)
                return
            self.add(line, until)

    def add(self, line: Mapping[str, Any], now: float) -> None:
        """A step is complete.

        Args:
            line: Of metrics.jsonl; one of an attempt that is over is only noted as done.
            now: No step can have ended later, whatever the clock of its rank says (UTC seconds).
        """
        step, attempt = int(line["step"]), int(line["attempt"])
        if attempt == self.training and self._since is not None:
            until = max(self._since, min(self._time(line), now))
            self._stall_for_memory(until, float(line.get("stall_s", 0.0)))
            self._pay_stall(until)
            again = step <= self._done
            self._put("replay" if again else "productive", until - self._since, self._owner.pop(step, None))
            self._since = until
            self._steps += not again
            self._data_s += 0.0 if again else float(line.get("data_s", 0.0))
            self._computed = max(self._computed, step)
        self._done = max(self._done, step)

    def _time(self, line: Mapping[str, Any]) -> float:
        """When a step was complete, by the clock of the log."""
        return float(line["time"]) - self._offset.ahead_s

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
        self._offset.enter(event)
        handler = _HANDLERS.get(event.kind)
        if handler is not None:
            handler(self, event if event.time >= self._latest else replace(event, time=self._latest))

    def account(self, now: float) -> Account:
        """All of it as of now; the book can be kept on."""
        book = copy.deepcopy(self)
        if not book._ended:
            book._charge(max(now, book._latest), tail="productive")  # a step in progress is work, not the end
        seconds = {**book._seconds, "wall": sum(book._seconds.values())}
        incidents = tuple(book._incidents)
        return Account(
            seconds=seconds,
            incidents=incidents,
            steps=book._steps,
            saves=book._saves,
            failed_saves=book._failed_saves,
            data_s=book._data_s,
            memory_s=book._memory_s,
        )

    # --- charging -------------------------------------------------------------------------------------------------

    def _put(self, name: str, seconds: float, incident: Incident | None) -> None:
        self._seconds[name] += seconds
        if incident is not None and name in INCIDENT_CLASSES:
            incident.seconds[name] += seconds

    def _pay_stall(self, until: float) -> None:
        """What a checkpoint on disk has cost is known when it is committed, or fails: steps since then pay for it."""
        self._owed -= self._stall(until, self._owed)

    def _stall_for_memory(self, until: float, seconds: float) -> None:
        """What copies in memory have cost is told with the step that waited for them."""
        self._memory_s += self._stall(until, max(0.0, seconds))

    def _stall(self, until: float, seconds: float) -> float:
        assert self._since is not None
        stall = min(seconds, until - self._since)
        self._put("checkpoint_stall", stall, None)
        self._since += stall
        return stall

    def _charge(self, until: float, *, tail: str = "finish") -> None:
        """What has passed goes to the present class; while steps are made, what follows the last one to ``tail``."""
        if self._since is None:
            return
        until = max(until, self._since)  # a clock that was set back must not make negative seconds
        if self.training:
            self._pay_stall(until)
        self._put(tail if self.training else self._class, until - self._since, self._open)
        self._since = until

    def _charge_until_so(self, event: RunEvent) -> None:
        """What had passed when it was so: between that and its record other things have happened."""
        self._charge(event.began)
        self._latest = event.time

    def _charge_waiting(self, event: RunEvent) -> None:
        """What has passed, of which the end was a wait for nodes: that is known only when some were missing."""
        waited_s = max(0.0, float(event.data.get("waited_s") or 0.0))
        if waited_s and not self.training:
            self._charge(event.time - waited_s)
            self._turn("wait")
        self._charge(event.time)

    def _charge_teardown(self, until: float) -> None:
        """What has passed, in which old ranks were not gone, as far as the attempt has had no recorded end."""
        incident = self._open
        before = incident.seconds["decide"] if incident is not None else 0.0
        self._charge(until)
        if incident is not None and self._unfinished:
            incident.name_parts("decide", {"teardown": incident.seconds["decide"] - before})

    def _turn(self, name: str) -> None:
        """The class of what follows."""
        self._class, self.training, self._owed = name, 0, 0.0

    # --- events ---------------------------------------------------------------------------------------------------

    def _on_committed(self, event: RunEvent) -> None:
        self._saves += 1
        self._owe(event)

    def _on_unsaved(self, event: RunEvent) -> None:
        self._failed_saves += 1
        self._owe(event)

    def _owe(self, event: RunEvent) -> None:
        if event.attempt == self.training:
            self._owed += max(0.0, float(event.data.get("stall_s", 0.0)))

    def _on_planned(self, event: RunEvent) -> None:
        self._charge_waiting(event)
        reason, first = event.data.get("reason"), int(event.data.get("first_step", 1))
        self._restart = reason in ("restart", "grow", "move")
        self._turn("place" if self._restart else "start")
        if self._loser is not None:
            self._loser.steps_lost += max(0, self._last_step - first + 1)
            self._owner.update(dict.fromkeys(range(first, self._computed + 1), self._loser))
        if reason not in ("restart", "move"):
            self._open = None
        self._loser, self._attempt, self._unfinished = None, event.attempt, True
        self._last_step = self._computed = first - 1

    def _on_spawned(self, event: RunEvent) -> None:
        self._charge_until_so(event)
        self._turn("restore" if self._restart or event.data.get("resume_from") else "start")

    def _on_training(self, event: RunEvent) -> None:
        self._charge_until_so(event)
        self._turn("productive")
        self.training = event.attempt
        if self._open is not None:
            data = event.data
            told = {part: float(data[field]) for part, field in _TOLD.items() if data.get(field) is not None}
            self._open.name_parts("restore", told)
            self._open.recovered, self._open = True, None

    def _on_failure(self, event: RunEvent) -> None:
        self._note_last_step(event)
        if self._loser is not None:  # more of what is known already: a new controller found the recovery half done
            self._charge_teardown(event.time)
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
        if data.get("failure", "?"):
            self._charge_teardown(event.time)
            self._turn("decide")
            if self._loser is not None:
                self._judge(self._loser, data)
        else:  # with no failure there is nothing to decide: the ranks have left as they were asked to
            self._charge(event.time, tail="decide")
            self._turn("place")
        self._unfinished = False

    def _judge(self, incident: Incident, data: Mapping[str, Any]) -> None:
        """All evidence is in."""
        incident.kind, incident.cause = str(data.get("failure", incident.kind)), str(data.get("cause", incident.cause))
        incident.node, incident.rank = str(data.get("node", incident.node)), int(data.get("rank", incident.rank))

    def _on_decision(self, event: RunEvent) -> None:
        action = str(event.data.get("action", ""))
        if action in ("grow", "replace", "leave", "adopt"):
            return  # the ranks go on, if only to their next checkpoint
        self._charge_waiting(event)
        if self._open is not None:
            self._open.action = action
        self._turn("wait" if action == "wait" or float(event.data.get("delay_s") or 0.0) > 0 else "place")

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
    EventKind.CHECKPOINT_FAILED: Book._on_unsaved,
    EventKind.FAILURE_DETECTED: Book._on_failure,
    EventKind.GANG_STOPPED: Book._on_stopped,
    EventKind.DECISION: Book._on_decision,
    EventKind.WAITING_FOR_NODES: Book._on_waiting,
    EventKind.RESUME_REQUESTED: Book._on_resume,
    **dict.fromkeys(_ENDS, Book._on_end),
}

"""Every second of a run in one class. Pure: events and metrics in, seconds out; the classes sum to the wall time.

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
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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

_ENDS = (EventKind.RUN_SUCCEEDED, EventKind.RUN_FAILED, EventKind.RUN_CANCELLED)


def ledger(events: Sequence[RunEvent], metrics: Iterable[Mapping[str, Any]], now: float) -> dict[str, float]:
    """Account for the wall time of a run.

    Args:
        events: All events, in order.
        metrics: Lines of metrics.jsonl.
        now: End of the accounting for a run that has not ended (UTC seconds).

    Returns:
        Seconds per class of :data:`CLASSES`, and ``wall``, their sum.
    """
    book = _Book(metrics)
    for event in events:
        book.enter(event)
    return book.close(now)


class _Book:
    def __init__(self, metrics: Iterable[Mapping[str, Any]]) -> None:
        self._seconds = dict.fromkeys(CLASSES, 0.0)
        self._steps: dict[int, list[tuple[float, int]]] = {}
        for line in metrics:
            self._steps.setdefault(int(line["attempt"]), []).append((float(line["time"]), int(line["step"])))
        self._class = "start"
        self._since: float | None = None
        self._first: float | None = None
        self._attempt = 0
        self._restart = False
        self._training = 0  # attempt whose steps are being made, 0 for none
        self._stalls: list[tuple[float, float]] = []
        self._done = 0  # highest step that any attempt has completed
        self._ended = False

    def enter(self, event: RunEvent) -> None:
        if self._first is None:
            self._first = self._since = event.time
        if event.kind is EventKind.CHECKPOINT_COMMITTED:
            self._stalls.append((event.time, float(event.data.get("stall_s", 0.0))))
            return
        target = self._target(event)
        if target is None:
            return
        left = event.kind is EventKind.GANG_STOPPED
        failed_at = float(event.data.get("failed_at") or 0.0) if event.kind is EventKind.FAILURE_DETECTED else 0.0
        self._charge(event.time, failed_at=failed_at, tail="decide" if left else "finish")
        self._class = target
        self._training = event.attempt if target == "productive" else 0
        self._ended = event.kind in _ENDS

    def _target(self, event: RunEvent) -> str | None:
        kind, data = event.kind, event.data
        if kind is EventKind.ATTEMPT_PLANNED:
            self._restart = data.get("reason") in ("restart", "grow", "move")
            return "place" if self._restart else "start"
        if kind is EventKind.RANKS_SPAWNED:
            return "restore" if self._restart or data.get("resume_from") else "start"
        if kind is EventKind.GANG_STOPPED:
            return None if data.get("failure", "?") else "place"  # with no failure there is nothing to decide
        if kind is EventKind.DECISION and data.get("action") in ("grow", "replace", "leave", "adopt"):
            return None  # the ranks go on
        if kind is EventKind.DECISION and data.get("action") == "wait":
            return "wait"
        if kind is EventKind.DECISION:
            return "wait" if float(data.get("delay_s", 0.0)) > 0 else "place"
        return {
            EventKind.TRAINING_STARTED: "productive",
            EventKind.FAILURE_DETECTED: "decide",
            EventKind.WAITING_FOR_NODES: "wait",
            EventKind.RESUME_REQUESTED: "start",
            EventKind.RUN_SUCCEEDED: "wait",
            EventKind.RUN_FAILED: "wait",
            EventKind.RUN_CANCELLED: "wait",
        }.get(kind)

    def _charge(self, until: float, *, failed_at: float = 0.0, tail: str = "finish") -> None:
        since = self._since if self._since is not None else until
        until = max(until, since)  # a clock that was set back must not make negative seconds
        if self._training:
            self._charge_steps(since, until, failed_at, tail)
        else:
            self._seconds[self._class] += until - since
        self._since = until

    def _charge_steps(self, since: float, until: float, failed_at: float, tail: str) -> None:
        at = since
        for time, step in self._steps.get(self._training, ()):
            if not at <= time <= until:
                continue
            stall = min(time - at, self._stall(at, time))
            self._seconds["checkpoint_stall"] += stall
            self._seconds["replay" if step <= self._done else "productive"] += time - at - stall
            self._done = max(self._done, step)
            at = time
        stall = min(until - at, self._stall(at, until))
        self._seconds["checkpoint_stall"] += stall
        at += stall
        if failed_at:
            failed_at = min(max(failed_at, at), until)
            # A script reports no steps, so nobody can tell which part of its time was lost.
            self._seconds["replay" if self._steps else "productive"] += failed_at - at
            self._seconds["detect"] += until - failed_at
        else:
            self._seconds[tail] += until - at

    def _stall(self, start: float, end: float) -> float:
        """Stall seconds of the checkpoints that were committed in this interval."""
        return sum(stall for time, stall in self._stalls if start < time <= end)

    def close(self, now: float) -> dict[str, float]:
        """Charge what is open and return the sums."""
        if self._first is None or self._since is None:
            return {**self._seconds, "wall": 0.0}
        if not self._ended:
            running = self._training
            before = self._seconds["finish"]
            self._charge(max(now, self._since))
            if running:  # a step in progress is work, not the end
                self._seconds["productive"] += self._seconds["finish"] - before
                self._seconds["finish"] = before
        return {**self._seconds, "wall": sum(self._seconds.values())}

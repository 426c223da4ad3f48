"""Histories of runs as their logs tell them, by chance: failures, takeovers, resumes, clocks that are set back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from launcher.account import CLASSES, INCIDENT_CLASSES, PARTS, Account
from launcher.run import EventKind, RunEvent

Line = dict[str, Any]
ENDS = frozenset({EventKind.RUN_SUCCEEDED, EventKind.RUN_FAILED, EventKind.RUN_CANCELLED})


def log(*lines: tuple[float, EventKind, int, dict[str, Any]]) -> list[RunEvent]:
    """Events from (time, kind, attempt, data), all of one controller."""
    return [
        RunEvent(seq=i + 1, time=time, epoch=1, attempt=attempt, kind=kind, data=data)
        for i, (time, kind, attempt, data) in enumerate(lines)
    ]


@dataclass
class Story:
    """A random history that the state machine of a run allows, as controllers of any epoch would write it."""

    seed: int
    honest: bool = False  # clocks agree and never go back
    events: list[RunEvent] = field(default_factory=list)
    metrics: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.now, self.epoch, self.attempt, self.step, self.saved = 1e9, 1, 0, 0, 0
        self.put(EventKind.RUN_SUBMITTED)
        alive = True
        for _ in range(self.dice.randrange(1, 7)):
            alive = self.run_attempt("start" if not self.attempt else "restart")
            over = EventKind.RUN_SUCCEEDED in {event.kind for event in self.events}
            if over or (not alive and self.dice.random() < 0.3):
                return
            if not alive:
                self.resume()

    def put(self, kind: EventKind, **data: Any) -> None:
        """One event; now and then the clock is set back, or a replaced controller writes once more."""
        self.now += self.dice.choice([0.0, 0.01, 0.5, 3.0, 200.0])
        jump = -self.dice.random() * 20 if self.dice.random() < 0.05 and not self.honest else 0.0
        self.write(self.epoch, self.now + jump, kind, data)
        if self.epoch > 1 and self.dice.random() < 0.1 and not self.honest:
            stale = self.dice.choice([EventKind.FAILURE_DETECTED, EventKind.RUN_FAILED, EventKind.TRAINING_STARTED])
            self.write(self.epoch - 1, self.now + 5.0, stale, {"last_step": 10**6, "step": 10**6})

    def write(self, epoch: int, time: float, kind: EventKind, data: dict[str, Any]) -> None:
        seq = len(self.events) + 1
        self.events.append(RunEvent(seq=seq, time=time, epoch=epoch, attempt=self.attempt, kind=kind, data=data))

    def run_attempt(self, reason: str) -> bool:
        """From plan to end; returns whether the run goes on by itself."""
        if self.dice.random() < 0.3:
            self.put(EventKind.WAITING_FOR_NODES, have=1, need=2)
        if self.dice.random() < 0.2:
            self.put(EventKind.DECISION, action="shrink", reason="", delay_s=0.0)
        self.attempt += 1
        self.step = self.saved
        source = "x" if self.saved else ""
        self.put(
            EventKind.ATTEMPT_PLANNED,
            plan={},
            nodes=["a"],
            resume_from=source,
            first_step=self.saved + 1,
            reason=reason,
        )
        if self.dice.random() < 0.2:
            self.unwatched(source)
        elif self.dice.random() < 0.85:
            self.put(EventKind.RANKS_SPAWNED, ranks=1, resume_from=source)
            if self.dice.random() < 0.85:
                self.put(EventKind.TRAINING_STARTED, step=self.saved + 1, **self.told())
                self.train()
        return self.finish()

    def told(self) -> dict[str, float]:
        """What ranks say of how they started: all, some or none of it, and now and then more than has passed."""
        fields = [
            name for name in ("device_s", "communicators_s", "engine_s", "restored_s") if self.dice.random() < 0.7
        ]
        return {name: self.dice.choice([0.0, 0.125, 2.0, 300.0]) for name in fields}

    def unwatched(self, source: str) -> None:
        """The controller falls once it has ordered ranks, or heard of them; they train, and are adopted or lost."""
        heard = self.dice.random() < 0.5
        if heard:
            self.put(EventKind.RANKS_SPAWNED, ranks=1, resume_from=source)
        off = [0.0, 0.0] if self.honest else self.dice.choices([0.0, 4.0, -4.0, -1e6], k=2)
        placed, began = (self.later() + one for one in off)
        first = self.step + 1
        for _ in range(self.dice.randrange(0, 8)):
            self.later()
            self.step += 1
            self.metrics.append({"attempt": self.attempt, "step": self.step, "time": self.now})
            if self.attempt > 1 and self.dice.random() < 0.2:  # a rank that was cut off still writes
                self.metrics.append({"attempt": self.attempt - 1, "step": self.step + 1, "time": self.now})
            self.saved = self.step if self.dice.random() < 0.4 else self.saved
        self.now += self.dice.choice([0.0, 3.0, 3600.0])
        self.epoch += 1
        adopted = self.dice.random() < 0.8
        self.put(EventKind.CONTROLLER_STARTED, adopted=adopted)
        if not adopted:
            return
        self.put(EventKind.DECISION, action="adopt", reason="", delay_s=0.0)
        if not heard:
            self.put(EventKind.RANKS_SPAWNED, ranks=1, resume_from=source, began=placed)
        self.put(EventKind.TRAINING_STARTED, step=first, began=began, **self.told())
        if self.saved >= first:
            self.put(EventKind.CHECKPOINT_COMMITTED, step=self.saved, stall_s=0.3)
        self.train()

    def later(self) -> float:
        """A moment has passed; returns when it is."""
        self.now += self.dice.random()
        return self.now

    def train(self) -> None:
        skew = 0.0 if self.honest else self.dice.choice([0.0, 0.0, 4.0, -4.0])
        for _ in range(self.dice.randrange(0, 8)):
            self.now += self.dice.random()
            self.step += 1
            stall = {"stall_s": self.dice.choice([0.0, 0.1, 50.0])} if self.dice.random() < 0.5 else {}
            self.metrics.append({"attempt": self.attempt, "step": self.step, "time": self.now + skew, **stall})
            if self.attempt > 1 and self.dice.random() < 0.1:  # a rank that was cut off still writes
                self.metrics.append({"attempt": self.attempt - 1, "step": self.step + 1, "time": self.now})
            if self.dice.random() < 0.4:
                self.put(EventKind.CHECKPOINT_COMMITTED, step=self.step, stall_s=self.dice.choice([0.0, 0.3, 50.0]))
                self.saved = self.step
            elif self.dice.random() < 0.2:
                self.put(EventKind.CHECKPOINT_FAILED, step=self.step, stall_s=self.dice.choice([0.0, 0.3, 50.0]))
            if self.dice.random() < 0.1:  # the controller falls, its successor adopts the gang
                self.epoch += 1
                self.put(EventKind.CONTROLLER_STARTED, adopted=True)

    def finish(self) -> bool:
        fate = self.dice.random()
        if fate < 0.1:
            self.saved = self.step  # they leave at a checkpoint
            self.put(EventKind.GANG_STOPPED, failure="", cause="it left", last_step=self.step)
            return self.run_attempt("grow")
        if fate < 0.2:
            self.put(self.dice.choice([EventKind.RUN_SUCCEEDED, EventKind.RUN_CANCELLED]), step=self.step)
            return False
        if fate < 0.3:
            return False  # controller and ranks are gone, and nobody has written so
        self.fail()
        return True

    def fail(self) -> None:
        back = self.dice.choice([0.0, 1.0, 500.0])
        fields = {"failure": {"kind": "node_lost", "rank": 1, "node": "a"}, "last_step": self.step}
        self.put(EventKind.FAILURE_DETECTED, failed_at=self.now - back, **fields)
        if self.dice.random() < 0.2:  # the controller falls in the middle of recovering
            self.epoch += 1
            self.put(EventKind.CONTROLLER_STARTED, adopted=False)
            self.put(EventKind.FAILURE_DETECTED, failed_at=self.now, **fields)
        if self.dice.random() < 0.9:
            self.put(EventKind.GANG_STOPPED, failure="node_lost", cause="node a", signature="")
        self.put(EventKind.DECISION, action="restart", reason="", delay_s=self.dice.choice([0.0, 5.0]))

    def resume(self) -> None:
        self.now += self.dice.choice([1.0, 5 * 86400.0])
        self.epoch += 1
        self.put(EventKind.RESUME_REQUESTED, last_step=self.step)


def check(found: Account, least: float, most: float) -> None:
    """What holds of every account."""
    assert least - 1e-6 <= found.seconds["wall"] <= most + 1e-6
    assert sum(found.seconds[name] for name in CLASSES) == pytest.approx(found.seconds["wall"])
    assert all(value >= -1e-9 for value in found.seconds.values())
    assert 0.0 <= found.memory_s <= found.seconds["checkpoint_stall"] + 1e-6
    assert all(value >= 0 for one in found.incidents for value in one.seconds.values())
    assert all(value >= -1e-6 for value in found.rest.values())
    inside = sum(one.total_s for one in found.incidents)
    assert inside + sum(found.rest.values()) == pytest.approx(found.seconds["wall"], abs=1e-5)
    for one in found.incidents:
        assert all(value >= 0 for value in one.parts.values())
        for name in INCIDENT_CLASSES:
            named = sum(one.parts.get(part, 0.0) for part, inside in PARTS.items() if inside == name)
            assert named <= one.seconds[name] + 1e-9
            assert named + one.unnamed_s(name) == pytest.approx(one.seconds[name])
    for name in INCIDENT_CLASSES:
        assert sum(one.seconds[name] for one in found.incidents) <= found.seconds[name] + 1e-6


TIMELESS = frozenset(
    {EventKind.CONTROLLER_STARTED, EventKind.CHECKPOINT_COMMITTED, EventKind.CHECKPOINT_FAILED},
)


def wall_of(events: Sequence[RunEvent], now: float, *, without: frozenset[EventKind] = frozenset()) -> float:
    """From the first event to the last, or to now if it has not ended; a clock that is set back stands still."""
    newest, latest, ended = 0, events[0].time, False
    for event in events:
        if not 0 < event.epoch < newest:
            newest = max(newest, event.epoch)
            if event.kind not in without:
                latest = max(latest, event.time)
            ended = event.kind in ENDS or (ended and event.kind in TIMELESS)
    return latest - events[0].time if ended else max(latest, now) - events[0].time

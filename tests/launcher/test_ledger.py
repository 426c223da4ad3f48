"""Every second has a name, and the names sum to the wall time."""

from __future__ import annotations

import random
from typing import Any

import pytest

from launcher.ledger import CLASSES, ledger
from launcher.run import EventKind, RunEvent


def log(*lines: tuple[float, EventKind, int, dict[str, Any]]) -> list[RunEvent]:
    return [
        RunEvent(seq=i + 1, time=time, epoch=1, attempt=attempt, kind=kind, data=data)
        for i, (time, kind, attempt, data) in enumerate(lines)
    ]


STORY = log(
    (0.0, EventKind.RUN_SUBMITTED, 0, {}),
    (2.0, EventKind.ATTEMPT_PLANNED, 1, {"reason": "start"}),
    (5.0, EventKind.RANKS_SPAWNED, 1, {"resume_from": ""}),
    (10.0, EventKind.TRAINING_STARTED, 1, {"step": 1}),
    (12.4, EventKind.CHECKPOINT_COMMITTED, 1, {"step": 2, "stall_s": 0.4}),
    (14.0, EventKind.FAILURE_DETECTED, 1, {"failed_at": 13.75}),
    (14.5, EventKind.GANG_STOPPED, 1, {}),
    (14.5, EventKind.DECISION, 1, {"delay_s": 0.0}),
    (15.0, EventKind.ATTEMPT_PLANNED, 2, {"reason": "restart"}),
    (15.25, EventKind.RANKS_SPAWNED, 2, {"resume_from": "x"}),
    (16.25, EventKind.TRAINING_STARTED, 2, {"step": 3}),
    (20.0, EventKind.RUN_SUCCEEDED, 2, {"step": 4}),
)
METRICS = [
    {"attempt": 1, "step": 1, "time": 11.0},
    {"attempt": 1, "step": 2, "time": 12.0},
    {"attempt": 1, "step": 3, "time": 13.4},
    {"attempt": 2, "step": 3, "time": 17.25},
    {"attempt": 2, "step": 4, "time": 18.25},
]


def test_story() -> None:
    seconds = ledger(STORY, METRICS, now=99.0)
    expected = {
        "start": 10.0,
        "productive": 1.0 + 1.0 + 1.0 + 1.0,
        "checkpoint_stall": 0.4,
        "detect": 0.25,
        "decide": 0.5,
        "place": 0.75,
        "restore": 1.0,
        "replay": 0.35 + 1.0,
        "wait": 0.0,
        "finish": 1.75,
        "wall": 20.0,
    }
    assert seconds == pytest.approx(expected)


def test_sums_to_wall_for_every_prefix() -> None:
    generator = random.Random(0)
    for length in range(1, len(STORY) + 1):
        now = STORY[length - 1].time + generator.random()
        ended = STORY[length - 1].kind is EventKind.RUN_SUCCEEDED
        seconds = ledger(STORY[:length], [m for m in METRICS if float(m["time"]) <= now], now=now)
        assert seconds["wall"] == pytest.approx(STORY[length - 1].time if ended else now)
        assert sum(seconds[name] for name in CLASSES) == pytest.approx(seconds["wall"])
        assert all(value >= 0 for value in seconds.values())


def test_clock_set_back_makes_no_negative_seconds() -> None:
    events = log((10.0, EventKind.RUN_SUBMITTED, 0, {}), (5.0, EventKind.ATTEMPT_PLANNED, 1, {"reason": "start"}))
    assert all(value >= 0 for value in ledger(events, [], now=4.0).values())

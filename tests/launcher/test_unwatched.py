"""Ranks that started and trained while no controller looked: their time is what it was, not what was recorded when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher import adoption, forecast
from launcher.describe import recoveries
from launcher.ledger import Book, account
from launcher.observation import Observation, ObservationKind
from launcher.run import LATE_S, EventKind, RunEvent, fold
from launcher.sizing import _restart_s
from launcher.store import append_line
from tests.launcher.test_takeover import Live, ordered
from tests.support.histories import Line, log
from tests.support.stage import Stage

HOUR_S = 3600.0
STEP_S = 2.0
STEPS = int(HOUR_S / STEP_S)


def story(**began: float) -> tuple[list[RunEvent], list[Line]]:
    """Ranks are ordered at 2 s, exist at 3 s and train from 10 s on; who adopts them comes an hour later."""
    end = 10.0 + HOUR_S
    events = log(
        (0.0, EventKind.RUN_SUBMITTED, 0, {}),
        (2.0, EventKind.ATTEMPT_PLANNED, 1, {"plan": {}, "nodes": ["a"], "resume_from": "", "first_step": 1, **START}),
        (end, EventKind.CONTROLLER_STARTED, 1, {"adopted": True}),
        (end, EventKind.DECISION, 1, {"action": "adopt", "delay_s": 0.0}),
        (end + 0.5, EventKind.RANKS_SPAWNED, 1, {"resume_from": "", "began": began.get("spawned", 3.0)}),
        (end + 0.5, EventKind.TRAINING_STARTED, 1, {"step": 1, "began": began.get("training", 10.0)}),
        (end + 0.5, EventKind.CHECKPOINT_COMMITTED, 1, {"step": STEPS, "stall_s": 0.0}),
    )
    return events, [{"attempt": 1, "step": step, "time": 10.0 + STEP_S * step} for step in range(1, STEPS + 1)]


START = {"reason": "start"}


def test_the_hour_is_productive() -> None:
    events, lines = story()
    books = account(events, lines, now=10.5 + HOUR_S)
    assert books.seconds["start"] == pytest.approx(10.0)
    assert books.seconds["productive"] == pytest.approx(HOUR_S + 0.5)
    assert books.seconds["wall"] == pytest.approx(HOUR_S + 10.5)
    assert books.steps == STEPS
    assert forecast.measured(books)["step_s"] == pytest.approx(STEP_S, rel=0.001)
    assert books.goodput > 0.99


@pytest.mark.parametrize("every", [1, 7, STEPS])
def test_who_looks_in_between_comes_to_the_same(every: int) -> None:
    """Lines are read as they are written, and no event has told yet that their attempt trains."""
    events, lines = story()
    book = Book()
    book.follow(events[:2], [], now=2.0)
    for first in range(0, STEPS, every):
        book.follow([], lines[first : first + every], now=float(lines[min(first + every, STEPS) - 1]["time"]))
    assert book.account(10.0 + HOUR_S).steps == 0, "so far nobody knows"
    book.follow(events[2:], [], now=11.0 + HOUR_S)
    assert book.account(11.0 + HOUR_S) == account(events, lines, 11.0 + HOUR_S)


@pytest.mark.parametrize(("training", "start_s"), [(-1e9, 3.0), (1e12, HOUR_S + 10.5)])
def test_no_clock_moves_it_out_of_where_it_can_have_been(training: float, start_s: float) -> None:
    events, lines = story(training=training)
    books = account(events, lines, now=10.5 + HOUR_S)
    assert books.seconds["start"] == pytest.approx(start_s)
    assert books.seconds["wall"] == pytest.approx(HOUR_S + 10.5)
    trained = fold(events).attempts[0].trained
    assert trained is not None
    assert 2.0 <= trained <= 10.5 + HOUR_S


def test_a_clock_that_is_set_back_afterwards_takes_nothing_off_the_wall() -> None:
    events, lines = story()
    back = RunEvent(seq=9, time=HOUR_S, epoch=1, attempt=1, kind=EventKind.RUN_SUCCEEDED, data={"step": STEPS})
    books = account([*events, back], lines, now=1e6)
    assert books.seconds["wall"] == pytest.approx(HOUR_S + 10.5)


@pytest.mark.parametrize(("early_s", "taken"), [(0.5 * LATE_S, 0.0), (2 * LATE_S, 2 * LATE_S)])
def test_what_is_recorded_at_once_has_the_time_of_the_log(early_s: float, taken: float) -> None:
    """Clocks that agree may differ by more than a restart from a warm pool takes."""
    event = RunEvent(
        seq=1, time=100.0, epoch=1, attempt=1, kind=EventKind.TRAINING_STARTED, data={"began": 100.0 - early_s}
    )
    assert event.began == pytest.approx(100.0 - taken)


def test_a_failure_is_over_when_its_ranks_train_again() -> None:
    events, _ = story()
    fell = RunEvent(seq=1, time=1.0, epoch=1, attempt=1, kind=EventKind.FAILURE_DETECTED, data={"failed_at": 1.0})
    assert recoveries([fell, *events]) == [pytest.approx(9.0)]


def said(stage: Stage, observed: ObservationKind, node: str, time: float, **data: Any) -> None:
    """What an agent remembers, with the time that it was."""
    stage.gang.queue.append(Observation(kind=observed, node=node, time=time, data={"time": time, "attempt": 1, **data}))


@pytest.mark.parametrize("ahead_s", [0.0, 300.0])
def test_a_controller_that_comes_an_hour_later_records_when_it_was(ahead_s: float, tmp_path: Path) -> None:
    """By its own clock, where that of the node is known to be off."""
    stage = ordered(tmp_path)
    planned = stage.store.events()[-1].time
    stage.clock.now = planned + HOUR_S
    stage.store._wall = stage.clock.time
    gang = stage.gang
    assert isinstance(gang, Live)
    connect = gang.connect

    def meet(addresses: Any) -> None:
        connect(addresses)
        for seen in gang.queue:
            seen.data.update(ahead_s=ahead_s, within_s=0.0)

    gang.connect = meet  # type: ignore[method-assign]
    adoption.begin(stage.controller)
    for node, ranks in Live.ranks.items():
        told = [{"rank": rank, "pid": 100 + rank} for rank in ranks]
        said(stage, "spawned", node, planned + 1.0 + ahead_s, ranks=told)
    said(stage, "report", "a", planned + 5.0 + ahead_s, kind="training", rank=0, step=1)
    for step in range(1, 11):
        line = {"attempt": 1, "step": step, "time": planned + 5.0 + 300.0 * step + ahead_s}
        append_line(stage.store.paths.metrics, json.dumps(line).encode() + b"\n")
    stage.turn()
    began = {e.kind: e.data["began"] for e in stage.store.events() if "began" in e.data}
    assert began == {
        EventKind.RANKS_SPAWNED: pytest.approx(planned + 1.0),
        EventKind.TRAINING_STARTED: pytest.approx(planned + 5.0),
    }
    books = account(stage.store.events(), stage.store.metrics(), now=stage.clock.now)
    assert books.seconds["productive"] == pytest.approx(stage.clock.now - planned - 5.0)
    assert books.steps == 10
    assert _restart_s(stage.store.run()) == pytest.approx(5.0), (
        "for a restart of an hour it would wait as long as it may"
    )

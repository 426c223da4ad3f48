"""Every second has a name, and the names sum to the wall time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from launcher import forecast
from launcher.account import CLASSES, ORPHANED, Account
from launcher.clocks import Offset
from launcher.ledger import Book, account, ledger
from launcher.render import ledger_table
from launcher.run import EventKind, RunEvent, fold
from tests.support.histories import TIMELESS, Line, Story, check, log, wall_of

STORY = log(
    (0.0, EventKind.RUN_SUBMITTED, 0, {}),
    (2.0, EventKind.ATTEMPT_PLANNED, 1, {"reason": "start"}),
    (5.0, EventKind.RANKS_SPAWNED, 1, {"resume_from": ""}),
    (10.0, EventKind.TRAINING_STARTED, 1, {"step": 1}),
    (12.4, EventKind.CHECKPOINT_COMMITTED, 1, {"step": 2, "stall_s": 0.4}),
    (
        14.0,
        EventKind.FAILURE_DETECTED,
        1,
        {"failed_at": 13.75, "last_step": 3, "failure": {"kind": "secondary", "rank": 1, "node": "b", "detail": "?"}},
    ),
    (14.5, EventKind.GANG_STOPPED, 1, {"failure": "rank_killed", "cause": "rank 3 was killed", "rank": 3, "node": "c"}),
    (14.5, EventKind.DECISION, 1, {"delay_s": 0.0, "action": "restart"}),
    (15.0, EventKind.ATTEMPT_PLANNED, 2, {"reason": "restart", "first_step": 3}),
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


def test_waiting_for_samples_is_a_part_of_the_steps_that_count() -> None:
    lines = [line | {"data_s": 0.01 * number} for number, line in enumerate(METRICS, start=1)]
    books = account(STORY, lines, now=99.0)
    assert books.data_s == pytest.approx(0.01 + 0.02 + 0.03 + 0.05), "a step that is done again counts once"
    assert books.data_share == pytest.approx(0.11 / 4)
    assert account(STORY, METRICS, now=99.0).data_share == 0.0, "a script tells nothing of it"
    assert "2.75 % of it waiting for samples" in ledger_table(books.seconds, books.data_share)


def test_a_step_that_waited_for_a_copy_in_memory_is_a_stall_of_so_much() -> None:
    waits = (0.25, 0.5, 0.125, 0.0, 0.0625)
    lines = [line | {"stall_s": wait} for line, wait in zip(METRICS, waits, strict=True)]
    before, books = account(STORY, METRICS, now=99.0), account(STORY, lines, now=99.0)
    assert books.memory_s == pytest.approx(sum(waits))
    assert books.disk_stall_s == pytest.approx(0.4), "what the checkpoint on disk has cost is not counted twice"
    assert books.seconds["checkpoint_stall"] == pytest.approx(0.4 + sum(waits))
    counted = 0.25 + 0.5 + 0.125 + 0.0625  # the fourth line is of a step that was lost and is done again
    assert books.seconds["productive"] == pytest.approx(before.seconds["productive"] - counted)
    assert books.seconds["wall"] == before.seconds["wall"]
    assert forecast.measured(books)["stall_s"] == pytest.approx(0.4)
    told = ledger_table(books.seconds, 0.0, books.memory_s, 4)
    assert f"{sum(waits):.1f} s of it for copies in memory; copies in memory every 4 steps" in told


def test_a_checkpoint_that_could_not_be_written_has_cost_its_time_all_the_same() -> None:
    failed = (12.45, EventKind.CHECKPOINT_FAILED, 1, {"step": 2, "reason": "no answer", "stall_s": 0.5})
    story = [(event.time, event.kind, event.attempt, dict(event.data)) for event in STORY]
    before, books = account(STORY, METRICS, now=99.0), account(log(*story[:5], failed, *story[5:]), METRICS, now=99.0)
    assert books.disk_stall_s == pytest.approx(0.4 + 0.5)
    assert books.seconds["productive"] == pytest.approx(before.seconds["productive"] - 0.5)
    assert books.seconds["wall"] == before.seconds["wall"]
    assert (books.saves, books.failed_saves, books.steps) == (1, 1, before.steps)
    assert forecast.measured(books)["stall_s"] == pytest.approx((0.4 + 0.5) / 2)
    silent = account(log(*story[:4], failed, *story[5:]), METRICS, now=99.0)
    assert forecast.measured(silent)["stall_s"] == pytest.approx(0.5)


def test_no_step_has_waited_for_longer_than_it_took() -> None:
    lines = [METRICS[0] | {"stall_s": 50.0}, METRICS[1] | {"stall_s": -1.0}, *METRICS[2:]]
    books = account(STORY, lines, now=99.0)
    assert (books.memory_s, books.disk_stall_s) == pytest.approx((1.0, 0.4))
    assert books.seconds["productive"] == pytest.approx(3.0)


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


def test_incident_of_the_story() -> None:
    found = account(STORY, METRICS, now=99.0)
    (one,) = found.incidents
    assert (one.kind, one.cause, one.node, one.rank) == ("rank_killed", "rank 3 was killed", "c", 3)
    assert (one.at, one.step, one.steps_lost, one.action, one.recovered) == (13.75, 3, 1, "restart", True)
    expected = {"detect": 0.25, "decide": 0.5, "place": 0.75, "restore": 1.0, "replay": 1.35, "wait": 0.0}
    assert one.seconds == pytest.approx(expected)
    assert one.total_s == pytest.approx(3.85)
    assert one.restart_s == pytest.approx(2.25)
    assert found.goodput == pytest.approx(4.0 / 20.0)
    assert (found.steps, found.saves) == (4, 1)


def test_a_failure_during_recovery_is_an_incident_of_its_own() -> None:
    events = log(
        (0.0, EventKind.RUN_SUBMITTED, 0, {}),
        (1.0, EventKind.ATTEMPT_PLANNED, 1, {"reason": "start", "first_step": 1}),
        (2.0, EventKind.TRAINING_STARTED, 1, {"step": 1}),
        (7.0, EventKind.FAILURE_DETECTED, 1, {"failed_at": 6.0, "last_step": 3, "failure": {"kind": "node_lost"}}),
        (8.0, EventKind.GANG_STOPPED, 1, {"failure": "node_lost", "cause": "n"}),
        (8.0, EventKind.DECISION, 1, {"delay_s": 0, "action": "restart"}),
        (9.0, EventKind.ATTEMPT_PLANNED, 2, {"reason": "restart", "first_step": 2}),
        (10.0, EventKind.RANKS_SPAWNED, 2, {"resume_from": "x"}),
        (14.0, EventKind.FAILURE_DETECTED, 2, {"failed_at": 13.0, "last_step": 1, "failure": {"kind": "rank_error"}}),
        (14.5, EventKind.GANG_STOPPED, 2, {"failure": "rank_error", "cause": "r"}),
        (14.5, EventKind.DECISION, 2, {"delay_s": 2.0, "action": "restart"}),
        (17.0, EventKind.ATTEMPT_PLANNED, 3, {"reason": "restart", "first_step": 2}),
        (18.0, EventKind.RANKS_SPAWNED, 3, {"resume_from": "x"}),
        (19.0, EventKind.TRAINING_STARTED, 3, {"step": 2}),
    )
    metrics = [{"attempt": 1, "step": s, "time": 2.0 + s} for s in (1, 2, 3)]
    metrics += [{"attempt": 3, "step": s, "time": 18.0 + s} for s in (2, 3, 4)]
    first, second = account(events, metrics, now=22.0).incidents
    assert first.seconds == pytest.approx(
        {"detect": 1.0, "decide": 1.0, "place": 2.0, "restore": 3.0, "replay": 1.0 + 2.0, "wait": 0.0}
    )
    assert second.seconds == pytest.approx(
        {"detect": 1.0, "decide": 0.5, "place": 1.0, "restore": 1.0, "replay": 0.0, "wait": 2.5}
    )
    assert (first.steps_lost, second.steps_lost) == (2, 0)
    assert (first.recovered, second.recovered) == (False, True)


def test_a_run_that_nobody_controlled_waited_for_the_person_who_resumed_it() -> None:
    days = 3 * 86400.0
    events = log(
        (0.0, EventKind.RUN_SUBMITTED, 0, {}),
        (1.0, EventKind.ATTEMPT_PLANNED, 1, {"reason": "start", "first_step": 1}),
        (2.0, EventKind.TRAINING_STARTED, 1, {"step": 1}),
        (days, EventKind.RESUME_REQUESTED, 0, {"last_step": 3}),
        (days + 1, EventKind.ATTEMPT_PLANNED, 2, {"reason": "resume", "first_step": 3}),
        (days + 2, EventKind.RANKS_SPAWNED, 2, {"resume_from": "x"}),
        (days + 3, EventKind.TRAINING_STARTED, 2, {"step": 3}),
    )
    metrics = [{"attempt": 1, "step": s, "time": 2.0 + s} for s in (1, 2, 3)]
    metrics += [{"attempt": 2, "step": s, "time": days + s} for s in (3, 4, 5)]
    found = account(events, metrics, now=days + 5)
    (one,) = found.incidents
    assert (one.kind, one.at, one.steps_lost, one.action) == (ORPHANED, 5.0, 1, "resume")
    assert one.seconds["wait"] == pytest.approx(days - 5.0)
    assert found.seconds["finish"] == 0.0
    assert found.seconds["productive"] == pytest.approx(3.0 + 2.0)


def test_growing_back_is_no_incident() -> None:
    events = log(
        (0.0, EventKind.RUN_SUBMITTED, 0, {}),
        (1.0, EventKind.ATTEMPT_PLANNED, 1, {"reason": "start", "first_step": 1}),
        (2.0, EventKind.TRAINING_STARTED, 1, {"step": 1}),
        (3.5, EventKind.DECISION, 1, {"action": "grow"}),
        (4.5, EventKind.GANG_STOPPED, 1, {"failure": "", "last_step": 2}),
        (5.5, EventKind.ATTEMPT_PLANNED, 2, {"reason": "grow", "first_step": 3}),
        (6.0, EventKind.RANKS_SPAWNED, 2, {"resume_from": "x"}),
        (7.0, EventKind.TRAINING_STARTED, 2, {"step": 3}),
    )
    metrics = [{"attempt": 1, "step": s, "time": 2.0 + s} for s in (1, 2)]
    found = account(events, metrics, now=7.0)
    assert found.incidents == ()
    assert {name: found.rest[name] for name in ("decide", "place", "restore")} == {
        "decide": 0.5,
        "place": 1.5,
        "restore": 1.0,
    }


def test_a_script_reports_no_steps_so_none_of_its_time_is_called_lost() -> None:
    events = [event for event in STORY if event.attempt < 2][:6]
    assert ledger(events, [], 14.0, script=True)["replay"] == 0.0
    assert ledger(events, [], 14.0)["replay"] == pytest.approx(13.75 - 10.0 - 0.4)


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


def skewed(story: Sequence[RunEvent], lines: Sequence[Line], ahead_s: float) -> Account:
    """The account of a story whose rank 0 has a clock that is off, on a node that says so."""
    told: list[tuple[float, EventKind, int, dict[str, Any]]] = []
    for event in story:
        more: dict[str, Any] = {"nodes": ["a", "b"]} if event.kind is EventKind.ATTEMPT_PLANNED else {"host": "h"}
        told.append((event.time, event.kind, event.attempt, {**event.data, **more}))
        if event.kind is EventKind.RUN_SUBMITTED:
            told.append((event.time, EventKind.CONTROLLER_STARTED, 0, {"host": "h"}))
            for node, off_s in (("a", ahead_s), ("b", -1000.0)):
                told.append((event.time, EventKind.CLOCK_SKEWED, 0, {"node": node, "ahead_s": off_s, "within_s": 0.0}))
    return account(log(*told), [line | {"time": line["time"] + ahead_s} for line in lines], now=1e9 + 1e7)


@pytest.mark.parametrize("ahead_s", [300.0, -300.0, 2.5, -2.5])
def test_a_clock_that_is_known_to_be_off_moves_no_second(ahead_s: float) -> None:
    honest, found = account(STORY, METRICS, now=99.0), skewed(STORY, METRICS, ahead_s)
    assert found.seconds == pytest.approx(honest.seconds)
    assert [one.seconds for one in found.incidents] == [pytest.approx(one.seconds) for one in honest.incidents]
    assert found.steps == honest.steps


@pytest.mark.parametrize("seed", range(40))
def test_nor_in_any_history(seed: int) -> None:
    story = Story(seed, honest=True)
    honest = skewed(story.events, story.metrics, 0.0)
    for ahead_s in (300.0, -300.0):
        found = skewed(story.events, story.metrics, ahead_s)
        assert found.seconds == pytest.approx(honest.seconds, abs=1e-4)


def test_what_one_controller_has_found_is_not_held_against_the_clock_of_another() -> None:
    offset = Offset()
    planned = (2.0, EventKind.ATTEMPT_PLANNED, 1, {"nodes": ["a"]})
    off = (3.0, EventKind.CLOCK_SKEWED, 1, {"node": "a", "ahead_s": 60.0, "within_s": 0.0})
    again, other = ((9.0, EventKind.CONTROLLER_STARTED, 1, {"host": host}) for host in ("h", "i"))
    seen = []
    for event in log((1.0, EventKind.CONTROLLER_STARTED, 0, {"host": "h"}), planned, off, again, other):
        offset.enter(event)
        seen.append(offset.ahead_s)
    assert seen == [0.0, 0.0, 60.0, 60.0, 0.0]


# --- random histories ---------------------------------------------------------------------------------------------


def test_random_histories() -> None:
    seen: set[str] = set()
    for seed in range(400):
        story = Story(seed)
        for length in {len(story.events), 1 + seed % len(story.events)}:
            events, now = story.events[:length], story.events[length - 1].time + seed % 3
            known = [line for line in story.metrics if int(line["attempt"]) <= events[-1].attempt]
            found = account(events, known, now)
            # A commit moves no time by itself, but steps are known up to it, also if the clock is set back afterwards.
            check(found, wall_of(events, now, without=TIMELESS), wall_of(events, now))
            run = fold(events)
            assert sum(one.steps_lost for one in found.incidents) == run.steps_lost
            seen |= {one.kind for one in found.incidents}
            seen |= {name for name in CLASSES if found.seconds[name] > 0}
    assert seen >= {*CLASSES, "node_lost", ORPHANED}


def test_a_book_that_is_kept_says_the_same_as_one_that_is_read() -> None:
    """As beside a controller: events and steps come bit by bit, and it is looked at in between."""
    for seed in range(100):
        story, dice = Story(seed, honest=True), random.Random(seed)
        book, events, lines = Book(), list(story.events), list(story.metrics)
        end = max([story.events[-1].time, *(line["time"] for line in lines)])
        while events or lines:
            some = [events.pop(0) for _ in range(min(len(events), dice.randrange(4)))]
            now = events[0].time if events else end
            due = [line for line in lines if line["time"] <= now] if events else lines
            lines = lines[len(due) :]
            book.follow(some, due, now)
            check(book.account(now), 0.0, float("inf"))
        now = end + 1.0
        assert book.account(now) == account(story.events, story.metrics, now)


def test_ten_thousand_steps_and_checkpoints_cost_no_more_than_once_through() -> None:
    """An account is one pass: its working memory holds no step that has been accounted for."""
    count = 10_000
    events = log((0.0, EventKind.RUN_SUBMITTED, 0, {}), (1.0, EventKind.TRAINING_STARTED, 1, {"step": 1}))
    read: list[int] = []

    def lines() -> Any:
        for step in range(1, count + 1):
            read.append(step)
            yield {"attempt": 1, "step": step, "time": 1.0 + step}

    commits = [
        RunEvent(
            seq=3 + step,
            time=1.2 + step,
            epoch=1,
            attempt=1,
            kind=EventKind.CHECKPOINT_COMMITTED,
            data={"step": step, "stall_s": 0.25},
        )
        for step in range(1, count)
    ]
    found = account([*events, *commits], lines(), now=1.0 + count)
    assert read == list(range(1, count + 1))
    assert found.seconds["checkpoint_stall"] == pytest.approx(0.25 * (count - 1))
    assert found.seconds["productive"] == pytest.approx(count - 0.25 * (count - 1))

"""A log is read once: what has been folded is not read again, however long the run lives. Counts, not seconds.

Most of a long log are commits: 100 days of 3,120 nodes that save every four steps have some 74,000 lines, of which
58,000 are such. What is left grows with failures and decisions; neither steps nor heartbeats leave a line.
"""

from __future__ import annotations

import functools
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from launcher import store as store_module
from launcher.follow import Display, Screen, follow
from launcher.lock import ControllerLock
from launcher.logbook import Logbook
from launcher.run import EventKind, Run, RunEvent, RunState, advance, fold
from launcher.store import RunStore, append_line, read_event, read_lines
from strategies.codec import from_json, to_json
from strategies.errors import ConfigError
from tests.support.runs import begin_attempt, make_run, put, recovered_run

SAVES = 300


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds of the events that were read, by whomever."""
    seen: list[str] = []

    def counted(row: dict[str, Any]) -> RunEvent:
        seen.append(str(row["kind"]))
        return read_event(row)

    monkeypatch.setattr(store_module, "read_event", counted)
    monkeypatch.setattr("launcher.follow.read_event", counted)
    return seen


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A run with a long past."""
    store = make_run(tmp_path)
    begin_attempt(store, 1, 2.0, nodes=["a", "b", "c", "d"], step=1, reason="start")
    for step in range(1, SAVES + 1):
        event = RunEvent(seq=9 + step, time=9e8, epoch=1, attempt=1, kind=EventKind.CHECKPOINT_COMMITTED, data=at(step))
        append_line(store.paths.events, json.dumps(to_json(event)).encode() + b"\n")
    return RunStore.open(store.paths.root)


def at(step: int) -> dict[str, Any]:
    return {"step": step, "path": f"step-{step}", "bytes": 1}


def test_a_controller_reads_the_log_when_it_comes_and_not_for_what_it_writes(store: RunStore, read: list[str]) -> None:
    lines = len(store.events())
    read.clear()
    lock = ControllerLock.acquire(store.paths)
    book = Logbook(store, lock, lambda event: None)
    book.record(EventKind.CONTROLLER_STARTED, attempt=1)
    begun = len(read)
    assert begun <= 3 * lines + 1
    for step in range(SAVES + 1, SAVES + 51):
        book.record(EventKind.CHECKPOINT_COMMITTED, attempt=1, **at(step))
    assert len(read) == begun, "what follows costs what it says, and not what was before"
    assert book.run == fold(store.events())
    assert book.run.committed_step == SAVES + 50


def test_who_follows_reads_every_line_once(store: RunStore, read: list[str]) -> None:
    """However often it looks: a second has several looks, and a run of 100 days 74,000 lines."""
    display = Display(store, steps=None, onto=Screen(io.StringIO(), lambda: 0.0), clock=lambda: 1e9)
    lines = len(store.events())
    looks = iter(range(40))
    read.clear()

    def sleep(_: float) -> None:
        look = next(looks)
        if look % 4 == 0:
            put(store, 1e6, EventKind.CHECKPOINT_COMMITTED, attempt=1, **at(SAVES + look))
            del read[-lines - look // 4 :]  # that has read them all, to number its own
        if look == 39:
            store.append(EventKind.RUN_CANCELLED, reason="enough")

    assert follow(store, display, after=lines, sleep=sleep) is RunState.CANCELLED
    assert len(read) == lines + 11 + (lines + 10), "each once, and all once more to number the last"


@pytest.mark.parametrize("seed", range(20))
def test_commits_in_a_row_are_folded_as_one_after_the_other(seed: int, store: RunStore) -> None:
    """Whatever their order and whoever wrote them, also after falling back to an older one."""
    draw, events = random.Random(seed), store.events()[: -SAVES + 3]
    for attempt in range(2, 12):
        for _ in range(draw.randrange(6)):
            fields: dict[str, Any] = {"epoch": draw.choice((0, 1, 1, 1, attempt // 4 + 1)), "attempt": attempt - 1}
            events.append(event_of(EventKind.CHECKPOINT_COMMITTED, at(draw.randrange(1, 60)), **fields))
        step = draw.randrange(60)
        planned = {
            "plan": {},
            "nodes": ["a"],
            "first_step": step + 1,
            "resume_from": f"step-{step}",
            "reason": "restart",
        }
        epoch = attempt // 4 + 1
        events.append(event_of(EventKind.GANG_STOPPED, {"last_step": step + 3}, epoch=epoch, attempt=attempt - 1))
        events.append(event_of(EventKind.ATTEMPT_PLANNED, planned, epoch=epoch, attempt=attempt))
        assert fold(events) == functools.reduce(advance, events, Run())
    assert len(fold(events).attempts) == 11


def event_of(kind: EventKind, data: dict[str, Any], *, epoch: int, attempt: int) -> RunEvent:
    return RunEvent(seq=1, time=9e8, epoch=epoch, attempt=attempt, kind=kind, data=data)


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return list(read_lines(recovered_run(tmp_path).paths.events))


def test_a_line_is_read_as_strictly_as_anything_else(rows: list[dict[str, Any]]) -> None:
    assert [read_event(row) for row in rows] == [from_json(RunEvent, row) for row in rows]
    row = rows[-1]
    assert read_event(row | {"time": 5}) == from_json(RunEvent, row | {"time": 5})
    wrongs: list[dict[str, Any]] = [{"seq": True}, {"seq": "1"}, {"kind": "none_such"}, {"kind": ["x"]}]
    for wrong in [*wrongs, {"more": 1}, {"data": []}]:
        with pytest.raises(ConfigError, match=r"events\.jsonl"):
            read_event(row | wrong)

"""A log from a clock that was ahead: a person is told of both clocks, may go on, and the ledger's sums hold."""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path

import pytest

from launcher import adoption, resume_checks
from launcher.account import CLASSES
from launcher.cli import main
from launcher.ledger import account
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from strategies.errors import ResumeRefused
from tests.support.folders import contents
from tests.support.histories import TIMELESS, Story, check, wall_of
from tests.support.runs import T0, begin_attempt, make_run, put
from tests.support.stage import Stage

DAY_S = 86_400.0


def ended(parent: Path, *, ahead_s: float) -> RunStore:
    """A run whose controller, on a host whose clock is ahead, has just given up."""
    store, now_s = make_run(parent), time.time() - T0
    put(store, now_s + ahead_s - 9, EventKind.CONTROLLER_STARTED, host="fast", pid=1, adopted=False)
    begin_attempt(store, 1, now_s + ahead_s - 8, nodes=["a", "b", "c", "d"], step=1, reason="start")
    put(store, now_s + ahead_s, EventKind.RUN_FAILED, attempt=1, reason="all restarts are used")
    return store


def resume(parent: Path, *words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["resume", "demo", *words, "--dry-run", "--dir", str(parent)])
    return int(end.value.code or 0)


def test_both_clocks_are_named_and_a_person_may_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ended(tmp_path, ahead_s=DAY_S)
    before = contents(tmp_path)
    assert resume(tmp_path) == 6
    told = capsys.readouterr().err
    assert "the clock here is 863" in told or "the clock here is 864" in told
    assert "it is late, or that of fast was ahead" in told
    assert f"If the clock here is right: phalanx resume demo --dir {tmp_path} --clock-was-ahead" in told
    assert contents(tmp_path) == before
    assert resume(tmp_path, "--clock-was-ahead") == 0
    assert RunStore.open(store.paths.root).run().state is RunState.FAILED


def test_it_is_said_once(tmp_path: Path) -> None:
    """The controller that began then writes by a clock that is right: that one counts from now on."""
    store = ended(tmp_path, ahead_s=DAY_S)
    now_s = time.time() - T0
    put(store, now_s, EventKind.CONTROLLER_STARTED, epoch=2, host="right", pid=1, adopted=False)
    put(store, now_s + 1, EventKind.RESUME_REQUESTED, epoch=2, request="", overrides=[], changes=[], last_step=0)
    put(store, now_s + 2, EventKind.RUN_FAILED, epoch=2, reason="again")
    assert resume_checks.check(store, store.run(), store.request(), clock=lambda: T0 + now_s - 200.0) == []
    with pytest.raises(ResumeRefused, match="402 s behind") as refused:
        resume_checks.check(store, store.run(), store.request(), clock=lambda: T0 + now_s - 400.0)
    assert "that of right was ahead" in refused.value.why


def test_the_sums_hold_after_such_a_resume(tmp_path: Path) -> None:
    """The real controller, on a clock that is a day behind the one that its log was begun with."""
    stage = Stage(tmp_path)
    stage.clock.now += 2 * DAY_S
    stage.start()
    stage.clock.now -= DAY_S
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller, resume={"overrides": [], "changes": []}, adopt=False)
    stage.start()
    stage.clock.now += 7.0
    stage.turn()
    assert stage.state() is RunState.RUNNING
    found = account(stage.store.events(), [], stage.clock.now)
    assert sum(found.seconds[name] for name in CLASSES) == pytest.approx(found.seconds["wall"])
    assert all(value >= 0 for value in found.seconds.values())


def test_so_they_do_in_any_history() -> None:
    """From a person's resume on, everything is dated by a clock that is behind the one before."""
    resumed = 0
    for seed in range(300):
        story, behind_s = Story(seed), random.Random(seed).choice([600.0, DAY_S, 30 * DAY_S])
        places = [at for at, event in enumerate(story.events) if event.kind is EventKind.RESUME_REQUESTED]
        if not places:
            continue
        resumed += 1
        first = story.events[places[0]].attempt
        events = [
            dataclasses.replace(event, time=event.time - behind_s) if at >= places[0] else event
            for at, event in enumerate(story.events)
        ]
        lines = [
            line | {"time": line["time"] - behind_s} if int(line["attempt"]) > first else line for line in story.metrics
        ]
        now = events[-1].time
        check(account(events, lines, now), wall_of(events, now, without=TIMELESS), wall_of(events, now))
    assert resumed > 20

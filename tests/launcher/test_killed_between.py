"""A controller that is killed between a record and what follows from it: its successor does what it would have done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher import adoption
from launcher.phase import Phase
from launcher.run import EventKind, Run, RunEvent, RunState
from strategies.schedule import Skip
from tests.launcher.test_origin import a_node_is_lost, a_rank_falls, killed, trained
from tests.support.stage import Stage


class Killed(BaseException):
    """Nothing of the controller's own is run any more."""


@dataclass(frozen=True)
class Case:
    """How a gang ends, under which settings, and what becomes of the run."""

    end: Callable[[Stage], None]
    nodes: str = "ab"  # of the next attempt
    excluded: str = ""
    skips: tuple[Skip, ...] = ()
    over: str = ""  # why the run ends
    recovery: dict[str, Any] = field(default_factory=dict)


def training_blows_up(stage: Stage) -> None:
    stage.report("a", "blow_up", 1, rank=1, step=13, why="the loss is nan", samples=4)
    killed(stage, "a", "b")
    stage.turn(4)


def a_device_is_gone(stage: Stage) -> None:
    told = {"type": "RuntimeError", "message": "No CUDA GPUs are available", "traceback": "t"}
    stage.report("b", "error", 1, rank=3, step=0, **told)
    stage.gang.say("exit", "b", rank=3, attempt=1, code=1, signal=None, log_tail="")
    killed(stage, "a", "b")
    stage.turn(4)


def a_rank_is_told_nonsense(stage: Stage) -> None:
    told = {"type": "ConfigError", "message": "no such layer", "traceback": "t"}
    stage.report("b", "error", 1, rank=3, step=0, **told)
    stage.gang.say("exit", "b", rank=3, attempt=1, code=2, signal=None, log_tail="")
    killed(stage, "a", "b")
    stage.turn(4)


CASES = {
    "node": Case(a_node_is_lost, nodes="ac"),
    "rank": Case(a_rank_falls),
    "numeric": Case(training_blows_up, skips=(Skip(step=13, samples=4),)),
    "device": Case(a_device_is_gone, nodes="ac", excluded="b"),
    "third": Case(a_rank_falls, nodes="ac", excluded="b", recovery={"exclude_after": 1}),
    "budget": Case(a_rank_falls, over="all 0 restarts are used", recovery={"max_restarts": 0}),
    "hopeless": Case(a_rank_is_told_nonsense, over="Another try would end alike"),
}


def killed_after(stage: Stage, number: int) -> list[RunEvent]:
    """From now on the controller writes so many events and dies of the last; what it has written is added."""
    written: list[RunEvent] = []

    def observe(event: RunEvent | None) -> None:
        if event is not None:
            written.append(event)
            if len(written) == number:
                raise Killed

    stage.observer = observe
    return written


def go_on(stage: Stage) -> None:
    """To the first step of the next attempt, if there is to be one."""
    stage.clock.now += 60.0  # a back-off, if there is one
    stage.turn()
    if not stage.state().terminal:
        stage.start()


def succeed(stage: Stage) -> None:
    """The next controller comes."""
    stage.observer = lambda event: None
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller)


def records(case: Case, root: Path) -> list[EventKind]:
    """What is written from the failure to the first step after it, or to the end, when nobody is killed."""
    stage, (_, newest) = trained(root, **case.recovery)
    written = killed_after(stage, 0)
    case.end(stage)
    go_on(stage)
    check(case, stage.store.run(), str(newest), "nobody was killed")
    return [event.kind for event in written]


def check(case: Case, run: Run, newest: str, what: str) -> None:
    """Whoever controls it, the run comes to the same."""
    assert (run.skips, "".join(run.excluded)) == (case.skips, case.excluded), what
    if case.over:
        assert run.state is RunState.FAILED, what
        assert case.over in run.reason, what
        assert len(run.attempts) == len(run.failures) == 1, what
        return
    last = run.attempts[-1]
    assert run.state is RunState.RUNNING, what
    assert ("".join(last.nodes), last.resume_from, last.first_step) == (case.nodes, newest, 11), what
    assert [one.number for one in run.attempts] == list(range(1, len(run.attempts) + 1)), what
    assert len(run.failures) == len(run.attempts) - 1 <= 2, what


@pytest.mark.parametrize("name", CASES)
def test_a_successor_goes_on_from_every_record(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    kinds = records(case, tmp_path / "quiet")
    assert {EventKind.FAILURE_DETECTED, EventKind.GANG_STOPPED, EventKind.DECISION} <= set(kinds)
    assert (EventKind.NODE_EXCLUDED in kinds) is bool(case.excluded)
    assert kinds[-1] is (EventKind.RUN_FAILED if case.over else EventKind.TRAINING_STARTED)
    for number in range(1, len(kinds) + 1 if case.over else kinds.index(EventKind.RANKS_SPAWNED) + 1):
        stage, (_, newest) = trained(tmp_path / str(number), **case.recovery)
        written = killed_after(stage, number)
        with pytest.raises(Killed):
            case.end(stage)
        assert [event.kind for event in written] == kinds[:number]
        succeed(stage)
        go_on(stage)
        run, what = stage.store.run(), f"killed after {kinds[number - 1]}"
        check(case, run, str(newest), what)
        if kinds[number - 1] in (EventKind.GANG_STOPPED, EventKind.NODE_EXCLUDED, EventKind.DECISION):
            news = stage.kinds()
            assert news.count(EventKind.NODE_EXCLUDED) == bool(case.excluded), "it is said once"
            decided = [e.data for e in stage.store.events() if e.data.get("action") in ("restart", "give_up")]
            assert len(decided) == 1, "it is decided once"
            assert decided[0]["reason"], what
        if case.over:
            assert (stage.controller.phase, stage.backend.released) == (Phase.END, 1), what
            assert stage.kinds().count(EventKind.RUN_FAILED) == 1, what


@pytest.mark.parametrize("last", [EventKind.GANG_STOPPED, EventKind.DECISION])
def test_a_successor_waits_for_what_is_left_of_a_pause(last: EventKind, tmp_path: Path) -> None:
    """The second failure at one step is followed by one of 40 s."""
    stage, _ = trained(tmp_path, backoff_s=40.0)
    stage.clock.now = stage.store.events()[-1].time
    stage.store._wall = stage.clock.time
    a_rank_falls(stage)
    stage.start()
    stage.observer = lambda event: fall(event, last)
    stage.gang.say("exit", "b", rank=3, attempt=2, code=None, signal=9)
    killed(stage, "a", "b", attempt=2)
    with pytest.raises(Killed):
        stage.turn(4)
    stage.clock.now += 15.0
    began = stage.clock.now
    succeed(stage)
    assert stage.controller.phase is Phase.BACKOFF
    paused_s = 40.0 if last is EventKind.GANG_STOPPED else 25.0
    while len(stage.store.run().attempts) == 2:
        stage.turn()
    assert stage.clock.now - began == pytest.approx(paused_s, abs=1.0)


def fall(event: RunEvent | None, last: EventKind) -> None:
    if event is not None and event.kind is last:
        raise Killed


def test_an_end_that_was_decided_on_before_any_attempt_is_kept(tmp_path: Path) -> None:
    stage = Stage(tmp_path, nodes=("a",), spares=0, wait_for_nodes_s=5.0)
    stage.observer = lambda event: fall(event, EventKind.DECISION)
    with pytest.raises(Killed):
        stage.turn(40)
    succeed(stage)
    run = stage.store.run()
    assert (run.state, run.attempts) == (RunState.FAILED, ())
    assert run.reason.startswith("only 1 of 2 nodes came within 5 s")


def test_a_persons_resume_is_no_failure_to_decide_on(tmp_path: Path) -> None:
    """It was asked for where an end had been decided on; then that controller falls, too."""
    stage, _ = trained(tmp_path, max_restarts=0)
    stage.observer = lambda event: fall(event, EventKind.DECISION)
    with pytest.raises(Killed):
        a_rank_falls(stage)
    stage.observer = lambda event: None
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller, resume={"overrides": [], "changes": []})
    succeed(stage)
    stage.start()
    run = stage.store.run()
    assert (run.state, len(run.attempts), run.failures) == (RunState.RUNNING, 2, ())

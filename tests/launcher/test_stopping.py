"""Ranks that do not die: how long the controller waits, what it says, and what becomes of their node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher import adoption
from launcher.describe import describe
from launcher.phase import Phase
from launcher.render import run_text
from launcher.render_events import event_line
from launcher.run import EventKind
from launcher.stopping import UNCONFIRMED_S
from tests.support.stage import Stage

LEFT = [{"rank": 2, "pid": 4711, "state": "state D in nv_teardown"}]


def falling(tmp_path: Path, **options: Any) -> Stage:
    """A gang whose rank 3 has died; node a has confirmed the end of its ranks, b says what keeps its own."""
    stage = Stage(tmp_path, backoff_s=0.0, **options)
    stage.start()
    stage.gang.say("exit", "b", rank=3, attempt=1, code=None, signal=9, log_tail="")
    stage.turn()
    stage.gang.say("killed", "a", attempt=1)
    stage.turn()
    stage.gang.say("dying", "b", attempt=1, left=LEFT, waited_s=2.0)
    stage.turn()
    return stage


def events(stage: Stage, kind: EventKind) -> list[dict[str, Any]]:
    return [dict(event.data) for event in stage.store.events() if event.kind is kind]


def wait(stage: Stage, seconds: float) -> None:
    end = stage.clock.now + seconds
    while stage.clock.now < end:
        stage.turn()


def test_what_takes_its_time_to_die_is_waited_for_and_its_node_is_used_again(tmp_path: Path) -> None:
    stage = falling(tmp_path)
    wait(stage, 50.0)
    stage.gang.say("dying", "b", attempt=1, left=[{**LEFT[0], "state": "state R"}], waited_s=50.0)
    wait(stage, 5.0)
    assert stage.controller.phase is Phase.STOP
    status = describe(stage.store, stage.clock.now)
    assert [(one["node"], one["left"]) for one in status["dying"]] == [("b", LEFT)]
    assert "killed, not dead, and waited for:\n  node b: rank 2 (pid 4711, state D in nv_teardown)" in run_text(status)
    assert len([call for call in stage.gang.calls if call[0] == "spawn"]) == 1
    stage.gang.say("killed", "b", attempt=1)
    stage.turn()
    stage.start()
    assert describe(stage.store, stage.clock.now)["dying"] == []
    assert ("spawn", 2, {"a": [0, 1], "b": [2, 3]}) in stage.gang.calls
    assert not [call for call in stage.gang.calls if call[0] == "drop"]
    assert events(stage, EventKind.NODE_EXCLUDED) == []
    (told,) = [event for event in stage.store.events() if event.kind is EventKind.RANKS_DYING]  # once, not each time
    assert event_line(told) == (
        "node b: 2 s after SIGKILL these have not ended and are waited for: rank 2 (pid 4711, state D in nv_teardown)"
    )


def test_after_the_patience_the_node_is_given_up_and_a_spare_takes_its_place(tmp_path: Path) -> None:
    stage = falling(tmp_path, kill_patience_s=30.0)
    wait(stage, 20.0)
    assert stage.controller.phase is Phase.STOP
    wait(stage, 10.0)
    assert ("drop", "b") in stage.gang.calls
    stage.gang.say("agent_lost", "b", why="SIGKILL has not ended it", incarnation="b-0", silent=False)
    stage.turn()
    stage.start()
    assert ("spawn", 2, {"a": [0, 1], "c": [2, 3]}) in stage.gang.calls
    (left_out,) = events(stage, EventKind.NODE_EXCLUDED)
    assert left_out["node"] == "b"
    assert left_out["reason"] == (
        "SIGKILL has not ended rank 2 (pid 4711, state D in nv_teardown) within 30 s (recovery.kill_patience_s), "
        "which still hold its devices"
    )
    run = stage.store.run()
    assert run.failures[0].kind == "rank_killed"  # the cause, not what came of it
    assert "b" in run.excluded
    assert len(events(stage, EventKind.FAILURE_DETECTED)) == 1


def test_a_node_that_says_nothing_is_not_waited_for_as_long(tmp_path: Path) -> None:
    stage = Stage(tmp_path, backoff_s=0.0)
    stage.start()
    stage.gang.say("exit", "b", rank=3, attempt=1, code=None, signal=9, log_tail="")
    stage.turn()
    stage.gang.say("killed", "a", attempt=1)
    wait(stage, UNCONFIRMED_S - 0.5)
    assert ("drop", "b") not in stage.gang.calls
    wait(stage, 1.0)
    assert ("drop", "b") in stage.gang.calls
    assert events(stage, EventKind.NODE_EXCLUDED) == []


def test_a_cancelled_run_ends_though_a_rank_does_not(tmp_path: Path) -> None:
    stage = falling(tmp_path, kill_patience_s=15.0)
    stage.store.paths.cancel.parent.mkdir(exist_ok=True)
    stage.store.paths.cancel.touch()
    wait(stage, 10.0)
    phases = [stage.controller.phase]
    wait(stage, 15.0)
    assert [*phases, stage.controller.phase] == [Phase.STOP, Phase.END]
    assert EventKind.RUN_CANCELLED in stage.kinds()


@pytest.mark.parametrize("dies_after_s", [40.0, 90.0])
def test_a_successor_waits_likewise(tmp_path: Path, dies_after_s: float) -> None:
    stage = falling(tmp_path)
    stage.lock.release()
    stage.renew()
    connect, poll, began = stage.gang.connect, stage.gang.poll, stage.clock.now
    welcome = {"attempt": 1, "ranks": [{"rank": 2, "pid": 4711, "exited": None}]}
    told: list[str] = []

    def meet(addresses: Any) -> None:
        connect(addresses)
        for seen in stage.gang.queue:
            if seen.node == "b":
                seen.data.update(welcome)

    def listen(timeout_s: float) -> Any:
        waited_s = stage.clock.now - began
        if waited_s > 2.0 and "dying" not in told:
            told.append("dying")
            stage.gang.say("dying", "b", attempt=1, left=LEFT, waited_s=2.0)
        if waited_s > dies_after_s and "killed" not in told:
            told.append("killed")
            stage.gang.say("killed", "b", attempt=1)
        return poll(timeout_s)

    stage.gang.connect, stage.gang.poll = meet, listen  # type: ignore[method-assign]
    adoption.begin(stage.controller)
    given_up = ("drop", "b") in stage.gang.calls
    assert given_up is (dies_after_s > stage.request.recovery.kill_patience_s)
    assert stage.clock.now - began >= min(dies_after_s, stage.request.recovery.kill_patience_s)

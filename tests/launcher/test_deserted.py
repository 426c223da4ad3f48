"""Ranks that all exit well before the last step: asked to, that is no failure; unasked, it is one, and is bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from launcher import adoption
from launcher.departure import IN_VAIN
from launcher.gang import Gang
from launcher.run import EventKind, RunState
from launcher.store import append_line
from tests.launcher.test_next_checkpoint import asked, small, train
from tests.launcher.test_sizing import Survivors, come_back, leave
from tests.support.stage import Stage

BOTH = ("a", "b")


def desert(stage: Stage, attempt: int, step: int) -> None:
    """Every rank comes to a step and exits."""
    for rank in range(4):
        node = BOTH[rank // 2]
        stage.report(node, "step", attempt, rank=rank, step=step)
        stage.gang.say("exit", node, rank=rank, attempt=attempt, code=0, signal=None)
    stage.turn()
    for node in BOTH:
        stage.gang.say("killed", node, attempt=attempt)
    stage.turn()


def test_it_is_a_failure_and_the_same_again_ends_the_run(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    desert(stage, 1, 7)
    run = stage.store.run()
    assert [(fall.kind, fall.node) for fall in run.failures] == [("rank_exit", "")]
    assert stage.kinds().count(EventKind.FAILURE_DETECTED) == 1
    stage.start()
    assert stage.store.run().attempts[-1].reason == "restart"
    desert(stage, 2, 7)
    run = stage.store.run()
    assert run.state is RunState.FAILED
    assert run.reason == (
        "the same error at the same step 2 times: "
        "all ranks exited with code 0 after step 7 of 20, and nobody had asked them to leave"
    )
    assert dict(run.excluded) == {}


def test_at_other_steps_it_has_the_budget_of_errors_and_pauses(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    for attempt in range(1, 30):
        stage.start()
        desert(stage, attempt, 19 - attempt)
        if stage.state().terminal:
            break
        stage.clock.now += 60.0
    run = stage.store.run()
    assert attempt == 5
    assert "all 4 restarts within 60 minutes after a failure of this kind are used" in run.reason
    delays = [e.data["delay_s"] for e in stage.store.events() if e.data.get("action") == "restart"]
    assert delays == [0.0, 1.0, 2.0, 4.0]


def test_who_is_done_has_not_deserted(tmp_path: Path) -> None:
    """What they have left behind says so, although nobody has heard of the last step."""
    stage = Stage(tmp_path)
    stage.start()
    (stage.store.paths.root / "final.json").write_text(json.dumps({"step": 20, "weights_digest": "d"}))
    desert(stage, 1, 19)
    assert stage.state() is RunState.SUCCEEDED
    assert stage.store.run().failures == ()


def test_a_successor_knows_that_they_were_asked_and_that_it_was_taken_back(tmp_path: Path) -> None:
    stage = small(tmp_path)
    train(stage, 1, 6, copies_every=1)
    come_back(stage)
    assert asked(stage)
    stage.backend.alive.pop("b")
    stage.gang.say("agent_lost", "b", why="silent")
    stage.turn(2)
    assert not asked(stage)
    append_line(stage.store.paths.metrics, json.dumps({"attempt": 2, "step": 6, "time": 1.0}).encode() + b"\n")
    stage.lock.release()
    stage.renew()
    stage.gang = Survivors(stage.clock)
    stage.controller.gang = cast(Gang, stage.gang)
    adoption.begin(stage.controller)
    leave(stage, 2, 10)
    run = stage.store.run()
    assert run.attempts[1].cause == IN_VAIN
    assert [fall.kind for fall in run.failures] == ["node_lost"]

"""A controller that comes while its predecessor writes its last line: the log has one meaning, and no line too many."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from launcher import adoption
from launcher.gang import Gang
from launcher.phase import Phase
from launcher.run import EventKind, RunState
from tests.support.fakes import FakeGang
from tests.support.stage import Stage

WISH = {"overrides": [], "changes": [], "id": "w"}
ENDS: dict[EventKind, dict[str, Any]] = {
    EventKind.RUN_SUCCEEDED: {"step": 20},
    EventKind.RUN_FAILED: {"reason": "all restarts are used"},
    EventKind.RUN_CANCELLED: {"reason": "cancelled on request"},
}


class Live(FakeGang):
    """Agents that still hold the first attempt."""

    held = 1

    def connect(self, addresses: Any) -> None:
        if not self.calls:
            self.calls.append(("connect", "all"))
            for node in "ab":
                self.say("agent_up", node, attempt=self.held, ranks=[{"rank": 0, "pid": 1, "exited": None}])

    def kill(self, attempt: int, grace_s: float = 0.0) -> None:
        super().kill(attempt, grace_s)
        for node in "ab":
            self.say("killed", node, attempt=attempt)


def successor(root: Path, *, live: bool) -> Stage:
    """A second controller that has read the log, and has not written yet."""
    stage = Stage(root)
    stage.start()
    stage.lock.release()
    stage.renew()
    if live:
        stage.gang = Live(stage.clock)
        stage.controller.gang = cast(Gang, stage.gang)
    return stage


def news(stage: Stage, before: int) -> list[EventKind]:
    return stage.kinds()[before:]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("end", sorted(ENDS))
def test_a_run_that_ends_at_the_last_moment_has_ended(tmp_path: Path, end: EventKind, live: bool) -> None:
    stage = successor(tmp_path, live=live)
    stage.store.append(end, epoch=1, attempt=1, **ENDS[end])
    before = len(stage.kinds())
    adoption.begin(stage.controller)
    assert stage.controller.phase is Phase.END
    assert news(stage, before) == [EventKind.CONTROLLER_STARTED]
    assert stage.controller.follow().terminal
    assert stage.backend.released == 1
    assert ("shutdown",) in stage.gang.calls


@pytest.mark.parametrize("live", [False, True])
def test_what_has_succeeded_at_the_last_moment_is_not_resumed(tmp_path: Path, live: bool) -> None:
    stage = successor(tmp_path, live=live)
    stage.store.append(EventKind.RUN_SUCCEEDED, epoch=1, attempt=1, step=20)
    adoption.begin(stage.controller, resume=WISH)
    assert stage.controller.follow() is RunState.SUCCEEDED
    assert EventKind.RESUME_REQUESTED not in stage.kinds()


@pytest.mark.parametrize("live", [False, True])
def test_a_persons_resume_goes_on_with_what_has_failed_at_the_last_moment(tmp_path: Path, live: bool) -> None:
    stage = successor(tmp_path, live=live)
    stage.store.append(EventKind.RUN_FAILED, epoch=1, attempt=1, reason="all restarts are used")
    before = len(stage.kinds())
    adoption.begin(stage.controller, resume=WISH)
    assert news(stage, before) == [EventKind.CONTROLLER_STARTED, EventKind.RESUME_REQUESTED]
    assert stage.store.events()[before].data["adopted"] is live, "so it seemed"
    assert bool([call for call in stage.gang.calls if call[0] == "kill"]) is live
    for node in stage.backend.alive:
        stage.gang.say("agent_up", node, attempt=0, ranks=[])
    stage.start()
    run = stage.store.run()
    assert (run.state, run.attempts[-1].number, run.attempts[-1].reason) == (RunState.RUNNING, 2, "resume")


def test_a_gang_that_was_stopped_at_the_last_moment_is_not_adopted(tmp_path: Path) -> None:
    stage = successor(tmp_path, live=True)
    stage.store.append(EventKind.GANG_STOPPED, epoch=1, attempt=1, cause="a rank fell", failure="rank_killed")
    before = len(stage.kinds())
    adoption.begin(stage.controller)
    assert news(stage, before) == [EventKind.CONTROLLER_STARTED]
    assert [call for call in stage.gang.calls if call[0] == "kill"] == [("kill", 1, 0.0)]
    assert (stage.controller.phase, stage.controller.start_reason) == (Phase.GATHER, "restart")

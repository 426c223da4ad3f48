"""A controller that comes while its predecessor writes its last line: the log has one meaning, and no line too many."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from launcher import adoption
from launcher.gang import Gang
from launcher.observation import Observation
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
    ranks: Mapping[str, Sequence[int]] = {"a": (0, 1), "b": (2, 3)}
    running = True  # else the agents wait for their pools

    def connect(self, addresses: Any) -> None:
        if not self.calls:
            self.calls.append(("connect", "all"))
            for node, ranks in self.ranks.items():
                told = [{"rank": rank, "pid": 100 + rank if self.running else 0, "exited": None} for rank in ranks]
                self.say("agent_up", node, attempt=self.held if ranks else 0, ranks=told)

    def kill(self, attempt: int, grace_s: float = 0.0) -> None:
        super().kill(attempt, grace_s)
        for node in "ab":
            self.say("killed", node, attempt=attempt)


def succeed(stage: Stage) -> None:
    """Another controller comes, and the gang of the one before goes on."""
    stage.lock.release()
    stage.renew()
    stage.gang = Live(stage.clock)
    stage.controller.gang = cast(Gang, stage.gang)


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
    assert news(stage, before) == [EventKind.CONTROLLER_STARTED, EventKind.DECISION], "nobody has decided yet"
    assert [call for call in stage.gang.calls if call[0] == "kill"] == [("kill", 1, 0.0)]
    assert (stage.controller.phase, stage.controller.start_reason) == (Phase.GATHER, "restart")


def ordered(root: Path, **live: Any) -> Stage:
    """The first controller was killed when ranks were ordered, before it had heard of any; a second one looks."""
    stage = Stage(root)
    stage.turn(2)
    stage.lock.release()
    stage.renew()
    assert not stage.store.paths.ranks(1).exists()
    gang = Live(stage.clock)
    for name, value in live.items():
        setattr(gang, name, value)
    stage.gang, stage.controller.gang = gang, cast(Gang, gang)
    return stage


def remembered(stage: Stage, node: str, ranks: Sequence[int]) -> None:
    """An agent tells that its ranks run."""
    stage.gang.say("spawned", node, attempt=1, ranks=[{"rank": rank, "pid": 100 + rank} for rank in ranks])


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("wish", [None, WISH])
def test_ranks_of_which_nothing_was_heard_are_adopted(tmp_path: Path, wish: Any, running: bool) -> None:
    stage = ordered(tmp_path, running=running)
    adoption.begin(stage.controller, resume=wish)
    assert stage.controller.phase is Phase.RUN
    assert not [call for call in stage.gang.calls if call[0] in ("spawn", "kill")]
    assert stage.state() is RunState.STARTING
    remembered(stage, "a", (0, 1))
    stage.report("a", "training", 1, rank=0, step=1)
    stage.turn()
    assert EventKind.RANKS_SPAWNED not in stage.kinds()
    remembered(stage, "b", (2, 3))
    stage.report("a", "step", 1, rank=0, step=3)
    stage.turn()
    assert stage.kinds()[-2:] == [EventKind.RANKS_SPAWNED, EventKind.TRAINING_STARTED]
    assert [row["pid"] for row in json.loads(stage.store.paths.ranks(1).read_text())] == [100, 101, 102, 103]
    run = stage.store.run()
    assert (run.state, len(run.attempts), run.restarts, run.steps_lost) == (RunState.RUNNING, 1, 0, 0)
    remembered(stage, "a", (0, 1))
    stage.turn()
    assert stage.kinds().count(EventKind.RANKS_SPAWNED) == 1


@pytest.mark.parametrize("ranks", [{"a": (0, 1), "b": ()}, {"a": (0, 1), "b": (2,)}, {"a": (0, 1)}])
def test_half_a_gang_is_not(tmp_path: Path, ranks: dict[str, tuple[int, ...]]) -> None:
    """The word had not come to all nodes."""
    stage = ordered(tmp_path, ranks=ranks)
    adoption.begin(stage.controller)
    assert ("kill", 1, 0.0) in stage.gang.calls
    assert stage.store.run().attempts[0].ended is not None


def test_what_was_on_disk_and_not_in_the_log_is_told(tmp_path: Path) -> None:
    """The controller fell between writing the table of the ranks and recording that they run."""
    stage = Stage(tmp_path)
    stage.turn(2)
    stage.store.write_ranks(1, [{"rank": r, "node": n, "pid": 100 + r} for n, rs in Live.ranks.items() for r in rs])
    succeed(stage)
    adoption.begin(stage.controller)
    assert stage.controller.phase is Phase.RUN
    for node, ranks in Live.ranks.items():
        remembered(stage, node, ranks)
    stage.turn()
    assert EventKind.RANKS_SPAWNED in stage.kinds()


def test_a_checkpoint_that_failed_is_told_once_whatever_clock_is_set_beside(tmp_path: Path) -> None:
    """The next controller finds that of the node to be off by another time: its own host's is."""
    stage = Stage(tmp_path)
    stage.start()
    stage.gang.say("agent_up", "a", attempt=1, ahead_s=300.0, within_s=0.0)
    stage.turn()
    said = {"kind": "unsaved", "rank": 0, "attempt": 1, "reason": "no answer", "stall_s": 60.0}
    failed, again = (
        Observation(kind="report", node="a", time=time, data={"time": time, "step": 8, **said}) for time in (5.0, 7.0)
    )
    stage.gang.queue.append(failed)
    stage.turn()
    succeed(stage)
    connect = stage.gang.connect

    def meet(addresses: Any) -> None:
        connect(addresses)
        for seen in stage.gang.queue:
            seen.data.update(ahead_s=60.0, within_s=0.0)
        stage.gang.queue += [failed, again]

    stage.gang.connect = meet  # type: ignore[method-assign]
    adoption.begin(stage.controller)
    stage.turn()
    told = [event.data for event in stage.store.events() if event.kind is EventKind.CHECKPOINT_FAILED]
    assert [one["told"] for one in told] == [5.0, 7.0]

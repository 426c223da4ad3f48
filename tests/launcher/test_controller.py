"""The controller, stepped by hand: a queue of observations in, the state and the calls after each step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from jobs.checkpoint.layout import place_of
from launcher import adoption
from launcher.gang import Gang
from launcher.lock import ControllerLock
from launcher.logbook import Fenced
from launcher.observation import Observation
from launcher.phase import Phase
from launcher.run import EventKind, RunState
from launcher.store import create_exclusive
from launcher.supervise import request_cancel
from strategies.errors import ResumeRefused
from tests.support.checkpoints import write_checkpoint
from tests.support.fakes import FakeGang, tiny_request
from tests.support.stage import Stage


def test_start_and_success(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    assert stage.state() is RunState.RUNNING
    assert ("spawn", 1, {"a": [0, 1], "b": [2, 3]}) in stage.gang.calls
    assert [env["NODE_RANK"] for env in stage.gang.environments] == ["0", "0", "1", "1"]
    ranks = json.loads(stage.store.paths.ranks(1).read_text())
    assert ranks[3] == {"rank": 3, "node": "b", "pid": 103, "coordinates": {"pipe": 1, "data": 0, "model": 1}}
    for rank in range(4):
        stage.report("ab"[rank // 2], "step", 1, rank=rank, step=20)
        stage.gang.say("exit", "ab"[rank // 2], rank=rank, attempt=1, code=0, signal=None)
    stage.turn()
    assert stage.state() is RunState.SUCCEEDED
    assert stage.controller.phase is Phase.END
    assert stage.backend.released == 1
    assert ("shutdown",) in stage.gang.calls
    assert stage.store.run().step == 20


def test_lost_node_takes_the_spare_in_its_place(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.report("a", "step", 1, rank=0, step=7)
    stage.gang.say("agent_lost", "a", why="connection closed")
    stage.turn()
    assert stage.state() is RunState.RECOVERING
    assert ("kill", 1, 0.0) in stage.gang.calls
    assert stage.controller.phase is Phase.STOP
    stage.gang.say("killed", "b", attempt=1)
    stage.start()
    assert ("spawn", 2, {"c": [0, 1], "b": [2, 3]}) in stage.gang.calls
    run = stage.store.run()
    assert run.state is RunState.RUNNING
    assert run.attempts[0].cause == "node a was lost: connection closed"
    assert run.steps_lost == 7
    assert run.restarts == 1


def test_the_next_attempt_is_ordered_in_the_turn_that_ends_the_last(tmp_path: Path) -> None:
    """Nothing more will be seen until ranks run again: waiting for something to be seen would be lost time."""
    stage = Stage(tmp_path)
    stage.start()
    stage.gang.say("exit", "b", rank=3, attempt=1, code=None, signal=9)
    stage.turn()
    for node in "ab":
        stage.gang.say("killed", node, attempt=1)
    stage.turn()
    assert [call[1] for call in stage.gang.calls if call[0] == "spawn"] == [1, 2]


def test_peers_of_a_killed_rank_are_not_the_culprit(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.report("b", "error", 1, rank=2, type="RuntimeError", message="Connection closed by peer", step=3)
    stage.gang.say("exit", "b", rank=2, attempt=1, code=1, signal=None, log_tail="")
    stage.turn()
    stage.gang.say("exit", "a", rank=1, attempt=1, code=None, signal=9, log_tail="")
    stage.gang.say("exit", "a", rank=0, attempt=1, code=None, signal=9, log_tail="", requested=True)
    stage.gang.say("killed", "a", attempt=1)
    stage.gang.say("killed", "b", attempt=1)
    stage.turn()
    cause = stage.store.run().attempts[0].cause
    assert cause == "rank 1 on a was ended by signal 9"


def fail_with(stage: Stage, attempt: int, message: str, step: int) -> None:
    stage.report("a", "error", attempt, rank=0, type="ValueError", message=message, traceback="t", step=step)
    stage.gang.say("exit", "a", rank=0, attempt=attempt, code=1, signal=None, log_tail="")
    stage.gang.say("killed", "a", attempt=attempt)
    stage.gang.say("killed", "b", attempt=attempt)
    stage.turn(2)


def test_same_error_at_same_step_stops(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    fail_with(stage, 1, "bad sample", 5)
    assert not stage.state().terminal
    stage.start()
    fail_with(stage, 2, "bad sample", 5)
    run = stage.store.run()
    assert run.state is RunState.FAILED
    assert "same error at the same step 2 times" in run.reason
    assert "bad sample" in run.reason


def test_same_error_at_other_step_goes_on(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    fail_with(stage, 1, "bad sample", 5)
    stage.start()
    fail_with(stage, 2, "bad sample", 6)
    assert not stage.state().terminal


def test_budget_is_counted_and_backoff_grows(tmp_path: Path) -> None:
    stage = Stage(tmp_path, max_restarts=2, backoff_s=4.0)
    for attempt in (1, 2, 3):
        if attempt == 3:
            assert stage.controller.phase is Phase.BACKOFF
            stage.clock.now += 4.0
            stage.turn()
        stage.start()
        fail_with(stage, attempt, f"error {attempt}", attempt)
    run = stage.store.run()
    assert run.state is RunState.FAILED
    assert "all 2 restarts are used" in run.reason


def test_no_node_left_fails_with_the_reason(tmp_path: Path) -> None:
    stage = Stage(tmp_path, nodes=("a", "b"), wait_for_nodes_s=30.0, shrink=False)
    stage.start()
    stage.gang.say("agent_lost", "b", why="silent")
    stage.gang.say("killed", "a", attempt=1)
    stage.turn(40)
    assert EventKind.WAITING_FOR_NODES in stage.kinds()
    assert stage.state() is RunState.RECOVERING
    stage.turn(200)
    run = stage.store.run()
    assert run.state is RunState.FAILED
    assert "only 1 of 2 nodes" in run.reason
    assert "the cluster is small" in run.reason


def test_start_timeout(tmp_path: Path) -> None:
    stage = Stage(tmp_path, start_timeout_s=60.0)
    stage.turn(2)
    stage.clock.now += 61.0
    stage.turn()
    assert stage.gang.calls[-1] == ("dump", 1), "first they are asked where they stand"
    stage.clock.now += 4.0
    stage.turn()
    assert stage.state() is RunState.RECOVERING
    assert "no first step within 60 s" in str(stage.store.events()[-1].data)


def test_a_gang_that_has_only_to_save_has_the_patience_of_a_save(tmp_path: Path) -> None:
    """It begins after the last step, so it never says that a first one has begun; the store takes its time."""
    stage = Stage(tmp_path, start_timeout_s=60.0)
    stage.turn(2)
    assert stage.controller.hangs.starting
    stage.report("a", "step", 7, rank=0, step=20, next="save")
    stage.turn()
    assert stage.controller.hangs.starting, "that was another attempt"
    for _ in range(40):
        for rank in range(4):
            stage.report("ab"[rank // 2], "step", 1, rank=rank, step=20, next="save")
        stage.turn()
        stage.clock.now += 20.0
    assert stage.state() is RunState.STARTING
    stage.clock.now += 60.0
    stage.turn()
    assert [call for call in stage.gang.calls if call[0] == "dump"] == [("dump", 1)]
    stage.clock.now += 4.0
    stage.turn()
    (failure,) = [e.data["failure"] for e in stage.store.events() if e.kind is EventKind.FAILURE_DETECTED]
    assert failure["kind"] == "hang"
    assert "while saving a checkpoint" in failure["detail"]


def test_steps_that_are_looked_at_together_take_the_time_that_each_has_taken(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    for step in range(1, 40):
        stage.clock.now += 0.01
        for rank in range(4):
            data = {"kind": "step", "rank": rank, "attempt": 1, "step": step}
            seen = Observation(kind="report", node="ab"[rank // 2], time=0.0, data=data, heard=stage.clock.now)
            stage.gang.queue.append(seen)
        if step % 5 == 0:
            stage.turn()
    present = stage.controller.hangs.present(39, stage.clock.now, save_s=0.0)
    assert present.typical_s == pytest.approx(0.01)


def test_damaged_checkpoint_is_never_tried_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.report("a", "rejected", 1, rank=0, path="/x/manifest.json", reason="digest")
    stage.gang.say("killed", "a", attempt=1)
    stage.gang.say("killed", "b", attempt=1)
    stage.turn(2)
    assert stage.store.run().rejected == {"/x/manifest.json"}


@pytest.mark.parametrize("turns", [0, 2])
def test_cancel(tmp_path: Path, turns: int) -> None:
    stage = Stage(tmp_path)
    if turns:
        stage.start()
    request_cancel(stage.store, by="test")
    stage.turn()
    if turns:
        assert ("kill", 1, stage.request.recovery.grace_s) in stage.gang.calls
        stage.gang.say("killed", "a", attempt=1)
        stage.gang.say("killed", "b", attempt=1)
        stage.turn()
    assert stage.state() is RunState.CANCELLED
    assert stage.backend.released == 1


def test_second_controller_is_refused_and_a_later_epoch_fences(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    with pytest.raises(ResumeRefused, match="live controller"):
        ControllerLock.acquire(stage.store.paths)
    create_exclusive(stage.store.paths.controllers / "2.json", b"{}")
    with pytest.raises(Fenced):
        stage.turn()


def test_what_a_predecessor_wrote_at_the_last_moment_counts_for_everybody_or_for_nobody(tmp_path: Path) -> None:
    """It had asked whether it still rules when it was stopped; its successor has read the log when it writes."""
    stage = Stage(tmp_path)
    stage.start()
    stage.lock.release()
    stage.renew()
    stage.store.append(EventKind.CHECKPOINT_COMMITTED, epoch=1, attempt=1, step=5, path="p", bytes=1, stall_s=0.0)
    adoption.begin(stage.controller)
    stage.store.append(EventKind.CHECKPOINT_COMMITTED, epoch=1, attempt=1, step=10, path="q", bytes=1, stall_s=0.0)
    stage.turn()
    assert log_reads_on(stage)
    assert stage.controller.run.committed_step == 5


def test_successor_adopts_the_live_gang(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.report("a", "checkpoint", 1, rank=0, step=5, path="p", bytes=1, stall_s=0.1)
    data = {"kind": "unsaved", "rank": 0, "attempt": 1, "step": 8, "reason": "no answer", "stall_s": 60.0}
    failed, again = (Observation(kind="report", node="a", time=time, data=data) for time in (5.0, 7.0))
    stage.gang.queue.append(failed)
    stage.turn()
    stage.lock.release()
    stage.renew()

    class OneLiveGang(FakeGang):
        def connect(self, addresses: Any) -> None:
            if not self.calls:
                self.calls.append(("connect", "all"))
                for node in "ab":
                    self.say("agent_up", node, attempt=1, ranks=[{"rank": 0, "pid": 1, "exited": None}])
                self.say("agent_up", "c", attempt=0, ranks=[])
                self.say("report", "a", kind="checkpoint", rank=0, attempt=1, step=5, path="p")
                self.say("report", "a", kind="training", rank=0, attempt=1, step=1)
                self.say("report", "a", kind="checkpoint", rank=0, attempt=1, step=10, path="q")
                self.queue += [failed, again]

    stage.gang = OneLiveGang(stage.clock)
    stage.controller.gang = cast(Gang, stage.gang)
    before = len(stage.store.events())
    adoption.begin(stage.controller)
    stage.turn()
    news = stage.store.events()[before:]
    kinds = [EventKind.CONTROLLER_STARTED, EventKind.DECISION, EventKind.CHECKPOINT_COMMITTED]
    assert [event.kind for event in news] == [*kinds, EventKind.CHECKPOINT_FAILED]
    assert news[3].data == {"step": 8, "reason": "no answer", "stall_s": 60.0, "told": 7.0}
    assert news[0].data["adopted"] is True
    assert news[1].data["action"] == "adopt"
    assert "taking it over loses 0 steps, a restart " in news[1].data["reason"]
    assert news[2].data["step"] == 10
    assert stage.store.run().attempts[-1].number == 1
    assert not [call for call in stage.gang.calls if call[0] in ("spawn", "kill")]


def test_successor_of_a_dead_gang_restarts_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller)
    stage.start()
    run = stage.store.run()
    assert run.state is RunState.RUNNING
    assert run.attempts[-1].number == 2
    assert run.attempts[-1].reason == "restart"


def test_finished_without_a_controller_is_success(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.lock.release()
    (stage.store.paths.root / "final.json").write_text(json.dumps({"step": 20, "weights_digest": "d"}))
    stage.renew()
    adoption.begin(stage.controller, resume={"overrides": [], "changes": []})
    stage.turn()
    assert stage.state() is RunState.SUCCEEDED
    assert stage.store.run().weights_digest == "d"


def log_reads_on(stage: Stage) -> bool:
    """The log still folds to what the controller believes."""
    return stage.store.run() == stage.controller.run


def test_training_that_is_reported_after_the_failure_is_no_progress(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.turn(2)
    for node, ranks in {"a": [0, 1], "b": [2, 3]}.items():
        stage.gang.say("spawned", node, attempt=1, ranks=[{"rank": r, "pid": r} for r in ranks])
    stage.gang.say("exit", "b", rank=3, attempt=1, code=None, signal=9, log_tail="")
    stage.report("a", "training", 1, rank=0, step=1)
    stage.turn()
    assert stage.state() is RunState.RECOVERING
    assert EventKind.TRAINING_STARTED not in stage.kinds()
    stage.gang.say("killed", "a", attempt=1)
    stage.gang.say("killed", "b", attempt=1)
    stage.start()
    assert stage.state() is RunState.RUNNING
    assert log_reads_on(stage)


def test_the_first_step_is_told_after_the_ranks_although_a_nodes_word_of_them_comes_later(tmp_path: Path) -> None:
    """Every node has a connection of its own, and none waits for another."""
    stage = Stage(tmp_path)
    stage.turn(2)
    stage.gang.say("spawned", "a", attempt=1, ranks=[{"rank": r, "pid": r} for r in (0, 1)])
    stage.report("a", "training", 1, rank=0, step=1)
    stage.turn()
    assert EventKind.TRAINING_STARTED not in stage.kinds()
    stage.gang.say("spawned", "b", attempt=1, ranks=[{"rank": r, "pid": r} for r in (2, 3)])
    stage.turn()
    assert stage.kinds()[-2:] == [EventKind.RANKS_SPAWNED, EventKind.TRAINING_STARTED]
    assert stage.state() is RunState.RUNNING


class LiveGang(FakeGang):
    """Agents that hold attempt 1; ``exited`` is what they say of each rank."""

    exited: Any = None

    def connect(self, addresses: Any) -> None:
        if not self.calls:
            self.calls.append(("connect", "all"))
            for node in "ab":
                self.say("agent_up", node, attempt=1, ranks=[{"rank": 0, "pid": 1, "exited": self.exited}])
            self.say("agent_up", "c", attempt=0, ranks=[])

    def kill(self, attempt: int, grace_s: float = 0.0) -> None:
        super().kill(attempt, grace_s)
        for node in "ab":
            self.say("killed", node, attempt=attempt)


def succeed(stage: Stage, gang: LiveGang) -> None:
    """A new controller for the run, over a gang of which it knows nothing."""
    stage.lock.release()
    stage.renew()
    stage.gang = gang
    stage.controller.gang = cast(Gang, gang)


def test_a_gang_that_is_being_stopped_is_not_adopted(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.gang.say("exit", "b", rank=3, attempt=1, code=None, signal=9, log_tail="")
    stage.turn()
    assert stage.state() is RunState.RECOVERING
    succeed(stage, LiveGang(stage.clock))
    adoption.begin(stage.controller)
    assert ("kill", 1, 0.0) in stage.gang.calls
    stage.start()
    run = stage.store.run()
    assert (run.state, len(run.attempts)) == (RunState.RUNNING, 2)
    assert run.attempts[0].cause == "rank 3 on b was ended by signal 9"


def test_a_gang_that_was_told_to_end_is_not_adopted(tmp_path: Path) -> None:
    """The predecessor fell after it had sent the order and before it had recorded why."""
    stage = Stage(tmp_path)
    stage.start()
    gang = LiveGang(stage.clock)
    gang.exited = {"code": None, "signal": 9, "requested": True}
    succeed(stage, gang)
    adoption.begin(stage.controller)
    stage.start()
    assert len(stage.store.run().attempts) == 2


def test_a_cause_does_not_die_with_the_controller_that_had_no_time_to_name_it(tmp_path: Path) -> None:
    """It had seen a peer complain when it fell; the rank that was the cause is what the agents remember."""
    stage = Stage(tmp_path)
    stage.start()
    stage.report("a", "error", 1, rank=0, type="RuntimeError", message="Connection closed by peer", traceback="")
    stage.gang.say("exit", "a", rank=0, attempt=1, code=1, signal=None, log_tail="")
    stage.turn()
    (seen,) = [event for event in stage.store.events() if event.kind is EventKind.FAILURE_DETECTED]
    assert seen.data["failure"]["kind"] == "secondary"
    gang = LiveGang(stage.clock)
    succeed(stage, gang)
    error = {"type": "ValueError", "message": "no such token", "traceback": "", "step": 4}
    gang.say("report", "b", kind="error", rank=3, attempt=1, **error)
    gang.say("exit", "b", rank=3, attempt=1, code=1, signal=None, log_tail="")
    adoption.begin(stage.controller)
    stage.start()
    first = stage.store.run().attempts[0]
    assert first.cause == "rank 3 on b failed at step 4: ValueError: no such token"
    kept = json.loads(stage.store.paths.errors(1).read_text())
    assert [group["kind"] for group in kept] == ["rank_error", "secondary"]


def test_a_node_that_went_with_the_controller_is_named(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()

    class HalfAGang(LiveGang):
        def connect(self, addresses: Any) -> None:
            super().connect(addresses)
            self.queue = [seen for seen in self.queue if seen.node != "b"]

    succeed(stage, HalfAGang(stage.clock))
    adoption.begin(stage.controller)
    stage.turn()
    run = stage.store.run()
    assert run.attempts[0].cause == "node b was gone when a new controller came"
    assert [(one.kind, one.node) for one in run.failures] == [("node_lost", "b")]


def test_a_blow_up_that_nobody_recorded_still_leaves_its_samples_out(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    gang = LiveGang(stage.clock)
    gang.exited = {"code": None, "signal": 9, "requested": True}
    succeed(stage, gang)
    gang.say("report", "a", kind="blow_up", rank=1, attempt=1, step=7, why="the loss is nan", samples=2)
    adoption.begin(stage.controller)
    stage.start()
    assert [(skip.step, skip.samples) for skip in stage.store.run().skips] == [(7, 2)]


def test_a_successor_after_the_end_gives_everything_back_and_leaves(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.controller.record(EventKind.RUN_FAILED, reason="x")
    succeed(stage, LiveGang(stage.clock))
    before = stage.kinds()
    adoption.begin(stage.controller)
    assert stage.controller.phase is Phase.END
    assert stage.backend.released == 1
    assert stage.kinds() == before


def test_an_adopted_gang_that_never_begins_is_restarted(tmp_path: Path) -> None:
    stage = Stage(tmp_path, start_timeout_s=60.0)
    stage.turn(2)
    for node, ranks in {"a": [0, 1], "b": [2, 3]}.items():
        stage.gang.say("spawned", node, attempt=1, ranks=[{"rank": r, "pid": r} for r in ranks])
    stage.turn()
    succeed(stage, LiveGang(stage.clock))
    adoption.begin(stage.controller)
    assert stage.controller.phase is Phase.RUN
    stage.clock.now += 61
    stage.turn()
    stage.clock.now += 4
    stage.turn()
    assert stage.state() is RunState.RECOVERING


def test_who_had_an_exit_code_of_its_own_fell_before_the_order(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.gang.say(
        "exit",
        "b",
        rank=2,
        attempt=1,
        code=1,
        signal=None,
        log_tail="Traceback (most recent call last)\nE: closed by peer",
    )
    stage.turn()
    tail = "Traceback (most recent call last)\n  x\nValueError: mine"
    stage.gang.say("exit", "a", rank=1, attempt=1, code=1, signal=None, requested=True, log_tail=tail)
    stage.gang.say("killed", "a", attempt=1)
    stage.gang.say("killed", "b", attempt=1)
    stage.turn()
    assert "ValueError: mine" in str(stage.store.run().attempts[0].cause)


def test_an_agent_that_comes_late_gives_up_the_ranks_of_an_old_attempt(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.gang.say("agent_up", "z", attempt=7, ranks=[{"rank": 0, "pid": 1, "exited": None}])
    stage.turn()
    assert ("kill", 7, 0.0) in stage.gang.calls


def test_a_node_that_said_goodbye_was_not_lost(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.gang.say("leaving", "b", reason="SIGTERM")
    stage.gang.say("agent_lost", "b", why="closed")
    stage.gang.say("killed", "a", attempt=1)
    stage.turn(2)
    assert stage.store.run().attempts[0].cause == "node b is leaving: SIGTERM"


def test_the_same_error_under_another_token_is_the_same(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    for attempt in (1, 2):
        stage.start()
        fail_with(stage, attempt, f"no space left: checkpoints/step-00000005/e0001-a000{attempt}/shard", 5)
    assert "same error at the same step 2 times" in stage.store.run().reason


def test_a_spare_that_comes_while_the_gang_runs_is_made_ready(tmp_path: Path) -> None:
    stage = Stage(tmp_path, nodes=("a", "b"))
    stage.start()
    stage.backend.alive["c"] = "c-0"
    stage.clock.now += 5.0
    stage.turn(2)
    assert ("connect", "c-0") in stage.gang.calls
    assert "c" in stage.controller.muster.up


def test_a_manifest_that_cannot_be_read_is_named_in_the_log(tmp_path: Path) -> None:
    request = tiny_request(tmp_path)
    folder = Path(request.run_dir) / "checkpoints" / "step-00000005"
    stage = Stage(tmp_path)
    folder.mkdir(parents=True)
    manifest = folder / "e0001-a0001.manifest.json"
    manifest.write_text("{}")
    stage.start()
    (rejected,) = [event for event in stage.store.events() if event.kind is EventKind.CHECKPOINT_REJECTED]
    assert rejected.data["path"] == str(manifest)
    assert rejected.data["reason"]
    assert stage.store.run().attempts[0].first_step == 1


def test_a_checkpoint_of_which_a_file_is_missing_costs_no_attempt(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    root = stage.store.paths.checkpoint_dir
    older, torn, gone = (write_checkpoint(root, step) for step in (5, 8, 10))
    place_of(gone).shard(1).unlink()
    place_of(torn).shard(0).write_bytes(b"half of it")
    stage.start()
    rejected = [event.data for event in stage.store.events() if event.kind is EventKind.CHECKPOINT_REJECTED]
    assert [one["path"] for one in rejected] == [str(gone), str(torn)]
    assert ["is missing" in rejected[0]["reason"], "bytes instead of" in rejected[1]["reason"]] == [True, True]
    (first,) = stage.store.run().attempts
    assert (first.resume_from, first.first_step) == (str(older), 6)

"""Shrink, grow, wait or give up: the controller stepped by hand, on a cluster that is too small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from jobs.spec import JobSpec
from launcher import adoption
from launcher.account import CLASSES
from launcher.config import compose
from launcher.departure import FOR_MORE as LEFT
from launcher.departure import IN_VAIN
from launcher.describe import brief, describe
from launcher.gang import Gang
from launcher.ledger import account, ledger
from launcher.phase import Phase
from launcher.render_events import event_line
from launcher.request import RecoverySpec
from launcher.run import EventKind, Run, RunEvent, RunState
from launcher.shortage import Lapse, Shortage
from launcher.sizing import UNKNOWN_S, Sizing, plan_of
from launcher.store import RunStore
from launcher.supervise import request_cancel
from strategies.codec import from_json
from strategies.ramp import Ramp
from tests.support.fakes import FakeClock, FakeGang, tiny_request
from tests.support.stage import Stage

TWO = ("a", "b")


def lapsed(seconds: float) -> Lapse:
    """It was waited for so long, and things were so all the time."""
    return Lapse(waited_s=seconds, idle_s=seconds, barren_s=seconds)


def lose(stage: Stage, node: str, *, left: tuple[str, ...], attempt: int = 1) -> None:
    """A node of the gang is lost, and what is left of the gang is stopped."""
    stage.backend.alive.pop(node, None)
    stage.gang.say("agent_lost", node, why="silent")
    for other in left:
        stage.gang.say("killed", other, attempt=attempt)
    stage.turn(2)


def shrunk(root: Path, **recovery: Any) -> Stage:
    """A run of two nodes that goes on with one."""
    stage = Stage(root, nodes=TWO, **{"spares": 0, "shrink_after_s": 10.0, **recovery})
    stage.start()
    stage.report("a", "step", 1, rank=0, step=7)
    lose(stage, "b", left=("a",))
    stage.turn(60)
    stage.start()
    return stage


def come_back(stage: Stage, node: str = "b", incarnation: str = "b-1") -> None:
    """A node is there again, and the controller has noticed."""
    stage.backend.alive[node] = incarnation
    stage.clock.now += 5.0
    stage.turn(2)
    stage.gang.say("pool", node, state="ready", reason="")
    stage.turn()


def decisions(stage: Stage) -> list[tuple[str, str]]:
    """Every decision with its reason."""
    return [(e.data["action"], e.data["reason"]) for e in stage.store.events() if e.kind is EventKind.DECISION]


def leave(stage: Stage, attempt: int, step: int, node: str = "a", ranks: int = 2) -> None:
    """The ranks have made a checkpoint and have left."""
    stage.report(node, "step", attempt, rank=0, step=step)
    stage.report(node, "checkpoint", attempt, rank=0, step=step, path=f"step-{step}", bytes=1, stall_s=0.1)
    for rank in range(ranks):
        stage.gang.say("exit", node, rank=rank, attempt=attempt, code=0, signal=None)
    stage.turn()
    stage.gang.say("killed", node, attempt=attempt)
    stage.turn()


@pytest.fixture(autouse=True)
def _points(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest checkpoint is the newest that was reported."""
    from launcher import progress

    def on_disk(paths: Any, **ignored: Any) -> progress.OnDisk:
        steps = [int(e.data["step"]) for e in RunStore(paths.root).events() if e.kind is EventKind.CHECKPOINT_COMMITTED]
        newest = progress.ResumePoint(path=f"step-{max(steps)}", step=max(steps)) if steps else progress.ResumePoint()
        return progress.OnDisk(point=newest)

    monkeypatch.setattr(progress, "on_disk", on_disk)


def test_waits_first_and_then_goes_on_with_one_node(tmp_path: Path) -> None:
    stage = Stage(tmp_path, nodes=TWO, spares=0, shrink_after_s=10.0)
    stage.start()
    lose(stage, "b", left=("a",))
    stage.turn(45)  # 0.2 s each
    assert stage.controller.phase is Phase.GATHER
    assert EventKind.WAITING_FOR_NODES in stage.kinds()
    stage.turn(10)
    stage.start()
    assert ("spawn", 2, {"a": [0, 1]}) in stage.gang.calls
    action, reason = decisions(stage)[-1]
    assert action == "shrink"
    assert "1 of 2 nodes are there after 10 s: the cluster is small" in reason
    assert "going on as TP2 ZeRO-1, micro-batch 1 x 2 on 1 node" in reason
    run = stage.store.run()
    assert run.state is RunState.RUNNING
    second = run.attempts[1]
    assert plan_of(second) == replace(stage.request.job.plan, pp=1, stages=(2,))
    assert second.wanted == run.attempts[0].plan
    assert run.attempts[0].wanted is None
    assert stage.store.request().job.plan == stage.request.job.plan
    job = json.loads(stage.store.paths.job(2).read_text())
    assert job["plan"] == second.plan
    assert job["deepspeed"]["gradient_accumulation_steps"] == 2
    assert "pipeline" not in job["deepspeed"]
    ranks = json.loads(stage.store.paths.ranks(2).read_text())
    assert [row["coordinates"] for row in ranks] == [{"pipe": 0, "data": 0, "model": m} for m in (0, 1)]


def test_a_batch_that_grows_goes_on_growing_under_the_smaller_plan(tmp_path: Path) -> None:
    """Two replicas become one: every step has the samples that it would have had, in twice as many micro-batches."""
    stage = Stage(tmp_path, nodes=TWO, spares=0, shrink_after_s=10.0)
    job = stage.request.job
    batch = replace(job.batch, global_batch=8, ramp=Ramp(start=2, increment=2, samples=30))
    plan = replace(job.plan, pp=1, stages=(2,), dp=2, grad_accum=4)
    stage.request = replace(stage.request, job=replace(job, plan=plan, batch=batch))
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller)
    stage.start()
    stage.report("a", "step", 1, rank=0, step=7)
    lose(stage, "b", left=("a",))
    stage.turn(60)
    stage.start()
    second = from_json(JobSpec, json.loads(stage.store.paths.job(2).read_text()))
    assert (second.plan.tp, second.plan.dp, second.plan.grad_accum) == (2, 1, 8)
    assert second.batch == batch
    wanted, found = stage.request.job.schedule(), second.schedule()
    assert [found.batch_at(step) for step in (1, 7, 30)] == [2, 4, 8]
    for step in range(1, 30):
        assert found.step_range(step) == wanted.step_range(step)
        assert found.micro_batches(step, second.plan) == 2 * wanted.micro_batches(step, plan)


def test_a_spare_is_better_than_a_smaller_plan(tmp_path: Path) -> None:
    stage = Stage(tmp_path, nodes=("a", "b", "c"), shrink_after_s=0.0)
    stage.start()
    lose(stage, "b", left=("a",))
    stage.start()
    assert ("spawn", 2, {"a": [0, 1], "c": [2, 3]}) in stage.gang.calls


@pytest.mark.parametrize(
    ("recovery", "because"),
    [({"shrink": False}, "recovery.shrink=false"), ({"min_nodes": 2}, "recovery.min_nodes=2")],
)
def test_without_a_smaller_plan_it_waits_and_then_fails_with_the_reason(
    tmp_path: Path, recovery: dict[str, Any], because: str
) -> None:
    stage = Stage(tmp_path, nodes=TWO, spares=0, shrink_after_s=1.0, wait_for_nodes_s=30.0, **recovery)
    stage.start()
    lose(stage, "b", left=("a",))
    stage.turn(100)
    assert stage.state() is RunState.RECOVERING
    stage.turn(60)
    run = stage.store.run()
    assert run.state is RunState.FAILED
    assert "only 1 of 2 nodes came within 30 s: the cluster is small" in run.reason
    assert because in run.reason
    assert len(run.attempts) == 1


def test_no_node_at_all_is_no_plan(tmp_path: Path) -> None:
    stage = Stage(tmp_path, nodes=TWO, spares=0, shrink_after_s=0.0, wait_for_nodes_s=30.0)
    stage.start()
    stage.gang.say("agent_lost", "a", why="silent")
    lose(stage, "b", left=())
    stage.backend.alive.clear()
    stage.turn(200)
    assert stage.state() is RunState.FAILED
    assert "only 0 of 2 nodes" in stage.store.run().reason


def wait(stage: Stage, seconds: float) -> None:
    stage.clock.now += seconds
    stage.turn()


def blink(stage: Stage, node: str, seconds: float) -> None:
    """An agent is away for so long."""
    gone = stage.backend.alive[node]
    stage.gang.say("agent_lost", node, why="silent")
    wait(stage, seconds)
    stage.backend.alive[node] = f"{gone}+"
    stage.gang.say("agent_up", node, attempt=0, ranks=[], incarnation=f"{gone}+")
    stage.turn()


@pytest.mark.parametrize("flaps", [0, 1, 10])
def test_patience_is_counted_through_a_blink_and_the_end_from_the_last_node(tmp_path: Path, flaps: int) -> None:
    """All nodes are lost, one is there after 250 s: it is waited 300 s more, whether or not its agent connects anew."""
    stage = Stage(tmp_path, nodes=TWO, spares=0, shrink_after_s=300.0, wait_for_nodes_s=300.0)
    stage.start()
    stage.gang.say("agent_lost", "a", why="silent")
    lose(stage, "b", left=())
    stage.backend.alive.clear()
    wait(stage, 249.0)
    stage.backend.alive["a"] = "a-1"
    wait(stage, 5.0)
    stage.turn()
    for _ in range(flaps):
        wait(stage, 22.0)
        blink(stage, "a", 1.0)
        assert stage.state() is RunState.RECOVERING
    wait(stage, 22.0 * (10 - flaps) + 20.0)
    assert [action for action, _ in decisions(stage)] == ["restart", "wait"]
    wait(stage, 60.0)
    assert [action for action, _ in decisions(stage)] == ["restart", "wait", "shrink"]


def test_a_node_that_was_away_for_longer_has_only_begun_to_come() -> None:
    clock = FakeClock()
    shortage = Shortage(clock, blip_s=5.0)
    seen = []
    for after_s, possible in [(10, False), (0, True), (20, True), (1, False), (4, True), (1, False), (6, True)]:
        clock.now += after_s
        seen.append(shortage.lapse(possible=possible, enough=False))
    assert [one.waited_s for one in seen] == [10, 10, 30, 31, 35, 36, 42]
    assert [one.idle_s for one in seen] == [0, 0, 20, 0, 25, 0, 0]
    assert [one.barren_s for one in seen] == [10, 0, 0, 0, 0, 0, 0]


def test_while_no_node_is_missing_none_is_waited_for() -> None:
    """All are there for 100 s, and the checkpoints are not; then one goes."""
    clock = FakeClock()
    shortage = Shortage(clock, blip_s=5.0)
    seen = []
    for after_s, enough in [(0, False), (10, False), (10, True), (100, True), (1, False), (10, False)]:
        clock.now += after_s
        seen.append(shortage.lapse(possible=True, enough=enough).idle_s)
    assert seen == [0, 10, 0, 0, 1, 11]


def test_nothing_legal_is_a_reason(tmp_path: Path) -> None:
    request = tiny_request(tmp_path)
    job = replace(request.job, plan=replace(request.job.plan, cp=2))  # modelled only, at any size
    sizing = Sizing(replace(request, job=job, recovery=replace(request.recovery, wait_for_nodes_s=5.0)))
    assert sizing.need == 4
    assert sizing.largest(1) is None
    stage = Stage(tmp_path / "other")
    stage.start()
    answer = sizing.choose(stage.store.run(), up=1, lapse=lapsed(6.0), resumed=False, why=lambda: "it burned")
    assert answer.plan is None
    assert answer.decision is not None
    assert answer.decision.reason.endswith("it burned; no smaller plan is used: none is legal there")


def test_a_script_never_shrinks(tmp_path: Path) -> None:
    request = tiny_request(tmp_path, shrink_after_s=0.0)
    assert Sizing(replace(request, job=replace(request.job, kind="script", command="x"))).largest(1) is None
    assert Sizing(request).largest(1) is not None


def test_the_first_attempt_is_never_smaller(tmp_path: Path) -> None:
    stage = Stage(tmp_path, nodes=("a",), spares=0, shrink_after_s=0.0, wait_for_nodes_s=5.0)
    stage.turn(40)
    run = stage.store.run()
    assert (run.state, run.attempts) == (RunState.FAILED, ())
    assert run.reason.startswith("only 1 of 2 nodes came within 5 s")
    assert "smaller" not in run.reason


def test_patience_follows_from_what_a_restart_takes(tmp_path: Path) -> None:
    """A restart takes 30 s, and one node does three quarters of the work of two, whose pipeline has bubbles."""
    stage = Stage(tmp_path)
    stage.start()
    run = stage.store.run()
    attempt = replace(run.attempts[0], started=100.0, trained=130.0)
    run = replace(run, attempts=(attempt,))

    def patience(run: Run = run, resumed: bool = False, **recovery: Any) -> tuple[float, str]:
        """Seconds from which on it goes on with the smaller plan, to a tenth; and why, as people are told."""
        sizing = Sizing(replace(stage.request, recovery=replace(stage.request.recovery, **recovery)))
        for tenths in range(10000):
            answer = sizing.choose(run, up=1, lapse=lapsed(tenths / 10), resumed=resumed, why=lambda: "")
            if answer.plan is not None:
                assert answer.decision is not None
                return tenths / 10, answer.decision.reason
        raise AssertionError("never")

    def restarted(*seconds: float) -> Run:
        more = [replace(attempt, number=n, reason="restart", trained=100 + s) for n, s in enumerate(seconds, 2)]
        return replace(run, attempts=(attempt, *more))

    words = "TP2 ZeRO-1, micro-batch 1 x 2 would make 75% of the steps per second"
    thirty = (
        f"{words} and one more restart of 30.0 s later, to grow back: waiting is cheaper up to 30.0 s / 0.75 = 40.0 s"
    )
    seconds, why = patience()
    assert seconds == 40.0
    assert why.endswith(thirty)
    assert patience(restarted(12.0))[0] == 16.0  # a restart is no first start
    seconds, why = patience(restarted(2.0))
    assert seconds == 10.0
    assert why.endswith("/ 0.75 = 2.7 s (decided by recovery.detect_s + 5 s: its agent may come up again)")
    assert patience(restarted(2.0), detect_s=20.0)[0] == 25.0
    assert patience(restarted(2.0), shrink_after_s=3.0)[0] == 3.0
    assert patience(restarted(2.0, 60.0, 240.0))[0] == 80.0
    seconds, why = patience(restarted(240.0))
    assert seconds == 300.0  # never longer than the patience with anything else
    assert why.endswith("/ 0.75 = 320.0 s (decided by recovery.wait_for_nodes_s=300)")
    seconds, why = patience(shrink_after_s=12.0)
    assert seconds == 12.0
    assert why.endswith(f"{thirty} (decided by recovery.shrink_after_s=12)")
    seconds, why = patience(resumed=True)
    assert seconds == 60.0
    assert why.endswith(f"{thirty} (decided by the resume: nodes have only begun to come)")
    assert patience(restarted(60.0), resumed=True)[0] == 80.0
    assert patience(resumed=True, shrink_after_s=3.0)[0] == 3.0
    seconds, why = patience(replace(run, attempts=(replace(attempt, trained=None),)))
    assert seconds == UNKNOWN_S == 60.0
    assert why.endswith(f"{words}; what a restart takes is not known yet")


@pytest.mark.parametrize(
    ("ended", "idle_from", "epoch", "takes_s"),
    [
        (88.0, None, 1, 42.0),
        (88.0, 90.0, 1, 32.0),  # then nodes were waited for, or it backed off
        (48.0, None, 2, 30.0),  # a controller fell meanwhile
        (None, None, 1, 30.0),
    ],
)
def test_a_restart_begins_when_the_ranks_have_ended(
    tmp_path: Path, ended: float | None, idle_from: float | None, epoch: int, takes_s: float
) -> None:
    stage = Stage(tmp_path)
    stage.start()
    run = stage.store.run()
    first = replace(run.attempts[0], started=1.0, trained=2.0, ended=ended, idle_from=idle_from)
    second = replace(first, number=2, reason="restart", epoch=epoch, started=100.0, trained=130.0, ended=200.0)
    answer = Sizing(stage.request).choose(
        replace(run, attempts=(first, second)), up=1, lapse=lapsed(1.0), resumed=False, why=lambda: ""
    )
    assert answer.decision is not None
    assert f"and one more restart of {takes_s:.1f} s later" in answer.decision.reason


def test_the_log_tells_since_when_it_was_waited(tmp_path: Path) -> None:
    stage = slow_to_start(tmp_path)
    ended = stage.clock.now
    stage.turn(100)
    stage.backend.alive["b"] = "b-1"
    stage.turn(2)
    stage.start()
    first, second = stage.store.run().attempts
    assert first.ended is not None
    assert first.idle_from is not None
    assert first.ended <= first.idle_from <= ended + 1.0
    assert second.started >= first.idle_from + 19.0
    assert second.idle_from is None


def test_an_agent_that_is_up_again_in_4_s_costs_one_restart(tmp_path: Path) -> None:
    """Restarts take a second, as from a warm pool."""
    stage = slow_to_start(tmp_path)
    stage.turn(30)
    stage.backend.alive["b"] = "b-1"
    stage.turn(2)
    stage.start()
    stage.report("a", "step", 2, rank=0, step=8)
    lose(stage, "b", left=("a",), attempt=2)
    stage.turn(20)  # 4 s, and a back-off of a second or none
    stage.backend.alive["b"] = "b-2"
    stage.turn(10)
    stage.start()
    assert "shrink" not in [action for action, _ in decisions(stage)]
    assert [attempt.wanted for attempt in stage.store.run().attempts] == [None, None, None]


def test_by_default_the_arithmetic_decides(tmp_path: Path) -> None:
    assert compose([]).recovery.shrink_after_s is None
    assert RecoverySpec().shrink_after_s is None


def slow_to_start(root: Path) -> Stage:
    """Two nodes and no spare, with the defaults; their first step began after 30 s, and one of them is lost."""
    stage = Stage(root, nodes=TWO, spares=0)
    stage.clock.now = stage.store.events()[-1].time
    stage.store._wall = stage.clock.time
    stage.turn(2)
    stage.clock.now += 30.0
    stage.start()
    lose(stage, "b", left=("a",))
    return stage


def test_a_node_that_returns_in_time_is_waited_for(tmp_path: Path) -> None:
    stage = slow_to_start(tmp_path)
    stage.turn(100)  # 20 s
    stage.backend.alive["b"] = "b-1"
    stage.turn(2)
    stage.start()
    assert ("spawn", 2, {"a": [0, 1], "b": [2, 3]}) in stage.gang.calls
    assert [action for action, _ in decisions(stage)] == ["restart", "wait"]
    assert "waiting at most 41 s for 1 of 2 nodes" in decisions(stage)[1][1]
    assert [attempt.wanted for attempt in stage.store.run().attempts] == [None, None]


def test_a_spare_that_comes_late_was_waited_for(tmp_path: Path) -> None:
    """Too short for a line of its own in the log, and no part of placing the ranks all the same."""
    stage = slow_to_start(tmp_path)
    stage.turn(8)  # 1.6 s
    stage.backend.alive["c"] = "c-0"
    stage.turn(2)
    stage.start()
    assert [action for action, _ in decisions(stage)] == ["restart", "swap"]
    swap = [event for event in stage.store.events() if event.kind is EventKind.DECISION][-1]
    assert 1.6 <= swap.data["waited_s"] < 3.0


def test_a_node_that_stays_away_for_longer_is_not(tmp_path: Path) -> None:
    stage = slow_to_start(tmp_path)
    stage.turn(200)  # 40 s
    assert [action for action, _ in decisions(stage)] == ["restart", "wait"]
    stage.turn(10)
    assert [action for action, _ in decisions(stage)] == ["restart", "wait", "shrink"]


def test_the_next_failure_of_a_smaller_gang_waits_for_nobody(tmp_path: Path) -> None:
    stage = shrunk(tmp_path, backoff_s=0.0)
    stage.gang.say("exit", "a", rank=1, attempt=2, code=None, signal=9, log_tail="")
    stage.turn()
    stage.gang.say("killed", "a", attempt=2)
    stage.turn(2)
    stage.start()
    run = stage.store.run()
    assert [attempt.plan for attempt in run.attempts[1:]] == [run.attempts[1].plan] * 2
    assert [action for action, _ in decisions(stage)] == ["restart", "wait", "shrink", "restart"]
    assert run.restarts == 2


def test_a_resume_waits_for_the_nodes_anew(tmp_path: Path) -> None:
    stage = shrunk(tmp_path)
    stage.controller.record(EventKind.RUN_FAILED, reason="an example")
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller, resume={"overrides": [], "changes": []})
    stage.turn(20)
    assert stage.controller.phase is Phase.GATHER
    stage.turn(60)
    assert stage.store.run().attempts[-1].number == 3
    assert stage.store.run().attempts[-1].wanted is not None


def test_grows_back_at_the_next_checkpoint(tmp_path: Path) -> None:
    stage = shrunk(tmp_path)
    asked = stage.store.paths.leave(2)
    assert not asked.exists()
    come_back(stage)
    assert asked.exists()
    assert decisions(stage)[-1] == (
        "grow",
        "2 of 2 nodes are there again: going on as TP2 x PP2 ZeRO-1, micro-batch 1 x 2 on 2 nodes",
    )
    count = len(stage.store.events())
    stage.turn(5)
    assert len(stage.store.events()) == count, "it is said once"
    assert stage.state() is RunState.RUNNING
    leave(stage, 2, 10)
    stage.start()
    assert ("spawn", 3, {"a": [0, 1], "b": [2, 3]}) in stage.gang.calls
    run = stage.store.run()
    second, third = run.attempts[1:]
    assert (second.cause, second.last_step) == (LEFT, 10)
    assert (third.plan, third.wanted, third.reason) == (stage.store.run().attempts[0].plan, None, "grow")
    assert (third.first_step, third.resume_from) == (11, "step-10")
    assert (run.restarts, run.headway.idle_restarts, run.steps_lost) == (1, 0, 7)  # those of the lost node alone
    assert [e.kind for e in stage.store.events()].count(EventKind.FAILURE_DETECTED) == 1
    assert stage.store.run() == stage.controller.run


@pytest.mark.parametrize("seconds", [20.0, 70.0])
def test_the_gang_goes_on_while_the_node_that_returned_warms_up(tmp_path: Path, seconds: float) -> None:
    """It would only have to wait for it; but it does not wait for a word that may never come."""
    stage = shrunk(tmp_path)
    stage.backend.alive["b"] = "b-1"
    stage.clock.now += 5.0
    stage.turn(2)
    stage.clock.now += seconds
    stage.turn()
    assert stage.store.paths.leave(2).exists() is (seconds > 60)
    stage.gang.say("pool", "b", state="ready", reason="")
    stage.turn()
    assert stage.store.paths.leave(2).exists()


def test_growing_uses_no_budget(tmp_path: Path) -> None:
    stage = shrunk(tmp_path, max_restarts=1)
    come_back(stage)
    leave(stage, 2, 10)
    stage.start()
    assert stage.state() is RunState.RUNNING


def test_it_does_not_grow_if_told_so(tmp_path: Path) -> None:
    stage = shrunk(tmp_path, grow=False)
    come_back(stage)
    assert not stage.store.paths.leave(2).exists()


def test_a_node_that_goes_again_takes_the_request_back(tmp_path: Path) -> None:
    stage = shrunk(tmp_path)
    come_back(stage)
    stage.backend.alive.pop("b")
    stage.gang.say("agent_lost", "b", why="silent")
    stage.turn(2)
    assert not stage.store.paths.leave(2).exists()
    assert stage.state() is RunState.RUNNING
    come_back(stage, incarnation="b-2")
    assert stage.store.paths.leave(2).exists()


def test_ranks_that_left_too_early_are_started_again_as_they_were(tmp_path: Path) -> None:
    """The request was taken back after they had read it."""
    stage = shrunk(tmp_path)
    come_back(stage)
    stage.backend.alive.pop("b")
    stage.gang.say("agent_lost", "b", why="silent")
    stage.turn(2)
    leave(stage, 2, 10)
    stage.start()
    run = stage.store.run()
    assert run.state is RunState.RUNNING
    assert (run.attempts[-1].number, run.attempts[-1].plan) == (3, run.attempts[1].plan)
    assert run.attempts[1].cause == IN_VAIN
    assert (run.restarts, run.steps_lost) == (1, 7)


def test_a_failure_before_the_checkpoint_is_a_failure(tmp_path: Path) -> None:
    stage = shrunk(tmp_path, backoff_s=0.0)
    come_back(stage)
    stage.gang.say("exit", "a", rank=1, attempt=2, code=None, signal=9, log_tail="")
    stage.turn()
    stage.gang.say("killed", "a", attempt=2)
    stage.turn(2)
    stage.start()
    run = stage.store.run()
    assert (run.attempts[-1].plan, run.attempts[-1].reason, run.restarts) == (run.attempts[0].plan, "restart", 2)


def test_the_last_step_of_a_smaller_gang_is_the_end(tmp_path: Path) -> None:
    stage = shrunk(tmp_path)
    come_back(stage)
    leave(stage, 2, 20)
    assert stage.state() is RunState.SUCCEEDED


class Survivors(FakeGang):
    """Agents of a gang whose controller has died: they hold attempt 2, on one node."""

    def connect(self, addresses: Any) -> None:
        if not self.calls:
            self.calls.append(("connect", "all"))
            self.say("agent_up", "a", attempt=2, ranks=[{"rank": r, "pid": r, "exited": None} for r in (0, 1)])


def succeed(stage: Stage) -> None:
    """A new controller takes over."""
    stage.lock.release()
    stage.renew()
    stage.gang = Survivors(stage.clock)
    stage.controller.gang = cast(Gang, stage.gang)
    adoption.begin(stage.controller)


@pytest.mark.parametrize("leaving", [False, True])
def test_a_smaller_gang_is_adopted_as_it_is(tmp_path: Path, leaving: bool) -> None:
    stage = shrunk(tmp_path)
    if leaving:
        come_back(stage)
    succeed(stage)
    run = stage.store.run()
    assert stage.controller.phase is Phase.RUN
    assert (len(run.attempts), run.epoch) == (2, 2)
    assert not [call for call in stage.gang.calls if call[0] in ("spawn", "kill")]
    state = stage.controller.state
    assert state is not None
    assert (state.plan, state.world_size) == (plan_of(run.attempts[1]), 2)
    if leaving:
        stage.gang.say("agent_up", "b", attempt=0, ranks=[])
        stage.gang.say("pool", "b", state="ready", reason="")
        stage.turn(2)
        assert [action for action, _ in decisions(stage)].count("grow") == 1
        leave(stage, 2, 10)
        stage.start()
        assert stage.store.run().attempts[-1].reason == "grow"


@pytest.mark.parametrize("cause", [LEFT, IN_VAIN])
def test_whoever_comes_after_the_leaving_counts_no_restart(tmp_path: Path, cause: str) -> None:
    """The controller fell between the stop and the new attempt."""
    stage = shrunk(tmp_path)
    come_back(stage)
    stage.controller.record(EventKind.GANG_STOPPED, cause=cause, failure="", signature="", last_step=10)
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller)
    stage.start()
    run = stage.store.run()
    assert (run.attempts[-1].reason, run.restarts) == ("grow", 1)


def test_a_gang_of_another_wish_is_not_adopted(tmp_path: Path) -> None:
    """A resume had asked for another plan when its controller fell, and the gang is a smaller one of the old plan."""
    stage = shrunk(tmp_path)
    job = stage.request.job
    stage.request = replace(stage.request, job=job.under(replace(job.plan, zero_stage=0)))
    succeed(stage)
    assert ("kill", 2, 0.0) in stage.gang.calls


def test_cancel_while_it_waits(tmp_path: Path) -> None:
    stage = Stage(tmp_path, nodes=TWO, spares=0, shrink_after_s=10.0)
    stage.start()
    lose(stage, "b", left=("a",))
    request_cancel(stage.store, by="test")
    stage.turn()
    assert stage.state() is RunState.CANCELLED
    assert stage.backend.released == 1


def test_cancel_while_it_leaves(tmp_path: Path) -> None:
    stage = shrunk(tmp_path)
    come_back(stage)
    request_cancel(stage.store, by="test")
    stage.turn()
    stage.gang.say("killed", "a", attempt=2)
    stage.turn()
    assert stage.state() is RunState.CANCELLED


def test_half_a_return_is_taken_too(tmp_path: Path) -> None:
    """Of eight nodes three are left; six are more than three."""
    request = tiny_request(tmp_path)
    wide = replace(request.job.plan, dp=4, grad_accum=2)
    job = replace(request.job, plan=wide, batch=replace(request.job.batch, global_batch=8))
    sizing = Sizing(replace(request, job=job))
    assert sizing.need == 8
    small, half = sizing.largest(3), sizing.largest(6)
    assert small is not None
    assert half is not None
    assert (small.dp, half.dp) == (1, 3)
    assert sizing.growth(small, 3) is None
    found = sizing.growth(small, 6)
    assert found is not None
    assert found.reason.startswith("6 of 8 nodes are there again")
    assert sizing.growth(half, 6) is None
    assert sizing.growth(wide, 8) is None


def test_every_second_of_it_has_a_name() -> None:
    def event(at: float, kind: EventKind, attempt: int = 0, **data: Any) -> RunEvent:
        return RunEvent(seq=1, time=at, epoch=1, attempt=attempt, kind=kind, data=data)

    events = [
        event(0.0, EventKind.RUN_SUBMITTED),
        event(1.0, EventKind.ATTEMPT_PLANNED, 1, reason="start"),
        event(2.0, EventKind.TRAINING_STARTED, 1, step=1),
        event(6.0, EventKind.FAILURE_DETECTED, 1, failed_at=5.0),
        event(6.5, EventKind.GANG_STOPPED, 1, failure="node_lost"),
        event(6.5, EventKind.DECISION, 1, action="restart", delay_s=0.0),
        event(9.7, EventKind.DECISION, action="wait", delay_s=0.0, waited_s=3.1),
        event(9.7, EventKind.WAITING_FOR_NODES),
        event(16.5, EventKind.DECISION, 0, action="shrink", delay_s=0.0, waited_s=9.9),
        event(16.6, EventKind.ATTEMPT_PLANNED, 2, reason="restart", waited_s=10.0),
        event(17.0, EventKind.RANKS_SPAWNED, 2, resume_from="x"),
        event(18.0, EventKind.TRAINING_STARTED, 2, step=3),
        event(19.5, EventKind.DECISION, 2, action="grow", delay_s=0.0),
        event(20.4, EventKind.CHECKPOINT_COMMITTED, 2, step=4, stall_s=0.4),
        event(20.9, EventKind.GANG_STOPPED, 2, failure=""),
        event(21.0, EventKind.ATTEMPT_PLANNED, 3, reason="grow"),
        event(21.5, EventKind.RANKS_SPAWNED, 3, resume_from="y"),
        event(22.0, EventKind.TRAINING_STARTED, 3, step=5),
        event(23.5, EventKind.RUN_SUCCEEDED, 3, step=5),
    ]
    times = {(1, 1): 3.0, (1, 2): 4.0, (2, 3): 19.0, (2, 4): 20.0, (3, 5): 23.0}
    metrics = [{"attempt": attempt, "step": step, "time": at} for (attempt, step), at in times.items()]
    books = ledger(events, metrics, now=99.0)
    assert books == pytest.approx(
        {
            "start": 2.0,
            "productive": 1.0 + 1.0 + 1.0 + 1.0 + 1.0,
            "checkpoint_stall": 0.4,
            "detect": 1.0,
            "decide": 0.5 + 0.5,
            "place": 0.1 + 0.4 + 0.6,
            "restore": 1.0 + 0.5,
            "replay": 1.0,
            "wait": 9.9 + 0.1,
            "finish": 0.5,
            "wall": 23.5,
        }
    )
    assert sum(books[name] for name in CLASSES) == pytest.approx(23.5)


def test_nothing_is_lost_while_no_plan_can_run(tmp_path: Path) -> None:
    """All nodes are gone, and come back one by one: the first is not taken alone because it came late."""
    stage = slow_to_start(tmp_path)
    stage.backend.alive.pop("a")
    stage.gang.say("agent_lost", "a", why="silent")
    stage.turn(500)  # 100 s
    stage.backend.alive["a"] = "a-1"
    stage.turn(100)  # 20 s
    assert len(stage.store.run().attempts) == 1
    stage.backend.alive["b"] = "b-1"
    stage.turn(2)
    stage.start()
    assert [attempt.wanted for attempt in stage.store.run().attempts] == [None, None]


@pytest.mark.parametrize(("away_s", "noticed"), [(20.0, True), (2.0, False)])
def test_waiting_begins_when_nodes_are_found_missing(tmp_path: Path, away_s: float, noticed: bool) -> None:
    """Whether it lasts long enough to be told to people or not."""
    stage = slow_to_start(tmp_path)
    stage.turn(int(away_s / 0.2))
    stage.backend.alive["b"] = "b-1"
    stage.turn(2)
    stage.start()
    assert (EventKind.WAITING_FOR_NODES in stage.kinds()) is noticed
    (incident,) = account(stage.store.events(), (), now=stage.clock.now).incidents
    assert incident.seconds["wait"] == pytest.approx(away_s, abs=0.61)
    assert incident.seconds["place"] <= 0.61


def test_people_are_told(tmp_path: Path) -> None:
    stage = shrunk(tmp_path)
    lines = [line for event in stage.store.events() if (line := event_line(event))]
    assert any(line.startswith("shrinking: 1 of 2 nodes are there after 10 s") for line in lines)
    assert any(line.startswith("attempt 2 on 1 node (a)") and "TP2 ZeRO-1" in line for line in lines)
    assert brief(stage.store)["plan"] == "TP2 ZeRO-1, micro-batch 1 x 2 (nodes are missing)"
    document = describe(stage.store, 0.0, watch_s=0.0)
    assert [one["plan"]["pp"] for one in document["attempts"]] == [2, 1]
    assert [one["wanted"] is None for one in document["attempts"]] == [True, False]
    come_back(stage)
    leave(stage, 2, 10)
    stage.start()
    assert brief(stage.store)["plan"].startswith("TP2 x PP2")

"""Training blows up: the controller goes back to before it and leaves its samples out, once, for ever, on record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.spec import JobSpec
from launcher import adoption, policy, recovery, skips
from launcher.attempts import Fall
from launcher.recovery import Action, Decision, Failure, FailureKind
from launcher.request import RecoverySpec
from launcher.run import EventKind, Run, RunState
from launcher.store import read_json
from strategies.codec import from_json
from strategies.schedule import Skip
from tests.support.stage import Stage

SKIP = Skip(step=8, samples=4)


def blow_up(stage: Stage, attempt: int, step: int, samples: int = 4) -> None:
    """Every rank says so and ends itself."""
    for rank in range(4):
        node = "ab"[rank // 2]
        stage.report(node, "step", attempt, rank=rank, step=step - 1)
        stage.report(node, "blow_up", attempt, rank=rank, step=step, why="the loss is nan", samples=samples)
        words = {"type": "BlowUp", "message": f"step {step}: the loss is nan", "traceback": "t"}
        stage.report(node, "error", attempt, rank=rank, step=step, **words)
        stage.gang.say("exit", node, rank=rank, attempt=attempt, code=77, signal=None, log_tail="")
    for node in "ab":
        stage.gang.say("killed", node, attempt=attempt)
    stage.turn(2)


def job_of(stage: Stage, attempt: int) -> JobSpec:
    return from_json(JobSpec, read_json(stage.store.paths.job(attempt)))


def test_back_to_before_it_without_its_samples(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    blow_up(stage, 1, 8)
    stage.start()
    run = stage.store.run()
    assert run.state is RunState.RUNNING
    assert run.attempts[0].cause == "training blew up at step 8: the loss is nan"
    assert run.attempts[0].last_step == 7
    assert run.skips == (SKIP,)
    (decision,) = [event.data for event in stage.store.events() if event.kind is EventKind.DECISION]
    assert (decision["action"], decision["skip"]) == ("restart", {"step": 8, "samples": 4})
    assert job_of(stage, 1).skips == ()
    assert job_of(stage, 2).skips == (SKIP,)
    assert stage.kinds().count(EventKind.FAILURE_DETECTED) == 1


def test_the_same_step_again_is_not_the_data(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    blow_up(stage, 1, 8)
    stage.start()
    blow_up(stage, 2, 8)
    run = stage.store.run()
    assert run.state is RunState.FAILED
    assert "again with other samples: it is not the data" in run.reason
    assert run.skips == (SKIP,)


def test_another_step_is_another_accident(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    blow_up(stage, 1, 8)
    stage.start()
    blow_up(stage, 2, 12, samples=6)
    stage.clock.now += 60  # no checkpoint since the last restart: a pause comes first
    stage.start()
    assert stage.store.run().skips == (SKIP, Skip(step=12, samples=6))
    assert job_of(stage, 3).skips == (SKIP, Skip(step=12, samples=6))


def test_a_controller_that_falls_before_it_decides_is_replaced_by_one_that_does(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.report("a", "blow_up", 1, rank=0, step=8, why="the loss is nan", samples=4)
    stage.turn()
    assert stage.kinds()[-1] is EventKind.FAILURE_DETECTED
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller)
    assert stage.store.run().skips == (SKIP,)


def test_a_live_gang_with_skips_is_adopted_as_it_is(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    blow_up(stage, 1, 8)
    stage.start()
    stage.lock.release()
    stage.renew()
    for agent in stage.backend.agents():
        ranks: list[dict[str, Any]] = [] if agent.node == "c" else [{"rank": 0}]
        stage.gang.calls.append(("connect", agent.incarnation))
        stage.gang.say("agent_up", agent.node, attempt=0 if agent.node == "c" else 2, ranks=ranks)
    adoption.begin(stage.controller)
    started = [event for event in stage.store.events() if event.kind is EventKind.CONTROLLER_STARTED]
    assert started[-1].data["adopted"] is True


def test_a_persons_resume_keeps_the_skips(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    blow_up(stage, 1, 8)
    stage.start()
    blow_up(stage, 2, 8)
    assert stage.state() is RunState.FAILED
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller, resume={"overrides": [], "changes": []})
    stage.start()
    assert job_of(stage, 3).skips == (SKIP,)


def failure(kind: FailureKind, **fields: Any) -> Failure:
    return Failure(kind=kind, time=1.0, **fields)


def test_a_blow_up_explains_what_its_ranks_did_next() -> None:
    numeric = failure(FailureKind.NUMERIC, step=8, samples=4)
    assert recovery.culprit([failure(FailureKind.RANK_ERROR), numeric, failure(FailureKind.NODE_LOST)]) is numeric


@pytest.mark.parametrize("kind", sorted(set(FailureKind) - {FailureKind.NUMERIC, FailureKind.BAD_CONFIG}))
def test_no_other_failure_skips_anything(kind: FailureKind) -> None:
    decision = policy.decide(Run(), failure(kind, step=8, samples=4), RecoverySpec())
    assert decision.action is Action.RESTART
    assert decision.skip is None


def test_the_budget_of_restarts_counts_here_too() -> None:
    run = Run(failures=(Fall(kind="numeric", time=1.0),) * 3)
    decision = policy.decide(run, failure(FailureKind.NUMERIC, step=8), RecoverySpec(max_restarts=2))
    assert decision.action is Action.GIVE_UP


def test_the_log_keeps_the_whole_decision() -> None:
    decision = Decision(action=Action.RESTART, reason="r", delay_s=1.5, skip=SKIP)
    assert decision.fields == {"action": "restart", "reason": "r", "delay_s": 1.5, "skip": SKIP}


def test_status_says_which_samples_and_why(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    job = stage.request.job.skipping((Skip(step=3, samples=2), Skip(step=8, samples=1)))
    size = job.batch.global_batch
    rows = skips.skipped(job, Run(skips=(SKIP,)))
    assert [(row["step"], row["first"], row["last"], row["by"]) for row in rows] == [
        (3, 2 * size, 2 * size + 1, "configuration"),
        (8, 7 * size + 2, 7 * size + 2, "configuration"),
        (8, 7 * size + 3, 7 * size + 6, "recovery"),
    ]
    assert skips.head(rows)[-1] == (
        "skipped",
        f"samples {7 * size + 3} to {7 * size + 6}, before step 8 (by recovery)",
    )

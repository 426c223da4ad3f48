"""Training blows up twice at a step: the run goes back to before what it had gone on from, and then no further."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.checkpoint.layout import place_of
from jobs.checkpoint.memory import Address, Holding
from launcher import adoption
from launcher.attempts import Attempt
from launcher.generations import Stock, choose
from launcher.render_events import event_line
from launcher.rollback import Rollback, answer
from launcher.run import EventKind, Run, RunState
from strategies.schedule import Skip
from tests.launcher.test_blow_up import blow_up, job_of
from tests.support.checkpoints import write_checkpoint
from tests.support.stage import Stage


def once(root: Path, *steps: int) -> tuple[Stage, int]:
    """Step 11 has blown up, and the run has gone on from the state of step 10; and how many samples a step has."""
    stage = Stage(root, backoff_s=0.0)
    stage.start()
    for step in steps:
        path = write_checkpoint(stage.store.paths.checkpoint_dir, step)
        stage.report("a", "checkpoint", 1, rank=0, step=step, path=str(path), bytes=1, stall_s=0.1)
    size = stage.request.job.batch.global_batch
    blow_up(stage, 1, 11, size)
    stage.start()
    run = stage.store.run()
    assert (run.attempts[-1].first_step, run.skips) == (11, (Skip(step=11, samples=size),))
    return stage, size


def twice(root: Path) -> tuple[Stage, Skip]:
    """And again, so that it has gone on from step 5; and what is left out for it."""
    stage, size = once(root, 5, 10)
    blow_up(stage, 2, 11, size)
    stage.start()
    return stage, Skip(step=6, samples=7 * size)


def takes_over(stage: Stage, *, alive: bool) -> None:
    """Another controller begins, while the ranks of attempt 3 live, or none do."""
    stage.lock.release()
    stage.renew()
    for agent in stage.backend.agents():
        holds = 3 if alive and agent.node != "c" else 0
        stage.gang.calls.append(("connect", agent.incarnation))
        stage.gang.say("agent_up", agent.node, attempt=holds, ranks=[{"rank": 0}] if holds else [])
    adoption.begin(stage.controller)


def test_back_to_an_older_state_without_all_samples_since(tmp_path: Path) -> None:
    stage, skip = twice(tmp_path)
    run = stage.store.run()
    assert [one.first_step for one in run.attempts] == [1, 11, 6]
    decision = [event for event in stage.store.events() if event.kind is EventKind.DECISION][-1]
    assert (decision.data["skip"], decision.data["rollback"]) == (None, {"step": 11, "before": 10})
    assert "from before step 10, without the samples from there to step 11" in str(event_line(decision))
    planned = [event for event in stage.store.events() if event.kind is EventKind.ATTEMPT_PLANNED][-1]
    assert f"{skip.samples} samples are left out before step 6" in str(event_line(planned))
    assert run.skips == job_of(stage, 3).skips == (skip,)
    before, after = (job_of(stage, number).schedule() for number in (2, 3))
    assert after.step_range(5) == before.step_range(5)
    assert after.step_range(6).start == before.step_range(11).stop, "neither those of attempt 1 nor of 2 come again"


@pytest.mark.parametrize("step", [8, 11])
def test_no_further(step: int, tmp_path: Path) -> None:
    stage, skip = twice(tmp_path)
    assert stage.state() is RunState.RUNNING
    blow_up(stage, 3, step)
    run = stage.store.run()
    assert run.state is RunState.FAILED
    assert "again with older weights and other samples: it is not the data" in run.reason
    assert run.skips == (skip,)


def test_beyond_that_step_it_is_another_accident(tmp_path: Path) -> None:
    stage, skip = twice(tmp_path)
    blow_up(stage, 3, 12)
    assert stage.store.run().skips == (skip, Skip(step=12, samples=4))


@pytest.mark.parametrize("damaged", [False, True])
def test_nothing_older_ends_it_at_once(damaged: bool, tmp_path: Path) -> None:
    stage, size = once(tmp_path, 10)
    if damaged:  # and newer: that it may be there again is nothing to wait for
        write_checkpoint(stage.store.paths.checkpoint_dir, 11, (1, 2)).write_text("{")
    blow_up(stage, 2, 11, size)
    stage.turn()
    run = stage.store.run()
    assert (run.state, len(run.attempts)) == (RunState.FAILED, 2)
    assert run.reason == (
        "training blew up at step 11: the loss is nan, again with other samples, and no checkpoint is older than that "
        "of step 10"
    )


def test_an_older_one_that_is_out_of_reach_is_waited_for(tmp_path: Path) -> None:
    stage, size = once(tmp_path, 5, 10)
    place = place_of(stage.store.paths.checkpoint_dir / "step-00000005" / "e0001-a0001.manifest.json")
    place.shard_dir.rename(tmp_path / "elsewhere")
    blow_up(stage, 2, 11, size)
    stage.turn()
    assert (stage.state(), len(stage.store.run().attempts)) == (RunState.RECOVERING, 2)
    (tmp_path / "elsewhere").rename(place.shard_dir)
    stage.turn()
    assert [one.first_step for one in stage.store.run().attempts] == [1, 11, 6]


def test_before_the_first_checkpoint_it_begins_again(tmp_path: Path) -> None:
    """What had been gone on from was a copy in memory; nothing that is on disk is thrown away."""
    run = Run(attempts=(attempt_from(7),), skips=(Skip(step=8, samples=4),))
    assert answer(run, 8, 4) == (None, Rollback(step=8, before=7))
    job = Stage(tmp_path).request.job
    skip = Rollback(step=8, before=7).skip(job.skipping(run.skips), 0)
    assert skip == Skip(step=1, samples=8 * job.batch.global_batch + 4)


def test_a_controller_that_falls_right_after_the_decision_is_replaced_by_one_that_keeps_it(tmp_path: Path) -> None:
    stage, size = once(tmp_path, 5, 10)
    blow_up(stage, 2, 11, size)
    log = stage.store.paths.events
    lines = log.read_bytes().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if b'"rollback"' in line)
    log.write_bytes(b"".join(lines[: last + 1]))
    takes_over(stage, alive=False)
    stage.turn(2)
    run = stage.store.run()
    assert [one.first_step for one in run.attempts] == [1, 11, 6]
    assert run.skips == job_of(stage, 3).skips == (Skip(step=6, samples=7 * size),)


def test_what_has_blown_up_is_not_taken_again_when_the_next_attempt_falls_at_once(tmp_path: Path) -> None:
    stage, skip = twice(tmp_path)
    stage.gang.say("exit", "b", rank=3, attempt=3, code=None, signal=9)
    for node in "ab":
        stage.gang.say("killed", node, attempt=3)
    stage.turn(4)
    run = stage.store.run()
    assert [one.first_step for one in run.attempts] == [1, 11, 6, 6]
    assert run.skips == job_of(stage, 4).skips == (skip,)


def test_a_live_gang_is_adopted_after_it(tmp_path: Path) -> None:
    stage, _ = twice(tmp_path)
    takes_over(stage, alive=True)
    started = [event for event in stage.store.events() if event.kind is EventKind.CONTROLLER_STARTED]
    assert started[-1].data["adopted"] is True


def test_a_person_may_go_on_from_the_newest_again(tmp_path: Path) -> None:
    stage, skip = twice(tmp_path)
    blow_up(stage, 3, 11)
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller, resume={"overrides": [], "changes": []})
    stage.turn(2)
    run = stage.store.run()
    assert (run.rollback, run.skips) == (Rollback(), (skip,))
    assert run.attempts[-1].first_step == 6, "what it went back behind is of another history"


def attempt_from(step: int) -> Attempt:
    return Attempt(number=1, epoch=1, plan={}, nodes=(), started=0.0, first_step=step + 1)


def test_at_once_after_a_skip_is_the_second_time_whatever_the_step() -> None:
    """Copies lie several steps apart: step 12 has blown up from the state of step 8, and now it is step 9 or 10."""
    run = Run(attempts=(attempt_from(8),), skips=(Skip(step=12, samples=4),))
    assert answer(run, 9, 4) == (None, Rollback(step=9, before=8))
    assert answer(run, 10, 4) == (Skip(step=10, samples=4), None)
    assert answer(run, 13, 4) == (Skip(step=13, samples=4), None)


def test_skips_on_the_way_are_a_part_of_it_and_others_stay() -> None:
    old = tuple(Skip(step=step, samples=1) for step in (3, 6, 7, 11, 15))
    new = Skip(step=6, samples=9)
    assert Rollback(step=11).skips(old, new) == (old[0], old[1], old[4], new)
    assert Rollback(step=11).skips(old, None) == old


@pytest.mark.parametrize(("before", "step"), [(0, 10), (11, 10), (10, 9), (9, 8), (8, None)])
def test_copies_in_memory_are_older_too(before: int, step: int | None) -> None:
    held = tuple(Holding(step=s, epoch=1, attempt=1, rank=0, world=1, bytes=1, own=True) for s in (8, 9, 10))
    stock = Stock(node="a", address=Address(host="a", port=1, incarnation="a"), held=held)
    point = choose([stock], beyond=None, branch=None, skips=(), rejected=(), before=before)
    assert (point.step if point else None) == step

"""Ranks that leave at their next checkpoint, on disk or in memory: asked by a controller that a test steps by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.spec import CheckpointSpec
from launcher import adoption
from launcher.departure import FOR_MORE
from launcher.notice import Present, unhurried
from launcher.phase import Phase
from launcher.run import EventKind
from tests.launcher.test_departure import orders, steps
from tests.launcher.test_sizing import come_back, decisions, shrunk
from tests.support.checkpoints import write_checkpoint
from tests.support.stage import Stage

LAST = 400
MEMORY = CheckpointSpec(every=0, memory_every=1)
DETECT_S, STEP_S = 5.0, 0.2


def policy(stage: Stage, checkpoint: CheckpointSpec, kind: Any = "pretrain") -> None:
    """Which checkpoints the ranks are to make."""
    job = stage.request.job
    stage.controller.departure._job = replace(
        job, kind=kind, checkpoint=checkpoint, train=replace(job.train, steps=LAST)
    )


def small(root: Path, checkpoint: CheckpointSpec = MEMORY, **recovery: Any) -> Stage:
    """A run of two nodes that goes on with one, its second attempt."""
    stage = shrunk(root, steps=LAST, **recovery)
    policy(stage, checkpoint)
    return stage


def train(stage: Stage, first: int, last: int, **told: Any) -> None:
    """Both ranks of the smaller gang complete these steps, and say how often they copy."""
    for step in range(first, last + 1):
        for rank in (0, 1):
            stage.report("a", "step", 2, rank=rank, step=step, next="step", **told)
        stage.turn()  # 0.2 s


def asked(stage: Stage) -> bool:
    return stage.store.paths.leave(2).exists()


def grows(stage: Stage) -> int:
    return [action for action, _ in decisions(stage)].count("grow")


def test_without_checkpoints_on_disk_it_grows_at_a_copy_in_memory(tmp_path: Path) -> None:
    stage = small(tmp_path)
    train(stage, 1, 6, copies_every=1)
    come_back(stage)
    assert grows(stage) == 1
    stage.turn()
    ((_, attempt, after),) = orders(stage)
    assert attempt == 2
    assert after == 6 + 2 + math.ceil(DETECT_S / (0.9 * STEP_S))  # until then the word has come, or the node is lost
    assert stage.gang.in_memory == [True], "no disk is waited for"
    train(stage, 7, after, copies_every=1)
    assert len(orders(stage)) == 1, "it is said once"
    path = write_checkpoint(stage.store.paths.checkpoint_dir, after, (1, 2))
    stage.report("a", "checkpoint", 2, rank=0, step=after, path=str(path))
    for rank in (0, 1):
        stage.gang.say("exit", "a", rank=rank, attempt=2, code=0, signal=None)
    stage.turn()
    stage.gang.say("killed", "a", attempt=2)
    stage.turn()
    stage.start()
    assert ("spawn", 3, {"a": [0, 1], "b": [2, 3]}) in stage.gang.calls
    second, third = stage.store.run().attempts[1:]
    assert (second.cause, second.last_step) == (FOR_MORE, after)
    assert (third.reason, third.first_step, third.wanted) == ("grow", after + 1, None)
    assert (stage.store.run().restarts, stage.store.run().steps_lost) == (1, 7)  # of the lost node


def test_a_long_interval_on_disk_is_not_waited_for(tmp_path: Path) -> None:
    stage = small(tmp_path, CheckpointSpec(every=300, memory_every=1))
    train(stage, 1, 6, copies_every=64)  # they are dear, and kept all the same: one is made to leave
    come_back(stage)
    stage.turn()
    assert asked(stage), "at a checkpoint on disk, if one comes first"
    assert orders(stage)[0][2] < 50


@pytest.mark.parametrize("copies", [{"copies_every": 0}, {}])
def test_who_keeps_no_copies_waits_for_the_disk(tmp_path: Path, copies: dict[str, int]) -> None:
    stage = small(tmp_path, CheckpointSpec(every=300, memory_every=1))
    train(stage, 1, 6, **copies)
    come_back(stage)
    train(stage, 7, 9, **copies)
    assert asked(stage)
    assert orders(stage) == []


@pytest.mark.parametrize(
    ("checkpoint", "copies", "kind"),
    [
        (CheckpointSpec(every=0, memory_every=1), 0, "pretrain"),  # a host has no room for copies
        (CheckpointSpec(every=0, memory_every=0), 0, "pretrain"),
        (CheckpointSpec(every=LAST, memory_every=0), 0, "pretrain"),
        (CheckpointSpec(every=5, memory_every=1), 0, "evaluate"),  # its ranks leave when they are done
    ],
)
def test_nobody_is_asked_who_comes_to_no_checkpoint(
    tmp_path: Path, checkpoint: CheckpointSpec, copies: int, kind: str
) -> None:
    stage = small(tmp_path)
    policy(stage, checkpoint, kind)
    train(stage, 1, 6, copies_every=copies)
    come_back(stage)
    train(stage, 7, 9, copies_every=copies)
    assert (grows(stage), asked(stage), orders(stage)) == (0, False, [])


def test_it_is_asked_for_once_it_is_known_that_copies_are_kept(tmp_path: Path) -> None:
    stage = small(tmp_path)
    come_back(stage)
    stage.turn()
    assert (grows(stage), orders(stage)) == (0, [])
    train(stage, 1, 6, copies_every=1)
    stage.turn()
    assert (grows(stage), len(orders(stage))) == (1, 1)


def test_a_word_that_came_too_late_is_given_anew(tmp_path: Path) -> None:
    stage = small(tmp_path)
    train(stage, 1, 6, copies_every=1)
    come_back(stage)
    stage.turn()
    after = orders(stage)[0][2]
    train(stage, 7, after, copies_every=1)
    stage.turn(5)
    assert len(orders(stage)) == 1  # they may be leaving
    train(stage, after + 1, after + 1, copies_every=1)
    assert len(orders(stage)) == 2
    assert orders(stage)[1][2] > after + 1
    assert grows(stage) == 1


def test_near_the_end_it_is_not_worth_it(tmp_path: Path) -> None:
    stage = small(tmp_path)
    train(stage, 1, 6, copies_every=1)
    come_back(stage)
    train(stage, LAST - 10, LAST - 2, copies_every=1)
    ((_, _, after),) = orders(stage)
    assert after < LAST - 10  # that was early enough, and was missed


@pytest.mark.parametrize(("early", "every", "grown"), [(60, 0, 1), (12, 0, 0), (12, 390, 0), (12, 395, 1)])
def test_nobody_is_asked_whom_the_word_would_find_done(tmp_path: Path, early: int, every: int, grown: int) -> None:
    """Steps of 0.2 s: the word and two steps are some thirty of them."""
    stage = small(tmp_path, CheckpointSpec(every=every, memory_every=1))
    train(stage, LAST - early - 10, LAST - early, copies_every=1)
    if every == 390:
        train(stage, LAST - early + 1, LAST - 8, copies_every=1)  # the last one on disk but one has been
    come_back(stage)
    stage.turn()
    assert (grows(stage), asked(stage)) == (grown, bool(grown))
    assert len(orders(stage)) == (1 if early == 60 else 0)


@pytest.mark.parametrize(("within_s", "course"), [(60.0, "leave"), (2.0, "swap")])
def test_a_notice_reckons_with_the_step_that_is_agreed_on(tmp_path: Path, within_s: float, course: str) -> None:
    """Ranks that have been told one step can be told no other: it is in time, or it is not waited for."""
    stage = small(tmp_path)
    train(stage, 1, 6, copies_every=1)
    come_back(stage)
    stage.turn()
    after = orders(stage)[0][2]
    stage.gang.say("notice", "a", reason="SIGTERM", within_s=within_s)
    stage.turn()
    assert stage.controller.phase is (Phase.RUN if course == "leave" else Phase.STOP)
    if course == "leave":
        assert f"all ranks save and leave after step {after}, within" in decisions(stage)[-1][1]
        assert stage.controller.state is not None
        assert stage.controller.state.leaving == "move"
        assert {order[2] for order in orders(stage)} == {after}
        assert stage.gang.in_memory == [True, False], "now it is to be on disk"


def test_a_slow_rank_is_replaced_at_a_copy_in_memory(tmp_path: Path) -> None:
    stage = Stage(tmp_path, replace_stragglers=True, steps=LAST)
    policy(stage, MEMORY)
    stage.start()
    stage.gang.say("pool", "c", state="ready", reason="")
    for rank in range(4):
        stage.report("ab"[rank // 2], "step", 1, rank=rank, step=1, next="step", copies_every=1)
    steps(stage, 1, 2, 25, slow=2)
    assert [action for action, _ in decisions(stage)] == ["replace"]
    assert list(stage.store.run().excluded) == ["b"]
    ((_, _, after),) = orders(stage)
    assert 25 < after < 60


def test_a_slow_rank_that_comes_to_no_checkpoint_stays(tmp_path: Path) -> None:
    stage = Stage(tmp_path, replace_stragglers=True, steps=LAST)
    policy(stage, CheckpointSpec(every=0, memory_every=0))
    stage.start()
    stage.gang.say("pool", "c", state="ready", reason="")
    steps(stage, 1, 1, 25, slow=2)
    assert EventKind.STRAGGLER_FOUND in stage.kinds()
    assert (decisions(stage), dict(stage.store.run().excluded)) == ([], {})


def test_near_the_end_a_slow_rank_stays(tmp_path: Path) -> None:
    stage = Stage(tmp_path, replace_stragglers=True, steps=LAST)
    policy(stage, MEMORY)
    stage.start()
    stage.gang.say("pool", "c", state="ready", reason="")
    for rank in range(4):
        stage.report("ab"[rank // 2], "step", 1, rank=rank, step=LAST - 30, next="step", copies_every=1)
    steps(stage, 1, LAST - 29, LAST - 5, slow=2)
    assert EventKind.STRAGGLER_FOUND in stage.kinds()
    assert (decisions(stage), dict(stage.store.run().excluded)) == ([], {})


def test_a_successor_knows_why_they_leave(tmp_path: Path) -> None:
    stage = small(tmp_path)
    train(stage, 1, 6, copies_every=1)
    come_back(stage)
    stage.turn()
    after = orders(stage)[0][2]
    stage.lock.release()
    stage.renew()
    connect = stage.gang.connect

    def meet(addresses: Any) -> None:
        connect(addresses)
        for seen in stage.gang.queue:
            if seen.node == "a":
                seen.data.update(attempt=2, leave_after=after)

    stage.gang.connect = meet  # type: ignore[method-assign]
    adoption.begin(stage.controller)
    assert stage.controller.state is not None
    assert (stage.controller.state.leaving, stage.controller.state.leave_after) == ("grow", after)


@pytest.mark.parametrize("step_s", [0.01, 0.2, 1.0, 30.0])
@pytest.mark.parametrize("faster", [1.0, 0.9])
def test_the_word_has_its_time(step_s: float, faster: float) -> None:
    """Even where the newest step is over and the next ones are as short as any."""
    at = Present(last=100, elapsed_s=0.0, typical_s=step_s, most_s=step_s, save_s=0.0)
    after = unhurried(at, 5.0)
    assert (after - 101) * step_s * faster >= 5.0
    assert after - 101 <= 5.0 / (0.9 * step_s) + 2
    assert unhurried(replace(at, typical_s=0.0), 5.0) == 0

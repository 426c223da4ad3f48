"""A node that will be taken away: what the gang does, against a play of what then happens."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.spec import CheckpointSpec
from launcher.notice import COPY_S, DELIVERY_S, EXIT_S, Answer, Course, Kept, Present, choose
from launcher.phase import Phase
from launcher.run import EventKind
from tests.launcher.test_departure import decisions, orders
from tests.support.stage import Stage

STEPS = (0.2, 5.0, 8.0, 10.0, 30.0, 90.0)
NOTICES = (5.0, 25.0, 120.0)
INTO = (0.0, 0.03, 0.2, 0.5, 0.8, 0.93, 0.999)  # of a step, when the notice comes
SAVES = (0.0, 2.0, 20.0)


def present(last: int, elapsed_s: float, step_s: float, save_s: float = 0.0) -> Present:
    return Present(last=last, elapsed_s=elapsed_s, typical_s=step_s, most_s=step_s, save_s=save_s)


def play(step_s: float, notice_s: float, elapsed_s: float, save_s: float, kept: Kept) -> tuple[float, int, Answer]:
    """A controller that looks five times a second, and ranks that do as they are told.

    Returns:
        When it is over (seconds after the notice), the newest step that is kept then, and what was decided last.
    """
    began = -elapsed_s  # of the step after ``last``
    last, now = 100, 0.0
    while now < notice_s:
        answer = choose(present(last, now - began, step_s, save_s), kept, notice_s - now)
        if answer.course is Course.LEAVE:
            end = began + (answer.step - last) * step_s
            first = began + step_s * (answer.step - last)
            assert first - now > DELIVERY_S - 1e-9, "a rank may have done that step before it hears of the order"
            return end + save_s + EXIT_S, answer.step, answer
        if answer.course is Course.SWAP:
            return now, kept.newest_of(last if now - began >= COPY_S else last - 1), answer
        now += 0.2
        if now >= began + step_s:
            began, last = began + step_s, last + 1
    raise AssertionError(f"the node is gone, {now - began:.1f} s of step {last + 1} with it")


@pytest.mark.parametrize(("step_s", "notice_s"), list(itertools.product(STEPS, NOTICES)))
def test_the_deadline_is_met_or_nothing_is_done_that_is_lost(step_s: float, notice_s: float) -> None:
    kept = Kept(steps=100_000, newest=95, disk_every=1000, memory_every=1)
    for into, save_s in itertools.product(INTO, SAVES):
        elapsed_s = into * step_s
        over_s, newest, answer = play(step_s, notice_s, elapsed_s, save_s, kept)
        done = 100 + int((elapsed_s + over_s) / step_s + 1e-6)  # complete by then
        if answer.course is Course.LEAVE:
            assert over_s <= notice_s + 1e-6
            assert answer.within_s <= notice_s
            assert "nothing is lost" in answer.words
        else:
            assert newest >= done - 1
            assert newest == done or f"step {done} if its copy in memory is not whole yet" in answer.words


@pytest.mark.parametrize(
    ("step_s", "notice_s", "into", "course", "step"),
    [
        (0.2, 25.0, 0.5, Course.LEAVE, 107),  # a second for the order, and two steps
        (0.2, 5.0, 0.5, Course.LEAVE, 107),
        (5.0, 25.0, 0.0, Course.LEAVE, 103),
        (8.0, 25.0, 0.5, Course.LEAVE, 103),
        (10.0, 25.0, 0.1, Course.LEAVE, 102),  # there is no room for a step to spare
        (30.0, 25.0, 0.3, Course.LEAVE, 101),  # the present one, and there is time to say so
        (30.0, 25.0, 0.15, Course.SWAP, 100),  # nothing will be done in time
        (30.0, 120.0, 0.5, Course.LEAVE, 103),
        (90.0, 25.0, 0.5, Course.SWAP, 100),
        (90.0, 25.0, 0.8, Course.LEAVE, 101),
        (90.0, 120.0, 0.1, Course.LEAVE, 101),
        (5.0, 5.0, 0.5, Course.LEAVE, 101),
        (8.0, 5.0, 0.9, Course.GO_ON, 101),  # until that is done and copied
    ],
)
def test_what_is_done(step_s: float, notice_s: float, into: float, course: Course, step: int) -> None:
    kept = Kept(steps=1000, newest=95, disk_every=10, memory_every=1)
    answer = choose(present(100, into * step_s, step_s), kept, notice_s)
    assert (answer.course, answer.step) == (course, step), answer


def test_a_step_that_will_be_done_is_waited_for_where_it_is_kept() -> None:
    """28.5 s into a step of 30 s its end comes before the word of it has, and the end of the next after the node's."""
    kept = Kept(steps=1000, newest=95, disk_every=10, memory_every=1)
    answer = choose(present(100, 28.5, 30.0), kept, 25.0)
    assert (answer.course, answer.step) == (Course.GO_ON, 101)
    assert answer.within_s == 1.5 + COPY_S
    assert choose(present(101, 0.5, 30.0), kept, 23.0).course is Course.GO_ON  # its copy is on its way
    swap = choose(present(101, COPY_S, 30.0), kept, 20.5)
    assert (swap.course, swap.step) == (Course.SWAP, 101)
    assert "others go on after step 101; lost: 3.0 s of step 102" in swap.words


def test_a_checkpoint_that_is_being_written_is_waited_for() -> None:
    kept = Kept(steps=1000, newest=90, disk_every=10)
    assert choose(present(100, 0.0, 30.0), kept, 10.0).course is Course.GO_ON
    swap = choose(present(100, 4.0, 30.0), Kept(steps=1000, newest=100, disk_every=10), 6.0)
    assert "others go on after step 100; lost: 4.0 s of step 101" in swap.words
    gone = choose(present(97, 4.0, 30.0), kept, 6.0)
    assert "others go on after step 90; lost: steps 91 to 97, 4.0 s of step 98" in gone.words


def test_a_checkpoint_that_takes_its_time_is_counted() -> None:
    kept = Kept(steps=1000, newest=95, disk_every=10, memory_every=1)
    fast, slow = (choose(present(100, 2.0, 8.0, save_s), kept, 25.0) for save_s in (0.5, 11.0))
    assert (fast.course, fast.step, slow.course, slow.step) == (Course.LEAVE, 103, Course.LEAVE, 101)
    assert "within 18.0 s of the 25.0 s that are left; nothing is lost" in slow.words
    assert "none was made yet" in choose(present(100, 2.0, 8.0), kept, 25.0).words
    never = choose(present(100, 4.0, 8.0, 60.0), kept, 25.0)
    assert (never.course, never.step) == (Course.GO_ON, 101)


def test_at_the_end_the_run_is_done_instead_if_there_is_time() -> None:
    kept = Kept(steps=102, newest=95, disk_every=10, memory_every=1)
    assert choose(present(100, 2.0, 8.0), kept, 25.0).course is Course.FINISH
    assert choose(present(100, 2.0, 20.0), kept, 25.0) == choose(
        present(100, 2.0, 20.0), Kept(steps=1000, newest=95, disk_every=10, memory_every=1), 25.0
    )
    assert choose(present(101, 0.0, 90.0), kept, 25.0).course is Course.GO_ON  # a copy is on its way
    assert choose(present(101, 5.0, 90.0), kept, 25.0).course is Course.SWAP


# --- the controller -------------------------------------------------------------------------------------------------


def trained(
    tmp_path: Path, step_s: float, steps: int = 8, told: dict[str, Any] | None = None, **recovery: Any
) -> Stage:
    """A gang whose newest step is just complete."""
    stage = Stage(tmp_path, **recovery)
    stage.start()
    times = {"own_s": step_s, "seconds": step_s} | (told or {})
    for step in range(1, steps + 1):
        stage.clock.now += step_s - 0.2  # a turn takes the rest
        for rank in range(4):
            stage.report("ab"[rank // 2], "step", 1, rank=rank, step=step, next="step", **times)
        stage.turn()
    return stage


@pytest.mark.parametrize(("step_s", "after"), [(0.4, 13), (5.0, 11), (8.0, 11), (10.0, 10)])
def test_the_order_is_given_and_the_line_tells_a_time_that_holds(tmp_path: Path, step_s: float, after: int) -> None:
    stage = trained(tmp_path, step_s)
    stage.gang.say("notice", "b", reason="SIGTERM", within_s=25.0)
    stage.turn()
    assert orders(stage) == [("leave", 1, after)]
    (told,) = [one["reason"] for one in decisions(stage)]
    within = float(told.split("within ")[1].split(" s")[0])
    assert (after - 8) * step_s <= within <= 25.0


def test_what_cannot_be_saved_in_time_moves_at_once_and_says_what_is_lost(tmp_path: Path) -> None:
    stage = trained(tmp_path, 90.0, max_restarts=0)
    stage.clock.now += 10.0
    stage.gang.say("notice", "b", reason="SIGTERM", within_s=25.0)
    stage.turn()
    assert orders(stage) == []
    assert stage.controller.phase is Phase.STOP
    (found,) = [event.data for event in stage.store.events() if event.kind is EventKind.FAILURE_DETECTED]
    assert found["failure"]["kind"] == "preempted"
    assert found["failure"]["detail"] == (
        "node b will be taken away in 25 s (SIGTERM): no step can be agreed on and saved in the 25.0 s that are left "
        "(a step takes 90.0 s): the ranks end now, and others go on after step 0; lost: steps 1 to 8, 10.2 s of step 9"
    )  # this run keeps no copies in memory, and no checkpoint was committed
    for node in "ab":
        stage.gang.say("killed", node, attempt=1)
    stage.turn()
    stage.start()
    assert ("spawn", 2, {"a": [0, 1], "c": [2, 3]}) in stage.gang.calls
    run = stage.store.run()
    assert [attempt.reason for attempt in run.attempts] == ["start", "move"]
    assert run.restarts == 0


@pytest.mark.parametrize(
    ("told", "back"), [({}, 8), ({"copies_every": 1}, 8), ({"copies_every": 3}, 6), ({"copies_every": 0}, 0)]
)
def test_only_copies_that_are_made_are_counted_on(tmp_path: Path, told: dict[str, int], back: int) -> None:
    """As often as was asked for until ranks tell otherwise: copies may be dear, and a host without room keeps none."""
    stage = trained(tmp_path, 90.0, told=told, max_restarts=0)
    job = replace(stage.request.job, checkpoint=CheckpointSpec(every=100, memory_every=1))
    stage.controller.departure._job = job
    stage.clock.now += 10.0
    stage.gang.say("notice", "b", reason="SIGTERM", within_s=25.0)
    stage.turn()
    (found,) = [event.data for event in stage.store.events() if event.kind is EventKind.FAILURE_DETECTED]
    assert f"others go on after step {back}; lost: " in found["failure"]["detail"]


def test_how_long_a_checkpoint_takes_is_learned(tmp_path: Path) -> None:
    stage = trained(tmp_path, 8.0)
    stage.report("a", "step", 1, rank=0, step=9, next="save", own_s=8.0, seconds=8.0)
    stage.turn()
    began = stage.clock.now - 0.2
    stage.report("a", "checkpoint", 1, rank=0, step=9, path="x", committed=began + 5.0)
    stage.turn()
    assert stage.controller.departure.saves.longest_s == pytest.approx(5.0)


@pytest.mark.parametrize(("since", "leaves"), [(4, False), (5, True)])
def test_a_store_that_was_slow_once_is_not_slow_for_ever(since: int, leaves: bool, tmp_path: Path) -> None:
    """One checkpoint took five minutes; then so many took a second, and a node will be taken away in 25 s."""
    stage = trained(tmp_path, 1.0)
    for number in range(since + 1):
        step = 9 + number
        for rank in range(4):
            stage.report("ab"[rank // 2], "step", 1, rank=rank, step=step, next="save", own_s=1.0, seconds=1.0)
        stage.turn()
        stage.clock.now += 0.8
        took_s = 1.0 if number else 300.0
        began = stage.clock.now - 1.0
        stage.report("a", "checkpoint", 1, rank=0, step=step, path="x", committed=began + took_s)
        for rank in range(4):
            stage.report("ab"[rank // 2], "step", 1, rank=rank, step=step, next="step", own_s=1.0, seconds=1.0)
        stage.turn()
    stage.gang.say("notice", "b", reason="SIGTERM", within_s=25.0)
    stage.turn()
    assert bool(orders(stage)) is leaves
    assert (stage.controller.phase is Phase.RUN) is leaves

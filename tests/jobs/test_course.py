"""How far a rank has come: what it writes, what its agent reads, and what calls of torch enter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import course as module
from jobs.course import LANES, STALE_S, TRACE, Course, Progress, decode, progress_of, runs
from tests.support.gang import WarmPool

GROUP = (0, 1, 2, 3)


def read(course: Course, later_s: float = 0.0) -> Progress:
    return decode(bytes(course._memory), time.monotonic_ns() + int(later_s * 1e9))


def test_what_is_entered_is_read_back() -> None:
    course = Course()
    world, right = course.lane("all", "0", GROUP), course.lane("send", "0", (1,))
    assert course.lane("all", "0", GROUP) == world
    first = course.enter(world, 3)
    course.leave([first])
    course.wait([course.enter(right, 1)])
    course.enter(world, 3)
    found = read(course)
    assert [(lane.kind, lane.group, tuple(lane.members)) for lane in found.lanes] == [
        ("all", "0", GROUP),
        ("send", "0", (1,)),
    ]
    assert [(lane.entered, lane.left) for lane in found.lanes] == [(2, 1), (1, 0)]
    assert (found.waits, found.device, found.astray) == (((right, 1),), False, "")
    assert Progress.from_json(found.to_json()) == found
    course.wait(())
    assert read(course).waits == ()


def test_entries_that_end_out_of_order_end_all_before_them() -> None:
    course = Course()
    lane = course.lane("all", "0", GROUP)
    entries = [course.enter(lane, 0) for _ in range(3)]
    course.leave([entries[2]])
    course.leave([entries[0]])
    assert read(course).lanes[0].left == 3


def steps(course: Course, *each: list[int], micro_batches: int = 1) -> str:
    """Steps of entries in two lanes; the last goes on. What it is that departs."""
    lanes = [course.lane("all", "0", GROUP), course.lane("all", "1", (0, 2))]
    for number, entered in enumerate(each):
        if number:
            course.end()
            course.enter(lanes[1], 0)  # between steps: does not count
        course.begin(micro_batches)
        for lane in entered:
            course.enter(lanes[lane], 0)
    return read(course).astray


def test_a_step_that_departs_from_the_one_before_is_seen() -> None:
    assert steps(Course(), [0, 0, 1]) == ""
    assert steps(Course(), [0, 0, 1], [0, 0, 1]) == ""
    assert steps(Course(), [0, 0, 1], [0, 0, 1], [0]) == "", "it is not over"
    assert steps(Course(), [0, 0, 1], [0, 1]) == (
        "entry 2 of its step is with ranks 0, 2 (group 1), in the step before with ranks 0 to 3 (group 0)"
    )
    assert "3 things in its step, 2 in the step before" in steps(Course(), [0, 0], [0, 0], [0, 0, 1])
    assert "in the one before that" in steps(Course(), [0, 0, 1], [0, 0], [0])


def test_another_operation_of_the_same_group_is_seen() -> None:
    course = Course()
    steps(course, [0, 0])
    course.end()
    course.begin(1)
    course.enter(0, 7)
    told = "entry 1 of its step is another operation with ranks 0 to 3 (group 0) than in the step before"
    assert read(course).astray == told


def test_steps_of_another_size_are_not_compared() -> None:
    course = Course()
    steps(course, [0, 0], [0, 0])
    course.end()
    assert steps(course, [0, 0, 1], [0, 0, 1], [0, 0, 1], micro_batches=2) == ""
    course.end()
    assert steps(course, [1], micro_batches=3) == ""


def test_a_step_too_long_to_remember_is_compared_as_far_as_it_is() -> None:
    assert steps(Course(), [0] * (TRACE + 5), [0] * (TRACE + 9)) == ""
    assert "entry 9 " in steps(Course(), [0] * (TRACE + 5), [0] * 8 + [1])


def test_what_a_device_waits_for_holds_while_it_is_looked_at() -> None:
    course = Course(device=True)
    lane = course.lane("all", "0", GROUP)
    first, second = course.enter(lane, 0), course.enter(lane, 0)
    course.wait_on_device([first])
    course.wait([second])
    assert (read(course).waits, read(course).device) == ((first,), True)
    late = read(course, later_s=STALE_S + 1)
    assert (late.waits, late.device) == ((second,), False), "the rank runs no Python code any more"


def test_there_is_room_for_many_lanes_and_an_end_to_it() -> None:
    course = Course()
    found = [course.lane("send", "0", (peer,)) for peer in range(LANES + 3)]
    assert found == [*range(LANES), -1, -1, -1]
    large = Course()
    while (lane := large.lane("all", f"{'x' * 4000}{len(large._lanes)}", GROUP)) >= 0:
        large.enter(lane, 0)
    assert len(read(large).lanes) == 16


@pytest.mark.parametrize("damage", [b"", b"x" * module.SIZE, b"\0" * module.SIZE])
def test_something_else_is_not_read(damage: bytes) -> None:
    with pytest.raises(ValueError, match="course of a rank"):
        decode(damage, 0)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((5,), ((5, 5, 1),)),
        ((0, 1, 2, 3), ((0, 3, 1),)),
        ((1, 3, 5), ((1, 5, 2),)),
        ((0, 1, 8, 9), ((0, 1, 1), (8, 9, 1))),
        ((0, 2, 3), ((0, 2, 2), (3, 3, 1))),
        (tuple(range(0, 25_000, 8)), ((0, 24_992, 8),)),
    ],
)
def test_ranks_are_told_in_few_words(ranks: tuple[int, ...], expected: tuple[tuple[int, int, int], ...]) -> None:
    assert runs(ranks) == expected
    assert [rank for first, last, stride in expected for rank in range(first, last + 1, stride)] == list(ranks)


STOPPED = """
import os, signal
from jobs.course import Course
course = Course()
course.wait([course.enter(course.lane("all", "0", (0, 1)), 0)])
print("ready", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_process_that_is_stopped_is_read_all_the_same() -> None:
    with subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            found = progress_of(process.pid)
            assert found is not None
            assert found.waits == ((0, 1),)
        finally:
            process.send_signal(signal.SIGKILL)
    assert progress_of(process.pid) is None


def test_a_process_that_keeps_no_course_has_none() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert progress_of(process.pid) is None
        process.kill()


# --- on real groups -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


def test_every_way_to_communicate_is_counted_alike_on_all_ranks(pool: WarmPool) -> None:
    told: list[dict[str, Any]] = pool.run("tests.support.course_ranks:communicate", world_size=4)
    found = [Progress.from_json(one) for one in told]
    assert not any(at.waits or at.device or at.astray for at in found)
    for rank, at in enumerate(found):
        lanes = {(lane.kind, tuple(lane.members)): lane for lane in at.lanes}
        assert all(lane.entered == lane.left for lane in at.lanes), at.lanes
        counts = {place: lane.entered for place, lane in lanes.items()}
        half = (0, 2) if rank % 2 == 0 else (1, 3)
        after, before = (rank + 1) % 4, (rank - 1) % 4
        expected: dict[tuple[str, tuple[int, ...]], int] = {("all", GROUP): 7, ("all", half): 2}
        assert counts == expected | {("send", (after,)): 2, ("recv", (before,)): 2}
        assert {lane.group for lane in at.lanes if tuple(lane.members) == half} == {
            lane.group for lane in found[half[0]].lanes if tuple(lane.members) == half
        }


def test_a_collective_is_counted_while_it_lasts(pool: WarmPool, tmp_path: Path) -> None:
    """Rank 1 looks at rank 0, which waits for it."""
    mine, other = pool.run("tests.support.course_ranks:look", world_size=2, run_dir=str(tmp_path))
    assert mine is None
    seen = Progress.from_json(other)
    ((lane, number),) = seen.waits
    assert (seen.lanes[lane].kind, number, seen.lanes[lane].entered, seen.lanes[lane].left) == ("all", 2, 2, 1)

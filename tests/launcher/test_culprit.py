"""Who holds the gang up? Toy gangs run into hangs at every place, on processes and on devices."""

from __future__ import annotations

import random

import pytest

from jobs import course
from jobs.course import Progress
from launcher.hang import Standing, culprit
from strategies.plan import ParallelPlan
from tests.support.toy_gang import HANG, READ, Op, ToyGang, groups, programme

STEPS = 3
STACK = 'File "/x/jobs/engine/core.py", line 7 in _mean'  # where a number is read: the same for all, and no evidence
PLANS = {
    "tp2 pp2": ParallelPlan(tp=2, pp=2, zero_stage=1, stages=(1, 1), micro_batch=1, grad_accum=3),
    "dp2 pp2": ParallelPlan(dp=2, pp=2, zero_stage=1, stages=(1, 1), micro_batch=1, grad_accum=2),
    "tp2 dp2 pp2": ParallelPlan(tp=2, dp=2, pp=2, zero_stage=1, stages=(1, 1), micro_batch=1, grad_accum=2),
    "dp4": ParallelPlan(dp=4, zero_stage=1, stages=(2,), micro_batch=1, grad_accum=2),
    "tp4": ParallelPlan(tp=4, stages=(2,), micro_batch=1, grad_accum=2),
}


@pytest.fixture(autouse=True)
def ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of ranks live in this process, and nobody reads their memory from outside."""
    monkeypatch.setattr(course, "_shared", lambda: bytearray(course.SIZE))


def programmes(plan: ParallelPlan) -> dict[int, list[Op]]:
    return {rank: programme(plan, rank, STEPS) for rank in range(plan.world_size)}


def judged(progress: dict[int, Progress]) -> tuple[int, str]:
    return culprit({rank: Standing(step=1, state="S", stack=STACK, progress=at) for rank, at in progress.items()})


def places(plan: ParallelPlan, rank: int) -> list[int]:
    """Where in the last step but one something may happen; of a larger gang every third place, others on each rank."""
    reads = [index for index, op in enumerate(programme(plan, rank, STEPS)) if op.kind == READ]
    found = list(range(reads[-3] + 1, reads[-2] + 1))
    return found if plan.world_size <= 4 else sorted({found[0], *found[rank % 3 :: 3]})


@pytest.mark.parametrize("on_device", [False, True], ids=["processes", "devices"])
@pytest.mark.parametrize("name", PLANS)
def test_a_rank_that_stands_still_anywhere_is_named(name: str, on_device: bool) -> None:
    plan = PLANS[name]
    for rank in range(plan.world_size):
        for place in places(plan, rank):
            all_ranks = programmes(plan)
            all_ranks[rank].insert(place, Op(kind=HANG))
            gang = ToyGang(all_ranks, groups(plan), on_device=on_device)
            found, why = judged(gang.run())
            assert not gang.done
            assert found == rank or (found == -1 and on_device), (place, why)
            if place == places(plan, rank)[0]:
                assert found == rank, "in its data, with nothing under way: as plain as can be"


@pytest.mark.parametrize("on_device", [False, True], ids=["processes", "devices"])
@pytest.mark.parametrize("name", PLANS)
def test_nobody_is_blamed_for_a_link(name: str, on_device: bool) -> None:
    plan, draw = PLANS[name], random.Random(name)
    for _ in range(60):
        one, other = draw.sample(range(plan.world_size), 2)
        gang = ToyGang(programmes(plan), groups(plan), on_device=on_device, broken=(one, other, draw.randrange(10, 30)))
        progress = gang.run()
        assert gang.done or judged(progress)[0] == -1


@pytest.mark.parametrize("on_device", [False, True], ids=["processes", "devices"])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("how", ["another group", "left out", "twice"])
def test_the_one_that_goes_astray_is_named(how: str, name: str, on_device: bool) -> None:
    """A real deadlock: every rank waits in a collective or a transfer, for others that wait for it."""
    plan = PLANS[name]
    deadlocks = named = 0
    for rank in range(plan.world_size):
        for place in places(plan, rank):
            all_ranks = programmes(plan)
            mine = all_ranks[rank]
            if mine[place].kind == READ:
                continue
            if how == "another group" and mine[place].kind == "all" and mine[place].group != "world":
                mine[place] = Op(kind="all", group="world", ranks=tuple(range(plan.world_size)))
            elif how == "left out":
                del mine[place]
            elif how == "twice":
                mine.insert(place, mine[place])
            gang = ToyGang(all_ranks, groups(plan), on_device=on_device)
            found, why = judged(gang.run())
            if gang.done:
                continue
            deadlocks += 1
            named += found == rank
            assert found in (rank, -1), (place, why)
    assert named >= 0.9 * deadlocks


def test_a_gang_without_a_fault_comes_to_its_end() -> None:
    for plan in PLANS.values():
        for on_device in (False, True):
            gang = ToyGang(programmes(plan), groups(plan), on_device=on_device)
            progress = gang.run()
            assert gang.done
            assert not any(at.astray or at.waits for at in progress.values())

"""Who holds the gang up? Toy gangs run into hangs at every place, on processes and on devices."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import course
from jobs.course import Lane, Progress
from launcher.hang import Standing, culprit
from strategies.codec import from_json
from strategies.plan import ParallelPlan
from tests.support.toy_gang import HANG, READ, Op, ToyGang, groups, programme

STEPS = 3
RECORDED = Path(__file__).parent / "recorded"
STACK = 'File "/x/jobs/engine/core.py", line 7 in _mean'  # where a number is read: the same for all, and no evidence


def stack(*inner: str) -> str:
    """A stack, innermost frame first; ``file:function`` words, outermost first."""
    frames = ["jobs/worker.py:main", *inner]
    return "\n".join(f'File "/x/{w.partition(":")[0]}", line 7 in {w.partition(":")[2]}' for w in reversed(frames))


ALL_REDUCE = stack("jobs/engine/core.py:train_step", "torch/distributed/distributed_c10d.py:all_reduce")
LOADING = stack("jobs/stages/pretrain.py:_batches", "jobs/data/samples.py:sample")
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
            assert found == rank, (place, why)


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


# --- what the toy gangs do not show -------------------------------------------------------------------------------


def four(absent: int = 2, *, waits: bool = True) -> dict[int, Standing]:
    """Three ranks wait in a collective of all for the fourth, which stands in its data."""
    found = {}
    for rank in range(4):
        here = rank != absent
        lane = Lane(kind="all", group="0", ranks=((0, 3, 1),), entered=8 + here, left=8)
        progress = Progress(lanes=(lane,), waits=((0, 9),) if here and waits else ())
        found[rank] = Standing(step=4, state="S", stack=ALL_REDUCE if here else LOADING, progress=progress)
    return found


def test_it_is_told_what_is_waited_for_and_where_the_culprit_is() -> None:
    assert culprit(four()) == (
        2,
        "does not come to what 3 other ranks wait for, collective 9 of ranks 0 to 3: it is in sample (samples.py)",
    )


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"state": "T"}, "stopped by a signal"),
        ({"state": ""}, "no process"),
        ({"state": "?", "stack": "", "progress": None}, "does not say where it stands"),
    ],
)
def test_a_process_that_cannot_go_on_is_named_before_the_one_that_is_waited_for(odd: dict[str, Any], why: str) -> None:
    standings = four()
    standings[0] = replace(standings[0], **odd)
    rank, told = culprit(standings)
    assert (rank, why in told) == (0, True)


def test_one_that_is_stuck_in_the_kernel_is_named_if_no_other_is() -> None:
    standings = four()
    standings[0] = replace(standings[0], state="D")
    assert culprit(standings)[0] == 2
    standings[2] = replace(standings[2], state="D")
    assert culprit(standings)[1].endswith("it is in sample (samples.py), stuck in the kernel (disk, driver)")
    link = {rank: replace(four(3)[0], state="D" if rank == 1 else "S") for rank in range(4)}
    assert culprit(link) == (1, "is stuck in the kernel (disk, driver)")
    assert culprit({**link, 2: link[1]})[0] == -1


def test_in_doubt_nobody_is_named() -> None:
    """Two that do not come; one whose memory cannot be read; a communication that is not counted."""
    two = four()
    two[1] = replace(four(1)[1], step=3)
    assert culprit(two) == (-1, "nobody can be named: ranks 1, 2 do not come to what others wait for")
    unread = four()
    unread[3] = replace(unread[3], progress=None)
    assert culprit(unread)[0] == -1
    unseen = four()
    unseen[2] = replace(unseen[2], stack=ALL_REDUCE)
    assert culprit(unseen) == (-1, "nobody can be named: rank 2 is in a communication that is not counted")
    assert culprit(four(waits=False))[0] == -1
    assert culprit({rank: Standing(step=4, state="S") for rank in range(4)})[0] == -1


def test_frames_of_an_injected_fault_are_no_evidence() -> None:
    injected = stack("jobs/engine/core.py:train_step", "jobs/fault_acts.py:wrong", "jobs/faults.py:_fire")
    assert [frame for _, frame in Standing(step=1, stack=injected).frames] == ["train_step", "main"]
    standings = four()
    standings[2] = replace(standings[2], stack=injected)
    assert culprit(standings)[1].endswith("it is in train_step (core.py)")


def test_twenty_five_thousand_ranks_are_judged_at_once() -> None:
    """Half of them wait for the other half in one collective, and all of these for one in theirs."""
    world, late = 25_000, 24_999
    standings = {}
    for rank in range(world):
        upper = rank >= world // 2
        lanes = (
            Lane(kind="all", group="0", ranks=((0, world - 1, 1),), entered=5 - upper, left=4),
            Lane(kind="all", group="1", ranks=((world // 2, world - 1, 1),), entered=3 - (rank == late), left=2),
        )
        waits = () if rank == late else ((1, 3),) if upper else ((0, 5),)
        progress = Progress(lanes=lanes if upper else lanes[:1], waits=waits)
        standings[rank] = Standing(step=4, state="S", stack=LOADING, progress=progress)
    assert culprit(standings)[0] == late


def recorded(path: Path) -> dict[int, Standing]:
    """What real ranks have answered, as ``hang.json`` keeps it."""
    ranks = json.loads(path.read_text())["ranks"]
    return {int(rank): from_json(Standing, at) for rank, at in ranks.items()}


def test_there_are_recorded_hangs_of_every_kind() -> None:
    kinds = [path.name.partition("-")[0] for path in RECORDED.glob("*.json")]
    assert {*kinds} == {"stop", "spin", "deadlock"}


@pytest.mark.parametrize("name", [path.name for path in sorted(RECORDED.glob("*.json"))])
def test_real_hangs_are_judged_without_a_look_at_their_stacks(name: str) -> None:
    """``KIND-RANK-PLAN``: recorded from ranks on gloo that were stopped, held the lock or were deadlocked."""
    kind, rank, _ = name.split("-")
    standings = recorded(RECORDED / name)
    assert culprit(standings)[0] == int(rank)
    blind = {one: replace(at, stack="?") for one, at in standings.items()}
    assert culprit(blind)[0] == int(rank)
    if kind == "deadlock":
        all_wait = {one: at.progress for one, at in standings.items() if at.progress and at.progress.waits}
        assert len(all_wait) == len(standings), "every rank waits in a collective or a transfer, the culprit as well"
        straight = {one: replace(blind[one], progress=replace(at, astray="")) for one, at in all_wait.items()}
        assert culprit(straight)[0] == -1

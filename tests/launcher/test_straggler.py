"""Who is slow, and who only seems to be: judged from own times, without any process."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from launcher.observation import Observation
from launcher.straggler import LEARNED, WARM_UP, Pace, Slow, StragglerWatch, peers_of
from strategies.plan import ParallelPlan

WITHIN = 20  # steps


def plan_of(tp: int, pp: int, dp: int) -> ParallelPlan:
    return ParallelPlan(tp=tp, pp=pp, dp=dp, zero_stage=1, stages=(1,) * pp, micro_batch=1, grad_accum=pp)


def nodes_of(world: int, slots: int) -> dict[int, str]:
    return {rank: f"n{rank // slots}" for rank in range(world)}


class Gang:
    """Own times with everything that happens to real ones: noise, rare long steps, pauses, checkpoints, slow starts."""

    def __init__(self, plan: ParallelPlan, *, slots: int = 4, seed: int = 0, sigma: float = 0.08) -> None:
        self.draw, self.sigma, self.step = random.Random(seed), sigma, 0
        self.pace = Pace(peers_of(plan, nodes_of(plan.world_size, slots)))
        per_stage = plan.world_size // plan.pp
        # stages differ, and so do devices of one kind by a few per cent
        self.usual = [
            0.1 * (1 + 0.3 * (rank // per_stage)) * self.draw.gauss(1.0, 0.015) for rank in range(plan.world_size)
        ]

    def train(self, steps: int, slowdown: Callable[[int], float] = lambda rank: 1.0) -> list[Slow]:
        found = []
        for _ in range(steps):
            self.step += 1
            common = 3.0 if self.step % 500 == 0 else 1.0  # a checkpoint in the background, a data server that pauses
            common *= 5.0 if self.step <= WARM_UP else 1.0
            own = [usual * common * slowdown(rank) * self._noise() for rank, usual in enumerate(self.usual)]
            found += self.pace.note(self.step, own, 1.15 * max(own))
        return found

    def _noise(self) -> float:
        noise = self.draw.lognormvariate(0.0, self.sigma)
        if self.draw.random() < 0.01:  # a garbage collection, an interrupt storm: no mean, hardly a variance
            noise += self.draw.paretovariate(1.2) - 1
        return noise


class Restless(Gang):
    """Noise that lasts, as that of real machines does: the same for tens of steps, and not the same on all hosts.

    On top of what is drawn anew for every step, each rank drifts (autocorrelated over some 20 steps), and now and then
    something else runs on a host for 5 to 30 steps, beside one of its ranks or all, or everything is slow for a while.
    What makes a rank nearly as slow as a straggler is over before a window is full of it.
    """

    DRIFT, KEPT = 0.025, 0.95

    def __init__(self, plan: ParallelPlan, *, slots: int = 2, seed: int = 0) -> None:
        super().__init__(plan, slots=slots, seed=seed, sigma=0.05)
        self.slots, world = slots, plan.world_size
        self.drift = [self.draw.gauss(0, self.DRIFT) for _ in range(world)]
        self.burst = [(0, 1.0)] * world  # until which step, how much slower
        self.spell = (0, 1.0)  # the same of all

    def train(self, steps: int, slowdown: Callable[[int], float] = lambda rank: 1.0) -> list[Slow]:
        found = []
        for _ in range(steps):
            self.step += 1
            self.turn()
            own = [usual * self.now(rank) * slowdown(rank) * self._noise() for rank, usual in enumerate(self.usual)]
            found += self.pace.note(self.step, own, 1.15 * max(own))
        return found

    def turn(self) -> None:
        draw, world = self.draw, len(self.usual)
        fresh = (1 - self.KEPT**2) ** 0.5 * self.DRIFT
        self.drift = [self.KEPT * one + draw.gauss(0, fresh) for one in self.drift]
        if draw.random() < 1 / 250:
            node, long = draw.randrange(-(-world // self.slots)), draw.randint(5, 30)
            beside = [rank for rank in range(world) if rank // self.slots == node]
            burst = self.step + long, draw.uniform(1.03, 1.28 if long <= 12 else 1.12)
            for rank in beside if draw.random() < 0.5 else [draw.choice(beside)]:
                self.burst[rank] = burst
        if self.step > self.spell[0] and draw.random() < 1 / 200:
            self.spell = self.step + draw.randint(10, 200), draw.uniform(1.1, 3.0)

    def now(self, rank: int) -> float:
        parts = (times for until, times in (self.burst[rank], self.spell) if self.step <= until)
        return math.prod(parts, start=math.exp(self.drift[rank]))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 4), (1, 1, 2)])
def test_no_alarm_where_noise_lasts(shape: tuple[int, int, int], seed: int) -> None:
    assert Restless(plan_of(*shape), seed=seed).train(10_000) == []


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 4), (1, 1, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_a_rank_of_1_3_is_named_in_such_noise_all_the_same(shape: tuple[int, int, int], seed: int) -> None:
    gang = Restless(plan_of(*shape), seed=seed)
    assert gang.train(300) == []
    victim = seed % len(gang.usual)
    assert [slow.rank for slow in gang.train(WITHIN, lambda rank: 1.3 if rank == victim else 1.0)] == [victim]


def test_where_noise_lasts_and_is_large_it_is_learned_to_be_so() -> None:
    """A few in the beginning: then it is known that here windows are off so far although nobody is slow."""
    gang = Restless(plan_of(2, 2, 1))
    gang.DRIFT = 0.06
    alarms = [gang.train(1000) for _ in range(10)]
    assert sum(map(len, alarms[2:])) <= 4  # dozens, if that were not learned


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 4), (4, 4, 4), (1, 1, 2), (8, 1, 1)])
def test_no_alarm_in_ten_thousand_quiet_steps(shape: tuple[int, int, int]) -> None:
    steps = 10_000 if shape != (4, 4, 4) else 2_500  # the same number of steps of a rank, and more
    assert Gang(plan_of(*shape)).train(steps) == []


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 4), (4, 4, 4), (1, 1, 2), (8, 1, 1), (1, 4, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_a_rank_of_1_3_is_named_within_twenty_steps(shape: tuple[int, int, int], seed: int) -> None:
    plan = plan_of(*shape)
    victim = random.Random(seed).randrange(plan.world_size)
    gang = Gang(plan, seed=seed)
    assert gang.train(200) == []
    (found,) = gang.train(WITHIN, lambda rank: 1.3 if rank == victim else 1.0)
    assert found.rank == victim
    assert 1.2 < found.ratio < 1.45
    assert gang.train(300, lambda rank: 1.3 if rank == victim else 1.0) == []  # once


def test_a_rank_that_is_slow_from_the_start_is_named_by_its_peers() -> None:
    gang = Gang(plan_of(2, 2, 2))
    found = gang.train(WARM_UP + WITHIN, lambda rank: 1.3 if rank == 5 else 1.0)
    assert [slow.rank for slow in found] == [5]


def test_a_slow_node_that_holds_a_whole_stage_is_named_by_its_past() -> None:
    gang = Gang(plan_of(2, 4, 1), slots=2)
    assert gang.train(WARM_UP + LEARNED + WITHIN) == []
    found = gang.train(WITHIN, lambda rank: 1.4 if rank // 2 == 1 else 1.0)
    assert {slow.rank for slow in found} == {2, 3}


def test_nobody_is_slow_when_all_are() -> None:
    gang = Gang(plan_of(2, 2, 2))
    assert gang.train(100) == []
    assert gang.train(200, lambda rank: 1.5) == []


def test_who_has_recovered_may_be_named_again() -> None:
    gang = Gang(plan_of(2, 2, 2))
    slow = lambda rank: 1.4 if rank == 1 else 1.0  # noqa: E731
    assert len(gang.train(100)) + len(gang.train(WITHIN, slow)) == 1
    assert gang.train(100) == []
    assert [again.rank for again in gang.train(WITHIN, slow)] == [1]


def test_what_does_not_hold_up_the_step_is_left_alone() -> None:
    pace, found = Pace([(1,), (0,)]), []
    for step in range(1, 100):
        found += pace.note(step, [0.002, 0.001], 1.0)  # twice as long, and nobody waits for it
    assert found == []


def test_nor_does_it_hide_who_does_hold_it_up() -> None:
    """A rank that is slow and does not matter is no noise from which one would learn to overlook others."""
    pace, found = Pace([(1,), (0,), (3,), (2,), (5,), (4,)]), []
    for step in range(1, 1000 + WITHIN):
        found += pace.note(step, [0.002, 0.001, 0.5, 0.65 if step >= 1000 else 0.5, 0.5, 0.5], 1.0)
    assert [slow.rank for slow in found] == [3]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("shape", "since"),  # of two ranks none has slowed down by 1.3 against one that has itself since the beginning
    [((1, 1, 2), 1), *((shape, since) for shape in [(2, 2, 1), (1, 2, 4), (8, 1, 1), (1, 4, 1)] for since in (1, 400))],
)
def test_nor_does_one_that_is_always_a_little_slow(shape: tuple[int, int, int], since: int, seed: int) -> None:
    """Heat, which lasts: it is on its own account, and no noise from which one would learn to overlook another."""
    gang = Gang(plan_of(*shape), seed=seed, sigma=0.03)
    world = len(gang.usual)
    gang.usual = [0.1] * world
    hot = seed % world
    victim = (hot + world // 2) % world

    def heat(rank: int) -> float:
        return 1.16 if rank == hot and gang.step >= since else 1.0

    assert gang.train(800, heat) == []
    found = gang.train(WITHIN, lambda rank: heat(rank) * (1.3 if rank == victim else 1.0))
    assert [slow.rank for slow in found] == [victim]


def test_peers_are_of_the_same_stage_and_of_another_node_where_there_is_one() -> None:
    assert peers_of(plan_of(2, 2, 1), nodes_of(4, 2)) == [(1,), (0,), (3,), (2,)]
    assert peers_of(plan_of(1, 2, 2), nodes_of(4, 1)) == [(1,), (0,), (3,), (2,)]
    assert peers_of(plan_of(2, 1, 2), nodes_of(4, 2)) == [(2, 3), (2, 3), (0, 1), (0, 1)]
    assert peers_of(plan_of(1, 2, 1), nodes_of(2, 1)) == [(), ()]


def say(watch: StragglerWatch, rank: int, step: int, own_s: float) -> None:
    data = {"kind": "step", "rank": rank, "attempt": 1, "step": step, "next": "step", "own_s": own_s, "seconds": 0.5}
    watch.note(Observation(kind="report", node=f"node-{rank // 2}", time=float(step), data=data))


@pytest.mark.parametrize(("data_s", "told"), [(0.15, ", of which it waited 0.15 s for its samples"), (0.01, "")])
def test_a_slow_disk_is_named_as_what_it_is(data_s: float, told: str) -> None:
    """Rank 2 waits for its samples, the others wait for it in their exchanges: rank 0 knows nothing of it."""
    watch = StragglerWatch()
    watch.begin(plan_of(2, 2, 1))
    for step in range(1, 40):
        for rank in range(4):
            slow = rank == 2
            data = {"kind": "step", "rank": rank, "step": step, "seconds": 0.3, "own_s": 0.25 if slow else 0.1}
            data["data_s"] = data_s if slow else 0.0
            watch.note(Observation(kind="report", node=f"node-{rank // 2}", time=float(step), data=data))
    ((failure, ratio),) = watch.take()
    assert failure.rank == 2
    assert ratio == pytest.approx(2.5)
    assert failure.detail.endswith(f"2.50x as long as it should for its part of a step, 0.25 s{told}")


# --- more ranks than cores ----------------------------------------------------------------------------------------


def crowd(steps: int, *, slow: int = -1, hogged: int = -1, fair: bool = True, seed: int = 0) -> list[int]:
    """Who is named among four ranks on two cores; rank 3 has got the worse of the two.

    Args:
        steps: How many.
        slow: A rank that computes 1.3 times as long.
        hogged: All have a core of their own, but for this rank, beside which something else runs.
        fair: The ranks tell how long they waited for a core.
        seed: Of the draws.
    """
    draw, watch = random.Random(seed), StragglerWatch()
    watch.begin(plan_of(2, 2, 1))
    for step in range(1, steps + 1):
        for rank in range(4):
            works = 0.1 * draw.lognormvariate(0.0, 0.05) * (1.3 if rank == slow and step > 50 else 1.0)
            waits = 0.1 * draw.lognormvariate(0.0, 0.3) * (1.5 if rank == 3 else 1.0)
            if hogged >= 0:
                waits = 0.05 if rank == hogged and step > 50 else 0.0
            times = {"own_s": works + waits, "seconds": 0.4, "queued_s": waits if fair else 0.0}
            data = {"kind": "step", "rank": rank, "step": step, **times}
            watch.note(Observation(kind="report", node=f"node-{rank // 2}", time=1.0, data=data))
    return [failure.rank for failure, _ in watch.take()]


def test_who_waits_for_a_core_is_not_slow() -> None:
    assert crowd(300, fair=False) == [3]
    assert crowd(10_000) == []


@pytest.mark.parametrize("seed", range(5))
def test_who_is_slow_among_them_is_named_all_the_same(seed: int) -> None:
    assert crowd(50 + WITHIN, slow=seed % 3, seed=seed) == [seed % 3]


@pytest.mark.parametrize("seed", range(3))
def test_a_node_on_which_something_else_runs_is_slow(seed: int) -> None:
    assert crowd(50 + WITHIN, hogged=1, seed=seed) == [1]


def test_reports_lead_to_a_name_with_node_and_coordinates() -> None:
    watch = StragglerWatch()
    say(watch, 0, 1, 0.1)  # before the attempt has begun
    watch.begin(plan_of(2, 2, 1))
    for step in range(1, 30):
        for rank in range(4):
            if (step, rank) != (7, 2):  # a report that the controller has never seen
                say(watch, rank, step, 0.4 if rank == 3 else 0.3)
    ((failure, ratio),) = watch.take()
    assert (failure.rank, failure.node) == (3, "node-1")
    assert "rank 3 on node-1 (pipe 1, data 0, model 1) takes 1.33x" in failure.detail
    assert ratio == pytest.approx(0.4 / 0.3)
    assert watch.take() == []

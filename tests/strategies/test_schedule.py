"""Steps, samples and rows."""

from __future__ import annotations

import json
import random

import pytest

from strategies.errors import ConfigError
from strategies.plan import ParallelPlan, accumulation
from strategies.schedule import BatchChange, SampleSchedule, Skip


def _plan(dp: int, micro_batch: int, global_batch: int) -> ParallelPlan:
    return ParallelPlan(
        dp=dp, stages=(1,), micro_batch=micro_batch, grad_accum=accumulation(global_batch, micro_batch, dp)
    )


def _consumed(schedule: SampleSchedule, step: int, plan: ParallelPlan) -> list[list[int | None]]:
    """Rows of a step, by replica."""
    return [
        [index for micro in range(plan.grad_accum) for index in schedule.rows(step, rank, micro, plan)]
        for rank in range(plan.dp)
    ]


def test_steps_count_from_one_and_take_the_batch_in_order() -> None:
    schedule = SampleSchedule(global_batch=10)
    assert schedule.step_range(1) == range(10)
    assert schedule.step_range(2) == range(10, 20)
    assert schedule.step_range(10**12) == range(10**13 - 10, 10**13)


@pytest.mark.parametrize("seed", range(40))
def test_any_plan_consumes_each_sample_exactly_once(seed: int) -> None:
    rng = random.Random(seed)
    dp, micro_batch = rng.randint(1, 7), rng.randint(1, 4)
    size = rng.randint(dp * micro_batch, 60)
    schedule, plan, step = SampleSchedule(global_batch=size), _plan(dp, micro_batch, size), rng.randint(1, 10**6)
    by_replica = _consumed(schedule, step, plan)
    rows = [index for replica in by_replica for index in replica]
    assert sorted(index for index in rows if index is not None) == list(schedule.step_range(step))
    assert rows.count(None) == plan.rows_per_step - size
    assert all(any(index is not None for index in replica) for replica in by_replica)


def test_padding_is_spread_over_the_last_micro_batch() -> None:
    schedule, plan = SampleSchedule(global_batch=9), _plan(4, 1, 9)
    assert _consumed(schedule, 1, plan) == [[0, 4, 8], [1, 5, None], [2, 6, None], [3, 7, None]]


def test_a_wider_micro_batch_holds_neighbours() -> None:
    schedule, plan = SampleSchedule(global_batch=7), _plan(2, 2, 7)
    assert schedule.rows(1, 1, 0, plan) == (2, 3)
    assert schedule.rows(1, 1, 1, plan) == (6, None)


def test_a_batch_may_grow() -> None:
    schedule = SampleSchedule(
        global_batch=4, changes=(BatchChange(step=3, global_batch=6), BatchChange(step=5, global_batch=10))
    )
    assert [schedule.step_range(step) for step in range(1, 7)] == [
        range(4),
        range(4, 8),
        range(8, 14),
        range(14, 20),
        range(20, 30),
        range(30, 40),
    ]


def test_skipped_samples_are_never_consumed() -> None:
    schedule = SampleSchedule(global_batch=4, skips=(Skip(step=3, samples=100), Skip(step=3, samples=8)))
    assert [schedule.step_range(step).start for step in range(1, 5)] == [0, 4, 116, 120]


@pytest.mark.parametrize("seed", range(20))
def test_seeking_agrees_with_walking(seed: int) -> None:
    rng = random.Random(seed)
    changes, step = [], 1
    for _ in range(rng.randint(0, 4)):
        step += rng.randint(1, 5)
        changes.append(BatchChange(step=step, global_batch=rng.randint(1, 9)))
    skips = tuple(Skip(step=rng.randint(1, 20), samples=rng.randint(0, 30)) for _ in range(rng.randint(0, 4)))
    schedule = SampleSchedule(global_batch=rng.randint(1, 9), changes=tuple(changes), skips=skips)
    position = 0
    for at in range(1, 31):
        position += sum(skip.samples for skip in skips if skip.step == at)
        assert schedule.step_range(at) == range(position, position + schedule.batch_at(at))
        position += schedule.batch_at(at)


def test_a_smaller_batch_of_a_ramp_is_padded_under_the_same_plan() -> None:
    schedule = SampleSchedule(global_batch=2, changes=(BatchChange(step=2, global_batch=8),))
    plan = _plan(2, 2, 8)
    assert _consumed(schedule, 1, plan) == [[0, 1, None, None], [None] * 4]
    assert _consumed(schedule, 2, plan) == [[2, 3, 6, 7], [4, 5, 8, 9]]


def test_a_plan_with_too_few_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 9 samples, the plan only 8 rows"):
        SampleSchedule(global_batch=9).rows(1, 0, 0, _plan(2, 2, 8))


@pytest.mark.parametrize(("data_rank", "micro_index"), [(2, 0), (-1, 0), (0, 2), (0, -1)])
def test_rows_outside_of_the_plan_are_refused(data_rank: int, micro_index: int) -> None:
    with pytest.raises(ConfigError):
        SampleSchedule(global_batch=8).rows(1, data_rank, micro_index, _plan(2, 2, 8))


def test_step_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="count from 1"):
        SampleSchedule(global_batch=8).step_range(0)


@pytest.mark.parametrize(
    "values",
    [
        {"global_batch": 0},
        {"global_batch": 1, "changes": (BatchChange(step=1, global_batch=2),)},
        {"global_batch": 1, "changes": (BatchChange(step=2, global_batch=0),)},
        {"global_batch": 1, "changes": (BatchChange(step=5, global_batch=2), BatchChange(step=4, global_batch=3))},
        {"global_batch": 1, "skips": (Skip(step=0, samples=1),)},
        {"global_batch": 1, "skips": (Skip(step=1, samples=-1),)},
    ],
)
def test_impossible_schedules_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SampleSchedule(**values)  # type: ignore[arg-type]


def test_the_state_survives_json() -> None:
    schedule = SampleSchedule(
        global_batch=4, changes=(BatchChange(step=9, global_batch=8),), skips=(Skip(step=2, samples=3),)
    )
    state = json.loads(json.dumps(schedule.state(12)))
    assert state["next_step"] == 12
    assert state["next_index"] == schedule.step_range(12).start
    assert SampleSchedule.from_state(state) == schedule


def test_a_state_that_disagrees_with_itself_is_refused() -> None:
    state = SampleSchedule(global_batch=4).state(12)
    with pytest.raises(ConfigError, match="starts step 12 at sample 44, not at 45"):
        SampleSchedule.from_state(state | {"next_index": 45})
    with pytest.raises(ConfigError, match="malformed"):
        SampleSchedule.from_state({"schedule": state["schedule"]})


def test_skipped_ranges_are_those_that_no_step_has() -> None:
    skips = (Skip(step=9, samples=3), Skip(step=4, samples=5), Skip(step=4, samples=2), Skip(step=1, samples=1))
    schedule = SampleSchedule(global_batch=8, changes=(BatchChange(step=6, global_batch=4),), skips=skips)
    found = schedule.skipped()
    assert [skip.step for skip, _ in found] == [1, 4, 4, 9]
    assert [len(indices) for _, indices in found] == [1, 5, 2, 3]
    used = {index for step in range(1, 12) for index in schedule.step_range(step)}
    left_out = {index for _, indices in found for index in indices}
    assert not used & left_out
    assert used | left_out == set(range(schedule.first_index(12)))

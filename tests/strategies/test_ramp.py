"""A batch that grows: sizes, steps, restarts, and what is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from strategies.codec import from_json, to_json
from strategies.ramp import Level, Ramp, RampPoint
from strategies.resolve import resolve_plan
from strategies.rules import check
from strategies.schedule import SampleSchedule, Skip
from strategies.specs import BatchSpec
from strategies.workload import Workload, run_tokens
from tests.strategies.support import FOUR_BY_TWO, TINY, plan


def ramped(full: int = 8, seq: int = 32, **ramp: Any) -> BatchSpec:
    return BatchSpec(global_batch=full, seq=seq, ramp=Ramp(**ramp))


def sizes(batch: BatchSpec, steps: int) -> list[int]:
    schedule = SampleSchedule.of(batch)
    return [schedule.batch_at(step) for step in range(1, steps + 1)]


def test_increments_share_the_samples_evenly() -> None:
    assert sizes(ramped(start=2, increment=2, samples=18), 9) == [2, 2, 2, 4, 4, 6, 8, 8, 8]
    assert ramped(start=2, increment=2, samples=18).levels == (Level(0, 2), Level(6, 4), Level(12, 6), Level(18, 8))


def test_gpt_3_goes_from_32_thousand_to_3_million_tokens_in_12_billion() -> None:
    batch = ramped(1552, 2048, start=16, increment=16, tokens=12e9)
    schedule = SampleSchedule.of(batch)
    assert len(schedule.changes) == 96
    full = schedule.changes[-1]
    assert full.global_batch == 1552
    assert 12e9 <= schedule.trained(full.step) * 2048 < 12e9 + 1552 * 2048
    assert schedule.step_range(10**6).start == schedule.first_index(10**6)


def test_a_list_gives_any_sizes() -> None:
    points = (RampPoint(tokens=0, global_batch=1), RampPoint(tokens=96, global_batch=5))
    assert sizes(ramped(points=points, tokens=300), 6) == [1, 1, 1, 5, 5, 8]


def test_small_levels_may_be_passed_over() -> None:
    assert sizes(ramped(64, start=60, increment=1, samples=4), 3) == [60, 64, 64]


@pytest.mark.parametrize("seed", range(30))
def test_a_ramp_goes_by_what_has_been_trained_on(seed: int) -> None:
    """Walking agrees with the compiled changes; going on from any step, with skips before, changes nothing."""
    rng = random.Random(seed)
    start, increment, count = rng.randint(1, 5), rng.randint(1, 4), rng.randint(1, 6)
    full = start + increment * count
    batch = ramped(full, start=start, increment=increment, samples=rng.randint(1, 200))
    skips = tuple(Skip(step=rng.randint(1, 40), samples=rng.randint(0, 30)) for _ in range(rng.randint(0, 3)))
    schedule, trained = SampleSchedule.of(batch, skips), 0
    for step in range(1, 60):
        size = max(level.global_batch for level in batch.levels if level.samples <= trained)
        assert schedule.batch_at(step) == size
        assert schedule.trained(step) == trained
        assert schedule.steps_for(trained) == step - 1
        assert schedule.steps_for(trained + 1) == step
        assert schedule.onward(step, batch) == schedule
        trained += size
    state = json.loads(json.dumps(schedule.state(17)))
    assert SampleSchedule.from_state(state) == schedule


def test_another_ramp_counts_from_there_on() -> None:
    schedule = SampleSchedule.of(ramped(start=2, increment=2, samples=18))
    later = schedule.onward(5, ramped(start=2, increment=2, samples=36))
    assert [later.batch_at(step) for step in range(1, 9)] == [2, 2, 2, 4, 2, 4, 4, 4]
    assert later.trained(6) == 12
    assert schedule.onward(5, BatchSpec(global_batch=7, seq=32)).step_range(6) == range(17, 24)


@pytest.mark.parametrize("seed", range(20))
def test_every_plan_consumes_the_same_samples_in_every_step(seed: int) -> None:
    rng = random.Random(seed)
    batch = ramped(12, start=4, increment=rng.choice([1, 2, 4]), samples=40)
    schedule = SampleSchedule.of(batch)
    for step in range(1, 12):
        for dp, micro_batch in [(1, 1), (2, 2), (3, 1), (4, 1)]:
            the_plan = plan(batch=batch, dp=dp, micro_batch=micro_batch)
            count = schedule.micro_batches(step, the_plan)
            rows = [
                row
                for rank in range(dp)
                for micro in range(count)
                for row in schedule.rows(step, rank, micro, the_plan)
            ]
            assert sorted(row for row in rows if row is not None) == list(schedule.step_range(step))
            assert len(rows) - schedule.batch_at(step) < dp * micro_batch, "no micro-batch is padding alone"
            assert count <= the_plan.grad_accum


def test_dualpipev_pads_small_steps_to_the_micro_batches_that_it_needs() -> None:
    batch = ramped(16, start=4, increment=4, samples=40)
    the_plan = plan(batch=batch, pp=4, schedule="dualpipev")
    schedule = SampleSchedule.of(batch)
    assert [schedule.micro_batches(step, the_plan) for step in (1, 4, 9)] == [8, 8, 16]


@pytest.mark.parametrize(
    ("ramp", "rule", "message", "hint"),
    [
        (Ramp(start=2, increment=2), "ramp_ends", "neither of samples and tokens", "train.ramp.samples=N"),
        (Ramp(start=2, increment=2, samples=8, tokens=8.0), "ramp_ends", "both of samples and tokens", "tokens=N"),
        (Ramp(start=8, increment=2, samples=9), "ramp_ascends", "start 8 does not ascend", "nearest legal start: 6"),
        (Ramp(increment=2, samples=9), "ramp_ascends", "start 0", "nearest legal start: 2"),
        (Ramp(start=2, increment=4, samples=9), "ramp_whole", "increment 4", "nearest legal increment: 3 or 6"),
        (Ramp(start=2, samples=9), "ramp_whole", "increment 0 does not lead from 2 to 8", "increment: 1"),
        (
            Ramp(points=(RampPoint(tokens=0, global_batch=4), RampPoint(tokens=64, global_batch=2)), tokens=99.0),
            "ramp_ascends",
            "the sizes 4, 2, 8 do not ascend",
            "larger",
        ),
        (Ramp(points=(RampPoint(tokens=9, global_batch=4),), tokens=99.0), "ramp_ascends", "the tokens 9", "later"),
        (
            Ramp(points=(RampPoint(tokens=0, global_batch=4), RampPoint(tokens=640, global_batch=5)), samples=20),
            "ramp_ends",
            "ends after 640 tokens",
            "train.ramp.tokens above 640",
        ),
        (
            Ramp(start=1, points=(RampPoint(tokens=0, global_batch=4),), tokens=99.0),
            "ramp_whole",
            "points, and start",
            "one or the other",
        ),
    ],
)
def test_impossible_ramps_are_refused(ramp: Ramp, rule: str, message: str, hint: str) -> None:
    batch = BatchSpec(global_batch=8, seq=32, ramp=ramp)
    SampleSchedule.of(batch)  # whatever the numbers, there are sizes to show
    broken = check(model=TINY, plan=plan(batch=batch), batch=batch, cluster=None, precision="fp32")
    (found,) = [one for one in broken if one.rule == rule]
    assert message in found.message
    assert hint in found.hint


def test_everything_that_is_wrong_is_told_at_once() -> None:
    batch = ramped(start=9, increment=5)
    rules = {one.rule for one in check(model=TINY, plan=plan(batch=batch), batch=batch, cluster=None, precision="fp32")}
    assert {"ramp_ends", "ramp_ascends"} <= rules


def test_a_start_that_leaves_replicas_without_work_is_refused() -> None:
    batch = ramped(16, start=4, increment=4, samples=40)
    the_plan = plan(batch=batch, dp=4, micro_batch=2)
    (found,) = check(model=TINY, plan=the_plan, batch=batch, cluster=None, precision="fp32")
    assert found.rule == "ramp_feeds_replicas"
    assert "starts with 4 sequences per step, dp 4 x micro_batch 2 = 8 rows" in found.message
    assert found.hint == "a ramp that starts at 8 or more; or dp at most 2; or micro_batch at most 1"
    assert not check(model=TINY, plan=plan(batch=batch, dp=3), batch=batch, cluster=None, precision="fp32")


def test_the_number_of_replicas_follows_the_smallest_batch() -> None:
    assert resolve_plan(TINY, ramped(16, start=3, increment=1, samples=9), FOUR_BY_TWO, "fp32").dp == 3
    assert resolve_plan(TINY, BatchSpec(global_batch=16, seq=32), FOUR_BY_TWO, "fp32").dp == 8


def test_steps_and_tokens_of_a_run() -> None:
    batch = ramped(start=2, increment=2, samples=18)  # 2, 2, 2, 4, 4, 6, 8, 8, ...
    assert run_tokens(batch, 7) == 28 * 32
    work = Workload(model=TINY, batch=batch, cluster=FOUR_BY_TWO, precision="fp32", tokens=28 * 32)
    assert work.step_count(plan(batch=batch)) == pytest.approx(3 * 2 / 8 + 2 * 4 / 8 + 6 / 8 + 1)
    even = replace(work, batch=BatchSpec(global_batch=8, seq=32))
    assert even.step_count(plan(batch=even.batch)) == 4
    assert from_json(BatchSpec, to_json(batch)) == batch

"""What is a blow-up and what is not: spikes are found, noise and the fall of a loss are not taken for one."""

from __future__ import annotations

import json
import math
import random

import pytest

from jobs.numerics import LEAST_SEEN, WINDOW, LossWatch

QUIET_STEPS = 10_000


def curve(step: int) -> float:
    """A loss as it falls in pretraining: fast, then slower and slower."""
    return 1.7 + 9.0 * math.pow(1.0 + step / 15.0, -0.7)


def noise(draw: random.Random, heavy: bool) -> float:
    """Normal, or with the tails of Student's t with five degrees of freedom."""
    normal = draw.gauss(0.0, 1.0)
    return normal / math.sqrt(draw.gammavariate(2.5, 2.0) / 5.0) if heavy else normal


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("size", [0.002, 0.02, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_no_alarm_in_ten_thousand_quiet_steps(heavy: bool, size: float, seed: int) -> None:
    draw, watch = random.Random(seed), LossWatch(10.0)
    alarms = [
        (step, why)
        for step in range(QUIET_STEPS)
        if (why := watch.judge(curve(step) * (1 + size * noise(draw, heavy)), 1.0))
    ]
    assert alarms == []


def test_no_alarm_while_a_warm_up_swings() -> None:
    draw, watch = random.Random(1), LossWatch(10.0)
    for step in range(2000):
        wave = 0.03 * math.sin(step / 12.0)
        assert not watch.judge(curve(step) * (1 + wave + 0.01 * draw.gauss(0.0, 1.0)), 1.0)


@pytest.mark.parametrize("at", [LEAST_SEEN, 40, 3000])
def test_a_spike_is_found_wherever_it_is(at: int) -> None:
    """A third above the present loss is enough late; early, while the loss still falls fast, it takes more."""
    draw, watch = random.Random(2), LossWatch(10.0)
    for step in range(at):
        assert not watch.judge(curve(step) * (1 + 0.01 * draw.gauss(0.0, 1.0)), 1.0)
    height = 4 / 3 if at == 3000 else 3.0
    why = watch.judge(curve(at) * height, 1.0)
    assert "the loss spiked to" in why
    assert "train.spike_sigmas=10" in why


def test_only_enough_losses_make_a_median() -> None:
    watch = LossWatch(10.0)
    for _ in range(LEAST_SEEN - 1):
        assert not watch.judge(1.0, 1.0)
    assert not watch.judge(1000.0, 1.0)


def test_a_flat_loss_may_rise_a_little() -> None:
    watch = LossWatch(10.0, [2.0] * WINDOW)
    assert not watch.judge(2.49, 1.0)
    assert watch.judge(2.6, 1.0)


@pytest.mark.parametrize("sigmas", [0.0, 10.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_always_a_blow_up(sigmas: float, bad: float) -> None:
    assert LossWatch(sigmas).judge(bad, 1.0) == f"the loss is {bad}"
    assert LossWatch(sigmas).judge(1.0, bad) == "the gradients are not finite"


def test_zero_takes_spikes_as_they_come() -> None:
    watch = LossWatch(0.0, [2.0] * WINDOW)
    assert not watch.judge(1e9, 1.0)


def test_a_blow_up_does_not_enter_the_window() -> None:
    watch = LossWatch(10.0, [2.0] * WINDOW)
    before = watch.state
    assert watch.judge(50.0, 1.0)
    assert watch.judge(math.nan, 1.0)
    assert watch.state == before


def test_an_interrupted_run_judges_as_one_that_was_not() -> None:
    draw = random.Random(3)
    losses = [curve(step) * (1 + 0.01 * draw.gauss(0.0, 1.0)) for step in range(200)]
    whole, parts = LossWatch(10.0), LossWatch(10.0)
    for step, loss in enumerate(losses):
        if step % 17 == 0:  # over a checkpoint's JSON
            parts = LossWatch(10.0, json.loads(json.dumps(parts.state)))
        whole.judge(loss, 1.0)
        parts.judge(loss, 1.0)
        assert whole.state == parts.state
    assert len(whole.state) == WINDOW
    assert whole.judge(9.0, 1.0) == parts.judge(9.0, 1.0) != ""

"""The event simulation, and its agreement with the closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from strategies.failures import Process, Standby, process, shares
from strategies.finish import finish_days
from strategies.reliability import losses, outlook
from strategies.simulation import simulate, simulate_process
from tests.strategies.runs import A100, plan_of, work

FEW, MANY = 30, 12000
"""Failures of one run that find the gang at work, for its finish; and of all runs of a case, for its goodput (which is
then known to 0.3 %)."""


def case(
    nodes: int, step_s: float, parameters: float, standby: Standby | None = None, *, tier: bool = True, **figures: Any
) -> Any:
    """A case: (process, standby, seconds of a step)."""
    hardware = replace(A100, **figures)
    return process(nodes, step_s, 12 * parameters, hardware, memory_tier=tier), standby, step_s


GRID = {
    "16 nodes": case(16, 2.0, 7e9, Standby(1), restart_s=30.0),
    "GPT-3, a spare": case(128, 20.0, 175e9, Standby(1)),
    "GPT-3, no spare": case(128, 20.0, 175e9, Standby(0)),
    "GPT-3, shrinks": case(128, 20.0, 175e9, Standby(0, 8, 0.065)),
    "GPT-3, disk only": case(128, 20.0, 175e9, tier=False),
    "Llama 3": case(2048, 8.0, 405e9, Standby(3), failures_per_node_day=0.0038, restart_s=600.0),
    "GPT-4": case(3120, 25.0, 1.8e12),
    "GPT-4, 5 spares": case(3120, 25.0, 1.8e12, Standby(5)),
    "GPT-4, shrinks": case(3120, 25.0, 1.8e12, Standby(0, 15, 0.024)),
    "GPT-4, waits without a spare": case(3120, 25.0, 1.8e12, Standby(0)),
    "GPT-4, waits, disk only": case(3120, 25.0, 1.8e12, Standby(0), tier=False),
    "GPT-4, 2 spares, racks": case(3120, 25.0, 1.8e12, Standby(2, breaks=((4, 0.1), (1, 0.9)))),
    "GPT-4, 8 spares, racks": case(3120, 25.0, 1.8e12, Standby(8, breaks=((4, 0.1), (1, 0.7), (0, 0.2)))),
    "GPT-4, disk only": case(3120, 25.0, 1.8e12, Standby(8), tier=False),
    "GPT-4, slow storage": case(3120, 25.0, 1.8e12, storage_total_bandwidth=50e9),
    "three times the failures": case(3120, 25.0, 1.8e12, failures_per_node_day=0.02, restart_s=600.0, tier=False),
    "long steps": case(3120, 100.0, 1.8e12, failures_per_node_day=0.01),
    "quick restarts": case(3120, 25.0, 1.8e12, Standby(40), failures_per_node_day=0.02, restart_s=1.0),
    "hardly anything gets done": case(3120, 25.0, 1.8e12, failures_per_node_day=0.05, restart_s=600.0, tier=False),
    "slow saves": case(512, 5.0, 1.8e12, host_bandwidth=5e8, failures_per_node_day=0.02),
}


@pytest.mark.parametrize("name", GRID)
def test_simulation_and_closed_form_agree(name: str) -> None:
    what, standby, step_s = GRID[name]
    parts = shares(what, standby)
    runs = 20
    steps = math.ceil(MANY / runs / what.rate * parts.goodput / step_s)
    found = simulate_process(what, standby, step_s, steps, seed=7, runs=runs)
    assert found.failures > 0.8 * MANY / runs
    assert found.goodput == pytest.approx(parts.goodput, abs=0.01)
    for kind, share in losses(what, parts).items():
        assert found.lost[kind] == pytest.approx(share, abs=0.01), kind
    assert found.goodput + sum(found.lost.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", GRID)
def test_the_finish_is_where_the_closed_form_expects_it(name: str) -> None:
    what, standby, step_s = GRID[name]
    parts = shares(what, standby)
    steps = math.ceil(FEW / what.rate / parts.staffed * parts.goodput / step_s)
    half, most = finish_days(what, standby, steps * step_s)
    found = simulate_process(what, standby, step_s, steps, seed=11, runs=400)
    assert found.days_50 == pytest.approx(half, rel=0.05)
    assert found.days_90 == pytest.approx(most, rel=0.05)


@pytest.mark.parametrize("name", ["16 nodes", "GPT-3, a spare", "GPT-3, disk only", "slow saves"])
def test_what_a_failure_undoes_is_half_an_interval_and_what_was_not_committed(name: str) -> None:
    """The prediction is of first order: good where failures are seldom between two saves."""
    what, standby, step_s = GRID[name]
    rare = what._replace(rate=what.rate / 10)
    steps = math.ceil(MANY / 20 / rare.rate / step_s)
    found = simulate_process(rare, standby, step_s, steps, seed=13, runs=20)
    undone_s = found.lost["replay"] * steps * step_s / found.goodput / found.failures
    assert undone_s == pytest.approx(rare.rounded(step_s).replay_s(steps * step_s), rel=0.1)


def test_no_failure_undoes_more_than_there_is() -> None:
    what = Process(1e-6, 0.1, 1.0, 0.5, 3.0, 100.0, 1e10, 5.0, 60.0, 90.0, 1e4)
    assert what.replay_s(1000.0) == pytest.approx(0.1 * 500 + 0.9 * 50.5)
    assert what.replay_s(10.0) == 5.0


def test_runs_with_hardly_any_failure_end_on_time_or_pay_for_it() -> None:
    what, standby, step_s = GRID["GPT-3, disk only"]
    steps = math.ceil(0.3 / what.rate / step_s)
    half, most = finish_days(what, standby, steps * step_s)
    found = simulate_process(what, standby, step_s, steps, seed=3, runs=400)
    assert found.days_50 == pytest.approx(half, rel=0.001)
    assert found.days_90 == pytest.approx(most, rel=0.02)


def test_a_run_is_a_function_of_its_seed() -> None:
    what, standby, step_s = GRID["GPT-4, shrinks"]
    first, again, other = (simulate_process(what, standby, step_s, 2000, seed=seed, runs=3) for seed in (1, 1, 2))
    assert first == again
    assert first.goodput != other.goodput


def test_where_nothing_fails_only_the_saves_cost() -> None:
    calm = Process(0.0, 0.1, 1.0, 0.5, 3.0, 100.0, 300.0, 5.0, 60.0, 90.0, 1e4)
    found = simulate_process(calm, None, 10.0, 101, seed=0, runs=1)
    assert found.failures == 0
    assert found.lost["checkpoint"] * found.days_50 * 86400 == pytest.approx(10), "10 saves before the last step"
    assert found.days_50 * 86400 == pytest.approx(1010 + 10)


def played(rate: float, **figures: float) -> Any:
    """A process that fails about once in 500 s, with round figures."""
    one = Process(rate, 1.0, 0.0, 0.0, 0.0, math.inf, 50.0, 0.0, 0.0, 0.0, 0.0)
    return one._replace(**figures)


def test_an_interval_that_is_lost_is_repeated() -> None:
    """Nothing but repeated work: exactly rate * T / (exp(rate * T) - 1), for a step of the size of the interval."""
    found = simulate_process(played(0.002), None, 50.0, 20000, seed=5, runs=10)
    assert found.goodput == pytest.approx(0.1 / math.expm1(0.1), abs=0.003)
    assert found.lost["replay"] == pytest.approx(1 - found.goodput)


def test_a_write_that_is_late_counts_late() -> None:
    late = simulate_process(played(0.002, write_s=40.0), None, 50.0, 20000, seed=5, runs=10)
    assert late.goodput == pytest.approx(math.exp(-0.08) * 0.1 / math.expm1(0.1), abs=0.003)


def test_a_recovery_that_fails_starts_over() -> None:
    found = simulate_process(played(0.002, recover_disk_s=300.0, detect_s=100.0), None, 50.0, 20000, seed=5, runs=10)
    assert found.goodput == pytest.approx(math.exp(-0.6) * 0.1 / math.expm1(0.1), abs=0.004)
    assert 0 < found.lost["detect"] < found.lost["restart"] * 0.8


def test_a_plan_is_played_with_its_own_spares_and_tokens() -> None:
    what = work(nodes=128, tokens=30e9)
    plan = plan_of(what, tp=8, pp=8, dp=15)
    expected = outlook(what, plan, 20.0)
    found = simulate(what, plan, 20.0, seed=1, runs=100)
    assert found.goodput == pytest.approx(expected.goodput, abs=0.01)
    assert found.days_50 == pytest.approx(expected.days_50, rel=0.01)
    assert found.days_90 == pytest.approx(expected.days_90, rel=0.02)
    assert simulate(what, plan, 20.0, seed=1, runs=1, steps=10).days_50 * 86400 == pytest.approx(200, abs=1)

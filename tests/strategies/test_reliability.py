"""Intervals, spares, goodput, finish and cost in closed form."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from strategies.codec import from_json, to_json
from strategies.errors import ConfigError
from strategies.estimate import Estimator, best_disk_steps
from strategies.failures import (
    Process,
    Standby,
    best_interval_s,
    process,
    shares,
    shortage,
)
from strategies.finish import finish_days
from strategies.reliability import (
    Outlook,
    checkpoint_bytes,
    goodput,
    goodput_bound,
    outlook,
    plan_goodput,
    plan_process,
    shrink_unit,
)
from strategies.reliability_terms import explain
from strategies.repair import spares_for
from strategies.saving import Saving, affordable, saved
from strategies.simulation import simulate
from tests.strategies.runs import A100, GPT3, GPT4, plan_of, work

STEP_S = 20.0


def gpt3_outlook(nodes: int = 128, tokens: float = 300e9, **hardware: Any) -> Outlook:
    what = work(nodes=nodes, tokens=tokens, **hardware)
    return outlook(what, plan_of(what, tp=8, pp=8, dp=15), STEP_S)


# ---- the parts ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_master_and_moments_of_every_parameter() -> None:
    assert checkpoint_bytes(GPT3) == 12 * GPT3.parameters
    assert checkpoint_bytes(GPT3) == pytest.approx(2.1e12, rel=0.01)


def test_the_interval_is_youngs_when_saves_are_cheap_and_the_mtbf_when_they_are_hopeless() -> None:
    assert best_interval_s(1.0, 1e8) == pytest.approx(math.sqrt(2e8), rel=1e-3)
    assert best_interval_s(100.0, 40.0) == 40.0


@pytest.mark.parametrize("stall_s", [0.1, 1.0, 10.0, 60.0])
@pytest.mark.parametrize("mtbf_s", [600.0, 3600.0, 86400.0])
def test_no_other_interval_is_better(stall_s: float, mtbf_s: float) -> None:
    def kept(interval_s: float) -> float:
        one = Process(1 / mtbf_s, 1.0, stall_s, 0.0, 5.0, math.inf, interval_s, 5.0, 60.0, 60.0, 0.0)
        return shares(one).goodput

    best = max(kept(best_interval_s(stall_s, mtbf_s) * factor) for factor in (0.5, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 2))
    assert kept(best_interval_s(stall_s, mtbf_s)) >= best - 1e-4


def test_the_closed_form_expands_to_the_published_first_order() -> None:
    """arXiv 2410.21680: 1 - rate * (recovery + interval / 2) - stall / interval."""
    one = Process(1e-6, 1.0, 0.5, 0.0, 0.0, math.inf, 1000.0, 5.0, 300.0, 300.0, 0.0)
    assert shares(one).goodput == pytest.approx(1 - 1e-6 * (300 + 500) - 0.5 / 1000, abs=1e-6)


def test_saves_are_never_closer_than_a_step_or_their_writes() -> None:
    slow = process(3120, 500.0, 2e13, A100)
    assert (slow.memory_s, slow.disk_s) == (500.0, 500.0)
    starved = process(8, 1.0, 2e13, replace(A100, storage_bandwidth=1e8))
    assert starved.write_s == pytest.approx(2e13 / 8e8)
    assert starved.disk_s == 2 * starved.write_s, "half of the storage's time is left to others"
    assert process(3120, 1.0, 2e13, A100).write_s == pytest.approx(2e13 / 273e9), "the storage as a whole is the limit"


@pytest.mark.parametrize("load", [0.0, 0.05, 0.5, 2.0, 3.4, 20.0])
def test_spares_are_the_fewest_that_are_enough(load: float) -> None:
    def chance(spares: int) -> float:
        return sum(math.exp(-load) * load**k / math.factorial(k) for k in range(spares + 1))

    spares = spares_for(load)
    assert chance(spares) >= 0.99
    assert spares == 0 or chance(spares - 1) < 0.99


def test_many_broken_nodes_need_many_spares() -> None:
    assert spares_for(501.0) == pytest.approx(501 + 2.326 * math.sqrt(501), abs=1)


def test_a_lack_of_nodes_costs_the_cheaper_of_waiting_and_shrinking() -> None:
    what = process(128, STEP_S, 2e12, A100)
    waits = shortage(what, Standby(0))
    small = shortage(what, Standby(0, 8, 0.065))
    assert (waits.shrinks, small.shrinks) == (False, True)
    assert small.lost < waits.lost == pytest.approx(-math.expm1(-what.rate * 14400))
    quick = shortage(what._replace(repair_s=60.0), Standby(0, 8, 0.065))
    assert not quick.shrinks, "a node that is back in a minute is worth waiting for"
    assert shortage(what, Standby(2)).lost < 0.01 * waits.lost


# ---- goodput --------------------------------------------------------------------------------------------------------


def random_case(rng: random.Random) -> dict[str, Any]:
    hardware = replace(
        A100,
        failures_per_node_day=10 ** rng.uniform(-4, -0.5),
        restart_s=rng.choice([1.0, 30.0, 300.0, 1800.0]),
        detect_s=rng.choice([0.0, 5.0, 60.0]),
        storage_total_bandwidth=rng.choice([0.0, 1e10, 1e12]),
        storage_bandwidth=10 ** rng.uniform(7, 10),
        host_bandwidth=10 ** rng.uniform(8, 11),
        inter_bandwidth=10 ** rng.uniform(8, 11),
    )
    standby = rng.choice([None, Standby(0), Standby(3)])
    return {
        "ckpt_bytes": 10 ** rng.uniform(8, 13.5),
        "hardware": hardware,
        "slots_per_node": rng.choice([1, 4, 8]),
        "memory_tier": rng.random() < 0.7,
        "standby": standby,
    }


@pytest.mark.parametrize("seed", range(100))
def test_goodput_never_rises_with_the_nodes_and_surviving_seconds_rise_with_the_step(seed: int) -> None:
    rng = random.Random(seed)
    case, step_s = random_case(rng), 10 ** rng.uniform(-1, 2.5)
    by_nodes = [goodput(nodes, step_s, **case) for nodes in (1, 2, 3, 5, 8, 16, 50, 100, 128, 500, 1000, 3125, 10000)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(by_nodes))
    assert all(0 < kept <= 1 for kept in by_nodes)
    nodes = rng.choice([1, 10, 100, 1000])
    by_step = [step * step_s / goodput(nodes, step * step_s, **case) for step in (0.5, 0.9, 1.0, 1.1, 2.0, 10.0)]
    assert by_step == sorted(by_step)


def test_goodput_falls_with_everything_that_is_worse() -> None:
    base = goodput(1000, STEP_S, 2e12, A100)
    cases: list[dict[str, Any]] = [
        {"restart_s": 600.0},
        {"detect_s": 90.0},
        {"failures_per_node_day": 0.02},
        {"host_bandwidth": 1e8},
    ]
    for worse in cases:
        assert goodput(1000, STEP_S, 2e12, replace(A100, **worse)) < base
    assert goodput(1000, STEP_S, 2e13, A100) < base
    assert goodput(1000, STEP_S, 2e12, A100, memory_tier=False) < base


@pytest.mark.parametrize("nodes", [1, 120, 128, 200])
@pytest.mark.parametrize("repair_s", [60.0, 14400.0, 1e6])
def test_ranking_and_outlook_have_the_same_goodput_and_a_bound(nodes: int, repair_s: float) -> None:
    what = work(nodes=nodes, repair_s=repair_s)
    plan = plan_of(what, tp=8, pp=1, dp=min(nodes, 128))
    found = outlook(what, plan, STEP_S)
    assert found.goodput == plan_goodput(what, plan, STEP_S) == plan_goodput(what, plan, STEP_S, found.checkpoint_bytes)
    assert found.goodput <= goodput_bound(found.nodes, STEP_S, found.checkpoint_bytes, what.hardware)
    assert sum(found.lost.values()) + found.goodput == pytest.approx(1)
    assert min(found.lost.values()) >= 0


@pytest.mark.parametrize("seed", range(50))
def test_the_bound_holds_for_slower_and_larger_plans(seed: int) -> None:
    rng = random.Random(seed)
    case = random_case(rng)
    slots, step_s = case["slots_per_node"], 10 ** rng.uniform(-1, 2.5)
    bound = goodput_bound(16, step_s, case["ckpt_bytes"], case["hardware"], slots)
    for nodes, slower in ((16, 1.0), (17, 1.5), (100, 1.0), (1000, 4.0)):
        assert goodput(nodes, step_s * slower, **case) <= bound * (1 + 1e-9)


def test_a_hopeless_run_is_ordered_not_infinite() -> None:
    doomed = replace(A100, failures_per_node_day=1e4)
    assert 0 < goodput(10**5, 1e4, 1e15, doomed) < 1e-6


def test_bandwidths_must_be_known() -> None:
    with pytest.raises(ConfigError, match="bandwidth"):
        goodput(8, 1.0, 1e9, replace(A100, storage_bandwidth=0.0))


# ---- the outlook ----------------------------------------------------------------------------------------------------


def test_idle_nodes_stand_by_as_far_as_they_are_wanted() -> None:
    assert [gpt3_outlook(nodes=nodes).spares for nodes in (120, 121, 128)] == [0, 1, 1]
    assert [gpt3_outlook(nodes=nodes, repair_s=1e6).spares for nodes in (120, 125, 200)] == [0, 5, 17]
    asked = work(nodes=120)
    asked = replace(asked, cluster=replace(asked.cluster, spares=1))
    assert outlook(asked, plan_of(asked, tp=8, pp=8, dp=15), STEP_S).spares == 1


def test_memory_for_replicas_is_planned_not_assumed() -> None:
    for without in (gpt3_outlook(host_memory_bytes=0), gpt3_outlook(host_memory_bytes=100 << 30)):
        assert (without.memory_tier, without.memory_interval_steps, without.save_memory_s) == (False, 0, 0.0)
        assert without.goodput < gpt3_outlook().goodput
    assert not gpt3_outlook(inter_bandwidth=1e8).memory_tier, "the storage is faster than this network"
    alone = work(nodes=1)
    assert not outlook(alone, plan_of(alone, tp=8, pp=1, dp=1), STEP_S).memory_tier, "one node has no peer"
    what = work(nodes=128)
    offloaded = plan_process(what, plan_of(what, tp=8, pp=8, dp=15, offload="optimizer"), STEP_S)[0]
    assert offloaded.correlated < 1


def test_intervals_are_whole_steps_and_memory_is_saved_more_often() -> None:
    found = gpt3_outlook()
    assert found.disk_interval_s == found.disk_interval_steps * STEP_S
    assert found.memory_interval_s == found.memory_interval_steps * STEP_S
    assert found.disk_interval_steps == found.memory_interval_steps > 0, "the storage can follow"
    slow = gpt3_outlook(storage_bandwidth=1e8)
    assert slow.disk_interval_steps % slow.memory_interval_steps == 0
    assert slow.memory_interval_steps < slow.disk_interval_steps
    assert slow.disk_interval_s >= slow.write_s


def test_the_sweep_falls_and_contains_the_goodput() -> None:
    found = gpt3_outlook(restart_s=120.0)
    assert [restart_s for restart_s, _ in found.sweep] == [1, 30, 120, 600]
    kept = [share for _, share in found.sweep]
    assert kept == sorted(kept, reverse=True)
    assert kept[2] == found.goodput
    assert kept[3] == pytest.approx(gpt3_outlook(restart_s=600.0).goodput)


def test_bounds_are_in_order_and_money_follows_days() -> None:
    found = gpt3_outlook()
    assert found.days_50 is not None
    assert found.days_90 is not None
    steps = math.ceil(300e9 / (1536 * 2048))
    assert steps * STEP_S / 86400 < found.days_50 < found.days_90
    assert found.cost_50 == pytest.approx(found.days_50 * 24 * 121 * 8)
    assert found.failures_expected == pytest.approx(found.days_50 * 120 * 0.0065, rel=0.01)
    assert found.node_mtbf_s == pytest.approx(86400 / (120 * 0.0065))


def test_what_is_unknown_is_none() -> None:
    endless = gpt3_outlook(tokens=0)
    assert (endless.days_50, endless.days_90, endless.cost_50, endless.cost_90) == (None,) * 4
    assert endless.failures_expected is None
    free = gpt3_outlook(price_per_device_hour=0.0)
    assert free.days_50 is not None
    assert free.cost_50 is None


def test_where_nothing_fails_nothing_is_lost() -> None:
    found = gpt3_outlook(failures_per_node_day=0.0)
    assert found.goodput == 1
    assert set(found.lost.values()) == {0.0}
    assert found.node_mtbf_s is None
    assert found.days_50 == found.days_90 == pytest.approx(math.ceil(300e9 / (1536 * 2048)) * STEP_S / 86400)


def test_a_short_run_most_often_sees_no_failure() -> None:
    what = process(128, STEP_S, 2e12, A100)
    half, most = finish_days(what, None, 3600.0)
    assert half == most == pytest.approx(3600 * (1 + what.stall) / 86400)


def test_the_error_of_the_step_and_failures_add_up_as_variances_of_logarithms() -> None:
    what = work(nodes=128)
    plan = plan_of(what, tp=8, pp=8, dp=15)
    exact, both = outlook(what, plan, STEP_S), outlook(what, plan, STEP_S, band=(0.8 * STEP_S, 1.5 * STEP_S))
    assert both.days_50 == exact.days_50
    assert both.days_90 is not None
    assert both.days_50 is not None
    assert exact.days_90 is not None
    failures, step = math.log(exact.days_90 / both.days_50), 1.28155 / 1.64485 * math.log(1.5)
    assert math.log(both.days_90 / both.days_50) == pytest.approx(math.hypot(failures, step), rel=1e-4)
    few = finish_days(*plan_process(what, plan, STEP_S), math.ceil(300e9 / (1536 * 2048)) * STEP_S, (0.1,))[0]
    assert exact.days_low == pytest.approx(few), "failures alone"
    assert both.days_low is not None
    assert both.days_low < few


def test_a_run_that_failures_undo_never_ends() -> None:
    found = gpt3_outlook(failures_per_node_day=100.0)
    assert found.goodput < 1e-3
    assert (found.days_low, found.days_50, found.days_90, found.cost_50, found.failures_expected) == (None,) * 5
    assert "failures undo the work" in found.never
    assert not gpt3_outlook().never


def test_an_outlook_survives_json() -> None:
    for found in (gpt3_outlook(), gpt3_outlook(tokens=0, failures_per_node_day=0.0)):
        assert from_json(Outlook, to_json(found)) == found


def test_the_arithmetic_is_explained() -> None:
    what = work()
    plan = plan_of(what, tp=8, pp=8, dp=15)
    terms = {term.kind: term for term in explain(what, plan, STEP_S)}
    found = outlook(what, plan, STEP_S)
    assert terms["checkpoint"].value == found.checkpoint_bytes
    assert terms["goodput"].value == found.goodput
    assert terms["disk interval"].value == pytest.approx(found.disk_interval_s, abs=STEP_S)
    factors = [terms[kind].value for kind in ("staffed", "running", "kept (memory)", "kept (disk)")]
    assert math.prod(factors) == pytest.approx(found.goodput)
    assert all(term.formula and term.numbers for term in terms.values())
    calm = work(failures_per_node_day=0.0, host_memory_bytes=0)
    assert "memory interval" not in {term.kind for term in explain(calm, plan, STEP_S)}


# ---- the unit of shrinking ------------------------------------------------------------------------------------------


def test_a_broken_replica_gives_its_healthy_nodes() -> None:
    what = work(nodes=120, batch=1500)
    nodes, loss = shrink_unit(plan_of(what, tp=8, pp=8, dp=15), what.batch, 8)
    assert nodes == 8
    assert loss == pytest.approx(1 - (100 + 7) / (108 + 7))


def test_a_broken_node_takes_all_of_its_replicas() -> None:
    what = work(nodes=4, batch=32)
    nodes, loss = shrink_unit(plan_of(what, tp=2, pp=1, dp=16), what.batch, 8)
    assert nodes == 1
    assert loss == pytest.approx(1 - 2 / 3)
    assert shrink_unit(plan_of(what, tp=8, pp=4, dp=1), what.batch, 8) == (4, 1.0)


def test_experts_shrink_by_whole_sets_of_replicas() -> None:
    what = work(model=GPT4, nodes=3125, batch=8736, tokens=13e12)
    nodes, loss = shrink_unit(plan_of(what, tp=8, pp=15, dp=208, ep=16), what.batch, 8)
    assert nodes == 240
    assert loss == pytest.approx(1 - (42 + 14) / (46 + 14))


# ---- published runs -------------------------------------------------------------------------------------------------


def test_mean_time_between_failures_of_16384_devices_is_the_published_one() -> None:
    """Kokolis et al. (arXiv 2410.21680): 1.8 h on 16,384 A100. Tolerance 3 %."""
    assert 1 / process(2048, STEP_S, 1e12, A100).rate / 3600 == pytest.approx(1.8, rel=0.03)


@pytest.mark.parametrize("restart_s", [1.0, 120.0, 600.0])
def test_llama_3_keeps_more_than_nine_tenths(restart_s: float) -> None:
    """Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 H100, more than 90 % effective training time."""
    rate = 419 / 54 / 2048
    h100 = replace(A100, failures_per_node_day=rate, inter_bandwidth=50e9, restart_s=restart_s)
    assert 0.9 < goodput(2048, 8.0, 12 * 405e9, h100) < 1


def test_gpt3_takes_about_a_month_on_1024_a100() -> None:
    """SC21 (arXiv 2104.04473): 140 teraFLOP/s per device, 34 days with recomputation. Tolerance 10 %."""
    step_s = 8 * 1536 * 2048 * GPT3.parameters / (1024 * 140e12)
    what = work(nodes=128)
    found = outlook(what, plan_of(what, tp=8, pp=8, dp=16), step_s)
    assert found.days_50 == pytest.approx(34, rel=0.1)


def test_gpt4_takes_its_days_and_dollars_because_of_failures() -> None:
    """Accounts: 90 to 100 days and $63 M at $1 per device-hour (15 %), MFU 32 to 36 % after failures."""
    what = work(model=GPT4, nodes=3125, batch=7324, tokens=13e12)
    plan = plan_of(what, tp=8, pp=15, dp=208, ep=16)
    without_failures = 0.38
    step_s = 2.15e25 / 13e12 * what.batch.tokens / (plan.world_size * 312e12 * without_failures)
    found = outlook(what, plan, step_s)
    assert (found.nodes, found.spares) == (3120, 5)
    assert 0.32 < without_failures * found.goodput < 0.36
    assert found.days_50 is not None
    assert 90 <= found.days_50 <= 100
    assert found.cost_50 == pytest.approx(63e6, rel=0.15)
    assert found.failures_expected == pytest.approx(1900, rel=0.1)


# ---- what a run is told ---------------------------------------------------------------------------------------------


def told(disk: int | None, memory: int | None) -> Any:
    what = work(nodes=128, tokens=300e9)
    return outlook(replace(what, saving=Saving(disk, memory)), plan_of(what, tp=8, pp=8, dp=15), STEP_S)


def test_the_outlook_is_that_of_the_intervals_that_the_run_is_told() -> None:
    best, rare, often, memory = told(None, None), told(1000, 0), told(1, 0), told(1000, 1)
    assert (rare.disk_interval_steps, rare.memory_tier) == (1000, False)
    assert rare.lost["replay"] > 20 * best.lost["replay"], "half of a thousand steps per failure"
    assert rare.goodput < memory.goodput < best.goodput == best.best_goodput
    assert rare.days_50 > memory.days_50 > best.days_50
    assert (often.disk_interval_steps, often.best_disk_steps) == (1, rare.best_disk_steps)
    assert told(0, 1).goodput < memory.goodput, "only after the last step: what takes the memory takes everything"


def test_what_is_left_to_the_planner_is_the_interval_that_it_finds_best() -> None:
    what = replace(work(nodes=128, tokens=300e9), saving=Saving(7, 1))
    plan = plan_of(what, tp=8, pp=8, dp=15)
    found = Estimator(what).estimate(plan).outlook
    assert (found.disk_interval_steps, found.best_disk_steps) == (7, best_disk_steps(what, plan))
    assert found.best_disk_steps > 7


def test_a_save_that_is_due_waits_for_the_one_before() -> None:
    what = process(128, STEP_S, 2e12, replace(A100, storage_total_bandwidth=2e9))
    assert what.write_s == pytest.approx(1000)
    often = saved(what, Saving(10, 1), STEP_S)
    waits_s = (1000 - 10 * STEP_S) / 10
    assert often.copy_s == pytest.approx(what.copy_s + waits_s), "shared out over the saves of ten steps"
    assert saved(what, Saving(200, 1), STEP_S).copy_s == what.copy_s


def test_copies_in_memory_lie_as_far_apart_as_their_share_of_the_time_asks() -> None:
    step_s = 0.5
    what = process(128, step_s, 2e12, A100)
    free = saved(what, Saving(64, 1), step_s)
    assert (free.memory_s, free.copy_s / step_s > 0.01) == (step_s, True)
    for share in (0.1, 0.01, 0.001):
        steps = affordable(what, Saving(1 << 20, 1, share), step_s)
        kept = saved(what, Saving(1 << 20, 1, share), step_s)
        assert kept.memory_s == steps * step_s
        assert kept.stall <= share < kept.stall * 4, "and no further apart than that, by powers of two"
    assert affordable(what, Saving(64, 3, 1e-9), step_s) == 48, "never rarer than to disk"
    assert affordable(what, Saving(2, 3, 1e-9), step_s) == 3, "what was asked for is the least"
    assert affordable(what, Saving(64, 1, 0.01), 1e4) == 1, "long steps have room for one each"


def test_the_planner_and_the_simulation_agree_on_what_a_run_is_told() -> None:
    what = replace(work(nodes=128, tokens=30e9), saving=Saving(150, 3))
    plan = plan_of(what, tp=8, pp=8, dp=15)
    expected = outlook(what, plan, 20.0)
    found = simulate(what, plan, 20.0, seed=1, runs=100)
    assert found.goodput == pytest.approx(expected.goodput, abs=0.01)
    assert found.days_50 == pytest.approx(expected.days_50, rel=0.01)

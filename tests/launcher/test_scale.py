"""Weeks of failures in seconds: the real controller against simulated agents on real sockets (tests/support/scale)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.run import EventKind, RunState
from strategies.plan import ParallelPlan
from strategies.specs import BatchSpec, ModelSpec
from tests.support.scale.faults import Rates, trace
from tests.support.scale.pace import Pace
from tests.support.scale.play import DETECT_S, Outcome, Scenario, play, predicted

MODEL = ModelSpec(name="small", layers=10, hidden=64, heads=8, kv_heads=8, ffn=256, vocab=512, seq=128)
BATCH = BatchSpec(global_batch=480, seq=128)
PACE = Pace(
    step_s=30.0,
    copy_s=0.25,
    replica_s=0.5,
    write_s=80.0,
    fetch_s=0.1,
    memory_every=1,
    disk_every=4,
    restart_s=240.0,
)
SCENARIO = Scenario(
    gang_nodes=3120,
    nodes=70,
    spares=24,
    days=1.0,
    pace=PACE,
    rates=Rates(silent=0.2, crash=0.3),
    seed=3,
)


def plan_for(nodes: int) -> ParallelPlan:
    """8 devices a node, five stages."""
    return ParallelPlan(tp=8, pp=5, dp=nodes // 5, stages=(2,) * 5, micro_batch=1, grad_accum=8, zero_stage=1)


def played(root: Path, scenario: Scenario) -> Outcome:
    return play(root, scenario, model=MODEL, plan=plan_for(scenario.nodes), batch=BATCH)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return played(tmp_path_factory.mktemp("scale") / "run", SCENARIO)


def test_the_trace_has_every_kind_of_failure(outcome: Outcome) -> None:
    assert {kind for _, kind in outcome.struck} == {"dead", "silent", "crash", "rack"}
    assert outcome.in_recovery >= 2, "failures during recovery"


def test_every_failure_was_recovered_from(outcome: Outcome) -> None:
    assert outcome.state is RunState.RUNNING
    begun = [event.time for event in outcome.events if event.kind is EventKind.TRAINING_STARTED]
    first = outcome.events[1].time
    for at_s, kind in outcome.struck:
        assert begun[-1] > first + at_s, f"{kind} at {at_s:.0f} s"
    kinds = outcome.kinds
    assert kinds[EventKind.ATTEMPT_PLANNED] == kinds[EventKind.FAILURE_DETECTED] + 1
    actions = Counter(event.data["action"] for event in outcome.events if event.kind is EventKind.DECISION)
    assert kinds[EventKind.FAILURE_DETECTED] == actions["restart"] == kinds[EventKind.GANG_STOPPED]
    assert set(actions) == {"restart", "swap"}
    assert actions["swap"] == sum(bool(event.data.get("moved")) for event in outcome.events)


def test_no_failure_costs_more_steps_than_the_policy_says(outcome: Outcome) -> None:
    assert outcome.from_memory >= outcome.kinds[EventKind.ATTEMPT_PLANNED] - 3, "a rack leaves the replicas elsewhere"
    assert outcome.worst[True] <= PACE.memory_every
    assert outcome.worst[False] <= PACE.disk_every + math.ceil((PACE.write_s + PACE.copy_s) / PACE.step_s)
    lost = [event for event in outcome.events if event.kind is EventKind.ATTEMPT_PLANNED]
    resumed = {int(event.data["first_step"]) for event in lost}
    assert len(resumed) > 5, "attempts go on where the one before had come to"


def test_replicas_next_door_die_with_the_rack(tmp_path: Path) -> None:
    out = played(tmp_path / "run", replace(SCENARIO, nodes=10, rates=replace(SCENARIO.rates, apart=False)))
    racks = sum(kind == "rack" for _, kind in out.struck)
    assert racks
    assert out.from_memory <= out.kinds[EventKind.ATTEMPT_PLANNED] - 1 - racks
    assert out.worst[False] > out.worst[True], "what memory held is gone"


def test_the_log_grows_with_decisions_and_commits_only(outcome: Outcome) -> None:
    """Never with ranks, steps or heartbeats; and no commit is missing."""
    kinds = outcome.kinds
    assert kinds[EventKind.CHECKPOINT_COMMITTED] == outcome.commits > 2 * kinds[EventKind.ATTEMPT_PLANNED]
    rest = len(outcome.events) - kinds[EventKind.CHECKPOINT_COMMITTED] - kinds[EventKind.CHECKPOINT_FAILED]
    assert rest <= 2 + 7 * kinds[EventKind.ATTEMPT_PLANNED] + kinds[EventKind.WAITING_FOR_NODES]


def test_the_ledger_sums_up_and_agrees_with_the_steps_that_were_made(outcome: Outcome) -> None:
    ledger = outcome.ledger
    assert ledger["wall"] == pytest.approx(outcome.wall_s, rel=1e-6)
    assert sum(ledger.values()) == pytest.approx(2 * ledger["wall"])
    assert ledger["productive"] / ledger["wall"] == pytest.approx(outcome.goodput, abs=2e-3)
    silent = sum(kind == "silent" for _, kind in outcome.struck)
    assert ledger["detect"] == pytest.approx(silent * DETECT_S, rel=0.35, abs=DETECT_S)


def test_the_planner_predicts_the_goodput(outcome: Outcome) -> None:
    # One day is 20 failures or so: their number alone scatters the goodput by more than the formula may be wrong.
    counted = replace(SCENARIO.rates, per_node_day=SCENARIO.rates.per_node_day * _drawn())
    assert predicted(replace(SCENARIO, rates=counted)) == pytest.approx(outcome.goodput, abs=0.01)


@pytest.mark.full
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_over_ten_days_the_planner_predicts_it_from_the_rate_alone(seed: int, tmp_path: Path) -> None:
    """Within the percent that was asked for; two hundred failures, so that their number scatters little."""
    scenario = replace(SCENARIO, days=10.0, nodes=10, seed=seed)
    assert predicted(scenario) == pytest.approx(played(tmp_path / "run", scenario).goodput, abs=0.01)


def _drawn() -> float:
    """Failures that the trace has, over those that its rate promises."""
    faults = trace(SCENARIO.rates, nodes=SCENARIO.gang_nodes, spares=0, days=SCENARIO.days, seed=SCENARIO.seed)
    return len(faults) / (SCENARIO.rates.gang_per_s(SCENARIO.gang_nodes) * SCENARIO.days * 86400)


def test_the_number_of_nodes_changes_neither_decisions_nor_the_log(
    outcome: Outcome, tmp_path_factory: pytest.TempPathFactory
) -> None:
    larger = played(tmp_path_factory.mktemp("scale") / "run", replace(SCENARIO, nodes=2 * SCENARIO.nodes))
    shape = [(event.kind, round(event.time, 3)) for event in outcome.events[1:]]
    assert [(event.kind, round(event.time, 3)) for event in larger.events[1:]] == shape
    assert (larger.steps, larger.lost_steps, larger.worst) == (outcome.steps, outcome.lost_steps, outcome.worst)
    names = SCENARIO.nodes * len('"n0000", ')  # the first gang is written out
    assert larger.log_bytes - outcome.log_bytes <= names + 2 * len(outcome.events)  # and numbers have a digit more


def test_without_spares_and_without_patience_the_run_ends_with_the_reason(tmp_path: Path) -> None:
    out = played(tmp_path / "run", replace(SCENARIO, nodes=10, spares=0, patience_s=600.0))
    assert out.state is RunState.FAILED
    assert "only" in out.events[-1].data["reason"]
    assert "of 10 nodes came within" in out.events[-1].data["reason"]

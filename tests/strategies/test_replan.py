"""The degradation ladder."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from strategies.codec import from_json, to_json
from strategies.plan import ParallelPlan, accumulation
from strategies.replan import Candidate, Rung, changes, ladder, moved_share, scaled_step_s, span
from strategies.rules import check
from strategies.specs import ClusterSpec
from strategies.topology import nodes_needed
from tests.strategies.runs import GPT4, plan_of, work

STEP_S = 20.0


def test_padding_makes_one_of_208_replicas_cost_2_percent_not_12() -> None:
    """The arithmetic of exact global batches: 8,736 sequences, of which 208 replicas run 42 each."""
    batch, replicas = 8736, 208
    whole, padded = accumulation(batch, 1, replicas), accumulation(batch, 1, replicas - 1)
    assert (whole, padded) == (42, 43)
    assert padded / whole - 1 == pytest.approx(0.024, abs=0.0005)
    dividing = max(dp for dp in range(1, replicas) if batch % dp == 0)
    assert dividing == 182
    assert 1 - dividing / replicas == pytest.approx(0.125)


def test_gpt4_gives_up_one_replica_and_keeps_its_healthy_nodes() -> None:
    what = work(model=replace(GPT4, moe=None), nodes=3120, batch=8736)
    plan = plan_of(what, tp=8, pp=15, dp=208)
    rungs = ladder(what, plan, STEP_S, rungs=16)
    assert [rung.nodes for rung in rungs] == list(range(3119, 3103, -1))
    # 204 replicas need as few micro-batches as 207 would: the other three stand by, 15 nodes each
    assert [rung.spares for rung in rungs] == list(range(59, 43, -1))
    assert {rung.changes for rung in rungs} == {("dp 208 -> 204", "grad_accum 42 -> 43")}
    assert rungs[0].throughput == pytest.approx((42 + 14) / (43 + 14)), "the pipeline drains as before"
    assert all(rung.shrinks for rung in rungs), "a repair takes hours"


def test_experts_shrink_by_whole_sets() -> None:
    what = work(model=GPT4, nodes=3125, batch=8736)
    (rung,) = ladder(what, plan_of(what, tp=8, pp=15, dp=208, ep=16), STEP_S, rungs=1)
    assert rung.plan is not None
    assert (rung.plan.dp, rung.plan.ep, rung.spares) == (192, 16, 3119 - 192 * 15)


def test_waiting_and_shrinking_cost_the_same_at_the_threshold() -> None:
    what = work(nodes=128)
    for rung in ladder(what, plan_of(what, tp=8, pp=8, dp=16), STEP_S):
        assert rung.wait_until_s is not None
        gained_s = rung.throughput * (rung.wait_until_s - rung.move_s)
        assert gained_s == pytest.approx(rung.grow_s)
        assert rung.shrinks
        assert rung.verdict.startswith("shrink to 9")


def test_a_quick_repair_is_worth_waiting_for() -> None:
    what = work(nodes=128, repair_s=120.0)
    rung = ladder(what, plan_of(what, tp=8, pp=8, dp=16), STEP_S)[0]
    assert not rung.shrinks
    assert rung.verdict.startswith("wait: a repair takes 2.0 min")
    assert "7 healthy nodes standing by" in rung.verdict


def test_the_last_replica_shrinks_to_another_shape_and_everything_moves() -> None:
    what = work(nodes=8)
    rung = ladder(what, plan_of(what, tp=8, pp=8, dp=1), STEP_S)[0]
    assert rung.plan is not None
    assert rung.plan.pp < 8
    assert rung.moved_bytes == 12 * what.model.parameters
    assert any(change.startswith("pp 8 -> ") for change in rung.changes)


def test_the_given_search_is_asked_for_every_rung() -> None:
    what = work(nodes=10)
    plan = plan_of(what, tp=8, pp=1, dp=10)
    asked: list[ClusterSpec] = []

    def find(cluster: ClusterSpec) -> Candidate | None:
        asked.append(cluster)
        smaller = plan_of(what, tp=8, pp=1, dp=cluster.nodes)
        return Candidate(smaller, 30.0, what.batch.tokens / 30.0) if cluster.nodes > 7 else None

    rungs = ladder(what, plan, STEP_S, find)
    assert [(cluster.nodes, cluster.spares) for cluster in asked] == [(9, 0), (8, 0), (7, 0), (6, 0)]
    assert [rung.throughput for rung in rungs] == pytest.approx([2 / 3, 2 / 3, 0, 0])
    assert (rungs[2].plan, rungs[2].wait_until_s, rungs[2].spares) == (None, None, 7)
    assert rungs[2].verdict == "wait: there is no legal plan for 7 nodes"


def test_a_step_time_model_is_asked_for_the_default_plans() -> None:
    what = work(nodes=128)
    plan = plan_of(what, tp=8, pp=8, dp=16)
    assert ladder(what, plan, STEP_S, step_seconds=lambda smaller: 40.0)[0].throughput == pytest.approx(0.5)


def test_one_node_has_no_rungs() -> None:
    what = work(nodes=1)
    assert ladder(what, plan_of(what, tp=8, pp=1, dp=1), STEP_S) == ()


@pytest.mark.parametrize("nodes", [2, 5, 16, 64])
def test_rungs_are_legal_fit_and_never_speed_up(nodes: int) -> None:
    rng = random.Random(nodes)
    what = work(nodes=nodes, batch=rng.randint(nodes * 8, nodes * 50))
    pp = rng.choice([pp for pp in (1, 2, 4) if pp <= nodes])
    plan = plan_of(what, tp=8, pp=pp)
    rungs = ladder(what, plan, STEP_S, rungs=nodes)
    assert len(rungs) == nodes_needed(plan, 8) - 1
    assert [rung.throughput for rung in rungs] == sorted((rung.throughput for rung in rungs), reverse=True)
    for rung in rungs:
        assert rung.plan is not None
        left = replace(what.cluster, nodes=rung.nodes)
        assert not check(
            model=what.model, plan=rung.plan, batch=what.batch, cluster=left, precision="bf16", modelled=True
        )
        assert nodes_needed(rung.plan, 8) + rung.spares == rung.nodes
        assert rung.throughput <= 1


def test_a_disk_is_read_and_written_where_no_memory_holds_replicas() -> None:
    with_memory, through_disk = work(nodes=128), work(nodes=128, host_memory_bytes=0)
    plan = plan_of(with_memory, tp=8, pp=8, dp=16)
    fast, slow = (ladder(what, plan, STEP_S)[0] for what in (with_memory, through_disk))
    assert slow.move_s > fast.move_s
    assert slow.grow_s > fast.grow_s


def zero(plan: ParallelPlan, dp: int, tp: int = 8) -> ParallelPlan:
    return replace(plan, dp=dp, tp=tp, zero_stage=1)


def test_what_moves_is_what_a_rank_did_not_hold() -> None:
    what = work(nodes=128)
    plan = plan_of(what, tp=8, pp=8, dp=16)
    assert moved_share(plan, plan) == pytest.approx(0)
    assert moved_share(zero(plan, 16), zero(plan, 15)) == pytest.approx(0.5)
    assert moved_share(zero(plan, 2), zero(plan, 1)) == pytest.approx(0.5)
    assert moved_share(zero(plan, 16), zero(plan, 16, tp=4)) == 1
    assert moved_share(replace(plan, zero_stage=0), replace(plan, zero_stage=0, dp=3)) == 0


def test_scaled_steps_follow_the_micro_batches_or_else_the_ranks() -> None:
    what = work(nodes=128)
    plan = plan_of(what, tp=8, pp=8, dp=16)
    full = Candidate(plan, 10.0, 1.0)
    assert scaled_step_s(full, replace(plan, dp=15, grad_accum=103)) == pytest.approx(10 * 110 / 103)
    assert scaled_step_s(full, replace(plan, tp=4)) == pytest.approx(20)


def test_a_rung_survives_json() -> None:
    what = work(nodes=8)
    rungs = ladder(what, plan_of(what, tp=8, pp=8, dp=1), STEP_S, lambda cluster: None, rungs=1)
    rungs += ladder(what, plan_of(what, tp=8, pp=1, dp=8), STEP_S)
    for rung in rungs:
        assert from_json(Rung, json.loads(json.dumps(to_json(rung)))) == rung


def test_changes_and_spans_are_said_in_words() -> None:
    what = work(nodes=128)
    plan = plan_of(what, tp=8, pp=8, dp=16)
    assert changes(plan, replace(plan, tp=4, dp=15)) == ("tp 8 -> 4", "dp 16 -> 15")
    assert [span(seconds) for seconds in (45, 150, 14400, 216000)] == ["45 s", "2.5 min", "4.0 h", "2.5 days"]

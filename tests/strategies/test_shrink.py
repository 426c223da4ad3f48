"""The next plan on fewer nodes: legal, runnable, with the same global batch, and as close to the old one as can be."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest

from strategies.plan import ParallelPlan, accumulation
from strategies.ramp import Ramp
from strategies.rules import check
from strategies.schedule import SampleSchedule
from strategies.shrink import plan_on, step_work, throughput, worth_waiting_s
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec, MoeSpec, Precision
from strategies.topology import nodes_needed
from tests.strategies.support import BATCH, FOUR_BY_TWO, TINY, plan, random_model


def on(nodes: int, wanted: ParallelPlan, batch: BatchSpec = BATCH, precision: Any = "fp32") -> ParallelPlan | None:
    cluster = replace(FOUR_BY_TWO, nodes=nodes, spares=0)
    return plan_on(model=TINY, plan=wanted, batch=batch, cluster=cluster, precision=precision)


@pytest.mark.parametrize(
    ("nodes", "degrees", "smaller"),
    [
        (4, {"tp": 2, "pp": 2, "dp": 2}, (2, 2, 2, 8)),
        (3, {"tp": 2, "pp": 2, "dp": 2}, (2, 2, 1, 16)),
        (2, {"tp": 2, "pp": 2, "dp": 2}, (2, 2, 1, 16)),
        (1, {"tp": 2, "pp": 2, "dp": 2}, (2, 1, 1, 16)),
        (3, {"tp": 2, "dp": 4}, (2, 1, 3, 6)),
        (3, {"dp": 8}, (1, 1, 6, 3)),
        (1, {"pp": 4, "zero_stage": 1}, (1, 2, 1, 16)),
    ],
)
def test_replicas_go_first_then_stages(nodes: int, degrees: dict[str, Any], smaller: tuple[int, int, int, int]) -> None:
    found = on(nodes, plan(**degrees))
    assert found is not None
    assert (found.tp, found.pp, found.dp, found.grad_accum) == smaller
    assert sum(found.stages) == TINY.layers


def test_a_plan_that_fits_is_kept_as_it_is() -> None:
    odd = plan(pp=2, dp=2, zero_stage=1, stages=(1, 3))
    assert on(2, odd) is odd


def test_replicas_that_only_add_padding_stand_by() -> None:
    """Three replicas of four take as many micro-batches as two."""
    found = on(3, plan(tp=2, dp=4, batch=(four := BatchSpec(global_batch=4, seq=32))), four)
    assert found is not None
    assert (found.dp, found.grad_accum, nodes_needed(found, 2)) == (2, 2, 2)


@pytest.mark.parametrize(
    ("nodes", "degrees", "smaller"),
    [
        (3, {"tp": 2, "pp": 2, "dp": 2, "ep": 2, "zero_stage": 1}, (2, 2, 1, 1)),
        (3, {"tp": 2, "dp": 4, "ep": 4}, (2, 1, 3, 1)),
        (2, {"tp": 2, "dp": 4, "ep": 4}, (2, 1, 2, 2)),
    ],
)
def test_experts_are_spread_over_the_replicas_that_are_left(
    nodes: int, degrees: dict[str, Any], smaller: tuple[int, int, int, int]
) -> None:
    model = replace(TINY, moe=MoeSpec(experts=12, top_k=2, ffn=96))
    cluster = replace(FOUR_BY_TWO, nodes=nodes, spares=0)
    found = plan_on(model=model, plan=plan(model=model, **degrees), batch=BATCH, cluster=cluster, precision="fp32")
    assert found is not None
    assert (found.tp, found.pp, found.dp, found.ep) == smaller


def test_nothing_is_left() -> None:
    assert on(0, plan(dp=2)) is None


def test_what_does_not_run_is_passed_over() -> None:
    """A context-parallel plan is modelled only, however few its ranks are."""
    assert on(1, plan(cp=2, dp=2)) is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A plan that is legal, and a cluster for which it may be too large."""

    model: ModelSpec
    wanted: ParallelPlan
    batch: BatchSpec
    cluster: ClusterSpec
    precision: Precision


def draw(seed: int) -> Drawn | None:
    """None where what was drawn is not legal."""
    rng = random.Random(seed)
    model = random_model(rng)
    precision: Precision = "fp32" if rng.random() < 0.5 else "bf16"
    batch = BatchSpec(global_batch=rng.randint(1, 40), seq=model.seq)
    cluster = ClusterSpec(name="c", kind="process", nodes=rng.randint(1, 8), slots_per_node=rng.choice([1, 2, 4, 8]))
    degrees: dict[str, Any] = {
        "tp": rng.choice([1, 2, 4]),
        "pp": rng.randint(1, min(4, model.layers)),
        "dp": rng.randint(1, 6),
    }
    if rng.random() < 0.5:
        degrees["ep"] = ep = rng.choice([size for size in range(1, 7) if degrees["dp"] % size == 0])
        moe = MoeSpec(experts=ep * rng.randint(1, 4), top_k=1, ffn=24, dense_layers=rng.randint(0, model.layers - 1))
        model = replace(model, moe=moe)
    if rng.random() < 0.5 and batch.global_batch > degrees["dp"]:
        start = rng.randint(degrees["dp"], batch.global_batch - 1)
        increment = rng.choice([one for one in range(1, 40) if (batch.global_batch - start) % one == 0])
        batch = replace(batch, ramp=Ramp(start=start, increment=increment, samples=rng.randint(1, 400)))
    wanted = plan(model, batch, precision, **degrees)
    if check(model=model, plan=wanted, batch=batch, cluster=None, precision=precision):
        return None
    return Drawn(model=model, wanted=wanted, batch=batch, cluster=cluster, precision=precision)


SEEDS = range(400)


@pytest.mark.parametrize("seed", SEEDS)
def test_always_legal_and_the_batch_is_exact(seed: int) -> None:
    case = draw(seed)
    if case is None:
        return
    model, wanted, batch, cluster, precision = case.model, case.wanted, case.batch, case.cluster, case.precision
    found = plan_on(model=model, plan=wanted, batch=batch, cluster=cluster, precision=precision)
    assert found is not None, "one rank always runs"
    assert check(model=model, plan=found, batch=batch, cluster=cluster, precision=precision) == ()
    if found != wanted:
        assert wanted.world_size > cluster.slots
        assert found.grad_accum == accumulation(batch.global_batch, found.micro_batch, found.dp)
        assert (found.micro_batch, found.zero_stage) == (wanted.micro_batch, wanted.zero_stage)
        if wanted.tp * wanted.pp <= cluster.slots:
            assert (found.tp, found.pp, found.stages) == (wanted.tp, wanted.pp, wanted.stages)
        assert wanted.ep % found.ep == 0, "a rank takes whole shares of the experts"
    steps_are_exact(found, batch)


def steps_are_exact(found: ParallelPlan, batch: BatchSpec) -> None:
    """Whatever the size of the batch, its samples are dealt out once each, and no replica computes on padding alone."""
    schedule, first = SampleSchedule.of(batch), 0
    for step in range(1, 40):
        count, size = schedule.micro_batches(step, found), schedule.batch_at(step)
        dealt = [[schedule.rows(step, replica, index, found) for index in range(count)] for replica in range(found.dp)]
        given = [[one for rows in replica for one in rows if one is not None] for replica in dealt]
        assert sorted(one for replica in given for one in replica) == list(range(first, first + size))
        assert all(given), "a replica has nothing but padding"
        assert count <= found.grad_accum
        first += size


def test_what_is_drawn_is_worth_drawing() -> None:
    """Runs whose batch grows, with experts in shares, and both at once have to shrink, and some give up shares."""
    kinds = Counter[tuple[bool, bool]]()
    fewer_shares = 0
    for case in filter(None, map(draw, SEEDS)):
        found = plan_on(
            model=case.model, plan=case.wanted, batch=case.batch, cluster=case.cluster, precision=case.precision
        )
        if found is not None and found != case.wanted:
            kinds[case.batch.ramp is not None, case.wanted.ep > 1] += 1
            fewer_shares += found.ep < case.wanted.ep
    assert min(kinds[ramp, shared] for ramp in (False, True) for shared in (False, True)) >= 5, kinds
    assert fewer_shares >= 5


def test_waiting_is_worth_a_restart() -> None:
    wanted, smaller = plan(tp=2, dp=4), plan(tp=2, dp=2)
    assert step_work(wanted) == 2.0
    assert throughput(smaller, wanted) == 0.5
    assert worth_waiting_s(smaller, wanted, 30.0) == 60.0

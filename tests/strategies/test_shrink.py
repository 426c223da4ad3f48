"""The next plan on fewer nodes: legal, runnable, with the same global batch, and as close to the old one as can be."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from strategies.plan import ParallelPlan, accumulation
from strategies.rules import check
from strategies.shrink import plan_on, step_work, throughput, worth_waiting_s
from strategies.specs import BatchSpec, ClusterSpec, MoeSpec, Precision
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


@pytest.mark.parametrize("seed", range(200))
def test_always_legal_and_the_batch_is_exact(seed: int) -> None:
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
    wanted = plan(model, batch, precision, **degrees)
    if check(model=model, plan=wanted, batch=batch, cluster=None, precision=precision):
        return
    found = plan_on(model=model, plan=wanted, batch=batch, cluster=cluster, precision=precision)
    assert found is not None, "one rank always runs"
    assert check(model=model, plan=found, batch=batch, cluster=cluster, precision=precision) == ()
    if found != wanted:
        assert wanted.world_size > cluster.slots
        assert found.grad_accum == accumulation(batch.global_batch, found.micro_batch, found.dp)
        assert (found.micro_batch, found.zero_stage) == (wanted.micro_batch, wanted.zero_stage)
        if wanted.tp * wanted.pp <= cluster.slots:
            assert (found.tp, found.pp, found.stages) == (wanted.tp, wanted.pp, wanted.stages)


def test_waiting_is_worth_a_restart() -> None:
    wanted, smaller = plan(tp=2, dp=4), plan(tp=2, dp=2)
    assert step_work(wanted) == 2.0
    assert throughput(smaller, wanted) == 0.5
    assert worth_waiting_s(smaller, wanted, 30.0) == 60.0

"""What is left open is filled in, and a plan shrinks to a smaller cluster."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from strategies.plan import accumulation
from strategies.resolve import largest_plan, most_replicas, resolve_plan
from strategies.rules import check
from strategies.specs import BatchSpec, ClusterSpec
from tests.strategies.support import BATCH, FOUR_BY_TWO, TINY, plan, random_model


def test_everything_open_fills_the_cluster() -> None:
    found = resolve_plan(TINY, BATCH, FOUR_BY_TWO, "fp32", tp=2, pp=2)
    assert (found.dp, found.zero_stage, found.grad_accum, found.stages) == (2, 1, 8, (2, 2))
    assert check(model=TINY, plan=found, batch=BATCH, cluster=FOUR_BY_TWO, precision="fp32") == ()


@pytest.mark.parametrize(
    ("precision", "given", "zero_stage", "grad_dtype"),
    [
        ("fp32", {}, 0, "fp32"),
        ("fp32", {"pp": 2}, 1, "fp32"),
        ("bf16", {}, 1, "fp32"),
        ("bf16", {"zero_stage": 0}, 0, "bf16"),
        ("bf16", {"zero_stage": 3}, 3, "fp32"),
        ("bf16", {"zero_stage": 0, "grad_dtype": "fp32"}, 0, "fp32"),
        ("fp16", {}, 1, "fp32"),
        ("fp32", {"zero_stage": 2}, 2, "fp32"),
    ],
)
def test_zero_and_gradients_follow_the_precision(
    precision: Any, given: dict[str, Any], zero_stage: int, grad_dtype: str
) -> None:
    found = resolve_plan(TINY, BATCH, FOUR_BY_TWO, precision, **given)
    assert (found.zero_stage, found.grad_dtype) == (zero_stage, grad_dtype)


def test_what_is_given_is_kept() -> None:
    given: dict[str, Any] = {
        "dp": 3,
        "zero_stage": 0,
        "stages": (1, 3),
        "pp": 2,
        "micro_batch": 2,
        "grad_accum": 99,
        "recompute": "full",
        "schedule": "interleaved",
        "vpp": 3,
        "flash": False,
        "sequence_parallel": True,
        "ep": 2,
    }
    found = resolve_plan(TINY, BATCH, FOUR_BY_TWO, "fp32", **given)
    assert {name: getattr(found, name) for name in given} == given


def test_replicas_that_would_only_add_padding_are_left_out() -> None:
    assert most_replicas(16, 1, 7) == 6
    assert most_replicas(16, 1, 8) == 8
    assert most_replicas(16, 4, 8) == 4
    assert most_replicas(3, 4, 8) == 1
    assert most_replicas(5, 1, 0) == 1


@pytest.mark.parametrize("seed", range(100))
def test_open_replicas_are_the_fewest_that_are_as_fast(seed: int) -> None:
    rng = random.Random(seed)
    size, micro_batch, room = rng.randint(1, 50), rng.randint(1, 4), rng.randint(1, 20)
    dp = most_replicas(size, micro_batch, room)
    assert dp <= room
    assert dp == 1 or dp * micro_batch <= size
    fastest = accumulation(size, micro_batch, max(1, min(room, size // micro_batch)))
    assert accumulation(size, micro_batch, dp) == fastest
    assert dp == 1 or accumulation(size, micro_batch, dp - 1) > fastest


@pytest.mark.parametrize("name", ["tp", "pp", "sp", "cp", "micro_batch"])
@pytest.mark.parametrize("value", [0, -1, 10**5])
def test_illegal_numbers_are_resolved_and_left_to_the_rules(name: str, value: int) -> None:
    given: dict[str, Any] = {name: value}
    found = resolve_plan(TINY, BATCH, FOUR_BY_TWO, "fp32", **given)
    assert check(model=TINY, plan=found, batch=BATCH, cluster=FOUR_BY_TWO, precision="fp32")


def test_an_empty_batch_and_cluster_are_resolved() -> None:
    empty = replace(FOUR_BY_TWO, nodes=0)
    assert resolve_plan(TINY, BatchSpec(global_batch=0, seq=0), empty, "fp32").dp == 1
    assert resolve_plan(TINY, BATCH, None, "fp32", tp=2).dp == 1


def test_a_smaller_cluster_costs_replicas_first() -> None:
    whole = plan(tp=2, pp=2, dp=4)
    small = largest_plan(model=TINY, plan=whole, batch=BATCH, cluster=replace(FOUR_BY_TWO, nodes=3))
    assert small is not None
    assert (small.tp, small.pp, small.dp, small.grad_accum) == (2, 2, 1, 16)


def test_then_stages_and_shards() -> None:
    small = largest_plan(
        model=TINY, plan=plan(tp=4, pp=4), batch=BATCH, cluster=replace(FOUR_BY_TWO, nodes=3, slots_per_node=1)
    )
    assert small is not None
    assert (small.tp, small.pp, small.dp, small.stages) == (1, 3, 1, (1, 2, 1))


def test_nothing_fits_an_empty_cluster() -> None:
    assert largest_plan(model=TINY, plan=plan(), batch=BATCH, cluster=replace(FOUR_BY_TWO, nodes=0)) is None
    wide = largest_plan(model=TINY, plan=plan(tp=64), batch=BATCH, cluster=FOUR_BY_TWO)
    assert wide is not None
    assert wide.world_size == 8  # replicas take the slots that shards leave


@pytest.mark.parametrize("seed", range(150))
def test_the_largest_plan_is_legal_and_fits(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    batch = BatchSpec(global_batch=rng.randint(1, 40), seq=model.seq)
    wanted = plan(model=model, batch=batch, tp=rng.randint(1, 9), pp=rng.randint(1, 9), dp=rng.randint(1, 9))
    cluster = ClusterSpec(name="random", kind="process", nodes=rng.randint(1, 6), slots_per_node=rng.randint(1, 4))
    found = largest_plan(model=model, plan=wanted, batch=batch, cluster=cluster)
    assert found is not None
    assert found.world_size <= cluster.slots
    assert (found.tp, found.pp, found.dp) <= (wanted.tp, wanted.pp, wanted.dp) or found.tp < wanted.tp
    assert check(model=model, plan=found, batch=batch, cluster=cluster, precision="fp32", modelled=True) == ()

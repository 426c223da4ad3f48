"""The space: every plan in it is legal, the census counts what a walk finds, larger machines have more plans."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from strategies import rules
from strategies.plan import ParallelPlan, accumulation
from strategies.space import Space, lightened, micro_batches, replica_choices
from strategies.specs import ModelSpec, Precision
from tests.strategies.planning import DENSE, LLAMA, SPARSE, random_work, work_of
from tests.strategies.support import GPT2, LLAMA3_8B


@pytest.mark.parametrize("seed", range(12))
def test_every_leaf_is_legal_and_there_are_as_many_as_counted(seed: int) -> None:
    work = random_work(random.Random(seed))
    space = Space(work)
    shapes = list(space.shapes())
    plans = list(space.leaves())
    assert len(set(plans)) == len(plans)
    for plan in random.Random(seed).sample(plans, min(400, len(plans))):
        assert not rules.check(
            model=work.model,
            plan=plan,
            batch=work.batch,
            cluster=work.cluster,
            precision=work.precision,
            modelled=True,
        )
    size, refused = space.census(shapes)
    assert size == len(plans) + sum(refused.values())
    counted = sum(space.count(shape, 1, space.room(shape)) for shape in shapes)
    assert counted == len(plans)


@pytest.mark.parametrize("seed", range(6))
def test_the_census_refuses_what_the_rules_refuse(seed: int) -> None:
    work = random_work(random.Random(100 + seed))
    endless = Space(replace(work, cluster=replace(work.cluster, nodes=10**6)))
    space = Space(work)
    found: Counter[str] = Counter()
    size = 0
    for shape in space.shapes():
        for size_of, pipe in product(space.micro_batch, space.pipes(shape)):
            inner = next(one for one in space.inners(shape) if one.micro_batch == size_of)
            many = len(space.states(shape)) * sum(one.micro_batch == size_of for one in space.inners(shape))
            for replicas in replica_choices(work.batch.global_batch, size_of, shape.unit):
                size += many
                plan = endless.plan(shape, space.states(shape)[0], inner, pipe, replicas)
                broken = rules.check(
                    model=work.model,
                    plan=plan,
                    batch=work.batch,
                    cluster=work.cluster,
                    precision=work.precision,
                    modelled=True,
                )
                names = {one.rule for one in broken}
                if "world_size_fits_cluster" in names:
                    found["world_size_fits_cluster"] += many
                elif names:
                    assert names <= {"schedule_fits", "interleaving_in_rounds"}
                    found["schedule_fits"] += many
    assert space.census(space.shapes()) == (size, dict(found))


@pytest.mark.parametrize("model", [DENSE, LLAMA, SPARSE])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_plans_that_run_are_those_of_the_whole_space_that_nothing_refuses(
    model: ModelSpec, precision: Precision
) -> None:
    """None that runs is left out: "phalanx runs nothing better" would be untrue."""
    work = replace(work_of(replace(model, layers=2), batch=4, nodes=2), precision=precision)

    def runs(plan: ParallelPlan) -> bool:
        parts = {"model": work.model, "batch": work.batch, "cluster": work.cluster}
        return not rules.check(plan=plan, precision=precision, **parts)  # type: ignore[arg-type]

    runnable, whole = set(Space(work, runnable_only=True).leaves()), list(Space(work).leaves())
    drawn = [plan for plan in whole if plan.cp == 1]
    drawn = random.Random(3).sample(drawn, min(3000, len(drawn)))
    wrong = [plan.describe() for plan in drawn if runs(plan) != (plan in runnable)]
    assert not wrong, wrong[:5]
    assert runnable <= set(whole)
    assert any(plan.sequence_parallel and plan.pp > 1 for plan in runnable)
    assert any(plan.sp > 1 and plan.pp > 1 for plan in runnable)


def test_fixed_knobs_stay_fixed() -> None:
    work = work_of(DENSE, batch=8, nodes=2)
    plans = list(Space(work, {"tp": 2, "zero_stage": 1, "dp": 3}).leaves())
    assert plans
    assert {(plan.tp, plan.zero_stage, plan.dp) for plan in plans} == {(2, 1, 3)}
    assert not list(Space(work, {"tp": 3}).leaves())
    whole = [plan for plan in Space(work).leaves() if (plan.micro_batch, plan.recompute) == (3, "full")]
    assert set(Space(work, {"micro_batch": 3, "recompute": "full"}).leaves()) == set(whole)


@pytest.mark.parametrize(("batch", "size", "unit"), [(16, 1, 1), (1536, 2, 1), (7, 2, 1), (96, 1, 4), (6240, 1, 16)])
def test_fewest_replicas_for_each_accumulation(batch: int, size: int, unit: int) -> None:
    found = replica_choices(batch, size, unit)
    for replicas in found:
        assert replicas.grad_accum == accumulation(batch, size, replicas.dp)
        assert replicas.dp % unit == 0
        fewer = replicas.dp - unit
        assert fewer < 1 or accumulation(batch, size, fewer) > replicas.grad_accum
    reachable = {accumulation(batch, size, dp) for dp in range(unit, batch // size + 1, unit)}
    assert [one.grad_accum for one in found] == sorted(reachable, reverse=True)


def test_a_larger_machine_has_every_plan_of_a_smaller_one() -> None:
    work = work_of(DENSE, batch=12, nodes=1)
    double = replace(work, cluster=replace(work.cluster, nodes=2))
    assert set(Space(work).leaves()) < set(Space(double).leaves())


def test_sizes_of_micro_batches() -> None:
    assert micro_batches(13) == (1, 2, 3, 4, 6, 8, 12)
    assert micro_batches(1) == (1,)


def test_a_heavy_output_projection_lightens_the_last_stage() -> None:
    assert lightened(LLAMA3_8B, 4) == (9, 9, 8, 6)
    assert lightened(replace(GPT2, vocab=100), 4) == (3, 3, 3, 3)
    assert lightened(GPT2, 1) == (12,)
    assert sum(lightened(LLAMA3_8B, 7)) == 32

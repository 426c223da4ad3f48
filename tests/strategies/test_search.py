"""The search: brute force over the same space agrees, everything adds up, bounds are bounds."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product

import pytest

from strategies import rules
from strategies.bounds import PLAIN, Bounds
from strategies.estimate import Estimator, Objective
from strategies.plan import ParallelPlan
from strategies.search import Found, SearchResult, search, tie_break
from strategies.space import Inner, Replicas, Shape, Space, State
from strategies.specs import ModelSpec, MoeSpec
from strategies.workload import Workload
from tests.strategies.planning import DENSE, LLAMA, SPARSE, random_work, wide_work, work_of

OBJECTIVES: tuple[Objective, ...] = ("goodput", "time", "cost", "memory")


def brute_force(estimator: Estimator, space: Space, objective: Objective, top: int) -> tuple[list[Found], int, int]:
    """The best plans by looking at every one; how many there are, and how many of them fit."""
    found, number, fit = [], 0, 0
    for plan in space.leaves():
        number += 1
        peak, step_s = estimator.memory.peak(plan), sum(estimator.timing.step(plan))
        if peak <= estimator.memory.budget():
            fit += 1
            memory = objective == "memory"
            score = peak if memory else estimator.score(plan, step_s, objective)
            found.append(Found(score, tie_break(plan, step_s if memory else 0.0), plan))
    return sorted(found)[:top], number, fit


def tight(rng: random.Random, work: Workload) -> Workload:
    """The same with so little memory that a part of the plans does not fit."""
    estimator, space = Estimator(work), Space(work)
    peaks = sorted(estimator.memory.peak(plan) for plan in list(space.leaves())[::7])
    budget = rng.choice([0.0, peaks[len(peaks) // 10], peaks[len(peaks) // 2], peaks[-1]])
    return replace(work, cluster=replace(work.cluster, device_memory_bytes=int(budget)))


def adds_up(result: SearchResult) -> bool:
    return result.space == result.evaluated + sum(result.pruned.values()) + sum(result.rejected.values())


def compare(seed: int, work: Workload, rng: random.Random) -> None:
    """Search and brute force find the same plans, and account for as many."""
    objective, top = OBJECTIVES[seed % 4], rng.choice([1, 3, 10])
    estimator, space = Estimator(work), Space(work, runnable_only=rng.random() < 0.2)
    expected, number, _ = brute_force(estimator, space, objective, top)
    result = search(work, objective=objective, top=top, space=space, estimator=estimator)
    assert [one.plan for one in result.ranked] == [one.plan for one in expected], (seed, objective, number)
    assert adds_up(result), seed
    assert result.space - sum(space.census(space.shapes())[1].values()) == number


@pytest.mark.parametrize("part", [*range(4), *(pytest.param(part, marks=pytest.mark.full) for part in range(4, 10))])
def test_brute_force_agrees(part: int) -> None:
    for seed in range(20 * part, 20 * part + 20):
        rng = random.Random(seed)
        compare(seed, tight(rng, random_work(rng)), rng)


@pytest.mark.full
@pytest.mark.parametrize("part", range(12))
def test_brute_force_agrees_on_fresh_seeds(part: int) -> None:
    for seed in range(10000 + 20 * part, 10020 + 20 * part):
        rng = random.Random(seed)
        compare(seed, tight(rng, random_work(rng)), rng)


@pytest.mark.parametrize("part", [*range(2), *(pytest.param(part, marks=pytest.mark.full) for part in range(2, 20))])
def test_brute_force_agrees_where_stages_differ(part: int) -> None:
    """The budget is the peak of a plan drawn at random: that one just fits."""
    for seed in range(20000 + 10 * part, 20010 + 10 * part):
        rng = random.Random(seed)
        work = wide_work(rng)
        space = Space(work)
        if sum(space.count(shape, 1, space.room(shape)) for shape in space.shapes()) < 6000:
            plans = list(space.leaves())
            peak = Estimator(work).memory.peak(rng.choice(plans))
            cluster = replace(work.cluster, device_memory_bytes=math.ceil(peak))
            compare(seed, replace(work, cluster=cluster), rng)


@pytest.mark.parametrize("objective", ["memory", "time"])
@pytest.mark.parametrize("fixed", [{}, {"schedule": "dualpipev"}])
def test_only_the_output_layer_on_the_first_stage_fits(objective: Objective, fixed: dict[str, object]) -> None:
    """With tied embeddings and a light first block, DualPipeV holds less than 1F1B does."""
    experts = MoeSpec(experts=8, top_k=2, ffn=4096, dense_layers=1)
    model = ModelSpec(
        name="tied", layers=24, hidden=2048, heads=16, kv_heads=16, ffn=8192, vocab=50304, seq=2048, moe=experts
    )
    work = work_of(model, batch=64, nodes=2, slots=8)
    knobs = {"tp": 1, "pp": 2, "ep": 1, "micro_batch": 1, "recompute": "full", "offload": "none"} | fixed
    peaks = {one: least_peak(work, knobs | {"schedule": one}) for one in ("1f1b", "dualpipev")}
    assert peaks["dualpipev"] < peaks["1f1b"]
    between = int(sum(peaks.values()) / 2)
    work = replace(work, cluster=replace(work.cluster, device_memory_bytes=between))
    space, estimator = Space(work, knobs), Estimator(work)
    expected, _, fit = brute_force(estimator, space, objective, 3)
    found = search(work, objective=objective, top=3, space=space, estimator=estimator)
    assert fit
    assert [one.plan for one in found.ranked] == [one.plan for one in expected]
    assert found.ranked[0].plan.schedule == "dualpipev"


def least_peak(work: Workload, fixed: dict[str, object]) -> float:
    memory = Estimator(work).memory
    return min(memory.peak(plan) for plan in Space(work, fixed).leaves())


@pytest.mark.parametrize("vocab", [20000, 50000, 100000])
def test_the_slowest_stage_changes_with_the_micro_batch(vocab: int) -> None:
    """With large ones it is that of the output projection, with small ones a middle one, which sends less."""
    model = replace(LLAMA, layers=4, hidden=768, vocab=vocab, seq=16)
    work = work_of(model, batch=6, nodes=3)
    estimator = Estimator(work)
    space, lasts = Space(work, {"tp": 1, "pp": 3, "recompute": "none", "stages": (1, 2, 1)}), []
    bounds = Bounds(estimator, space, "time")
    for shape, size in product(space.shapes(), space.micro_batch):
        most, inner = space.room(shape), Inner(size, "none", False)
        for replicas, state in product(space.replicas(shape, inner, PLAIN, 1, most), space.states(shape)):
            plan, timing = space.plan(shape, state, inner, PLAIN, replicas), estimator.timing
            lasts.append(timing.slowest(timing.unit_of(plan), plan).last)
            rate = bounds.rate(shape, "none", replicas.dp, replicas.dp)
            for kernels in (False, True):
                bound = bounds.size(shape, inner, replicas.dp, replicas, rate, exact=kernels)
                assert bound <= estimator.objective(plan, "time")
    assert not all(lasts)


def test_pruning_prunes() -> None:
    result = search(work_of(DENSE, batch=64, nodes=4), top=1)
    assert adds_up(result)
    assert result.evaluated < result.space / 50


@pytest.mark.parametrize("seed", range(20))
def test_bounds_are_bounds(seed: int) -> None:
    rng = random.Random(1000 + seed)
    work = tight(rng, random_work(rng))
    estimator, space, objective = Estimator(work), Space(work), rng.choice(OBJECTIVES)
    bounds = Bounds(estimator, space, objective)
    shapes = [shape for shape in space.shapes() if space.room(shape) >= shape.unit]
    for shape in rng.sample(shapes, min(6, len(shapes))):
        most = space.room(shape) // shape.unit * shape.unit
        for plan, state, inner, replicas in drawn(rng, space, shape):
            exact = estimator.objective(plan, objective)
            if estimator.memory.peak(plan) > bounds.budget:
                continue  # bounds speak of plans that fit
            assert bounds.quiet(shape, most)
            assert not bounds.size_exceeds(shape, inner, most)
            if objective != "memory":
                assert bounds.range(shape, most, 0.0) <= exact
            assert bounds.mode(shape, inner.recompute, shape.unit, most) <= exact
            rate = bounds.rate(shape, inner.recompute, shape.unit, most)
            best = max(space.replicas(shape, inner, PLAIN, 1, most))
            for kernels in (False, True):
                assert bounds.size(shape, inner, shape.unit, best, rate, exact=kernels) <= exact
            pace = bounds.pace(shape, inner, shape.unit, best, state)
            pipe = next(one for one in space.pipes(shape) if (one.schedule, one.vpp) == (plan.schedule, plan.vpp))
            if objective != "memory":
                assert bounds.leaf(shape, pipe, replicas, pace) <= exact
            assert not bounds.all_exceed(shape, inner, pipe, replicas)
            anything = bounds.any_state(shape, inner, shape.unit, best)
            if objective != "memory":
                assert bounds.pipe(shape, inner, pipe, (replicas,), anything) <= exact


def drawn(rng: random.Random, space: Space, shape: Shape) -> list[tuple[ParallelPlan, State, Inner, Replicas]]:
    """Some plans of a shape."""
    found = []
    for _ in range(30):
        state, inner = rng.choice(space.states(shape)), rng.choice(list(space.inners(shape)))
        pipe = rng.choice(space.pipes(shape))
        choices = space.replicas(shape, inner, pipe, 1, space.room(shape))
        if choices:
            replicas = rng.choice(choices)
            found.append((space.plan(shape, state, inner, pipe, replicas), state, inner, replicas))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_doubling_the_nodes_never_lengthens_the_run(seed: int) -> None:
    work = random_work(random.Random(2000 + seed))
    double = replace(work, cluster=replace(work.cluster, nodes=2 * work.cluster.nodes))
    small, large = search(work, top=1), search(double, top=1)
    if small.ranked:
        better = large.ranked[0]
        assert better.surviving_tokens_per_s >= small.ranked[0].surviving_tokens_per_s * (1 - 1e-12)
        days = [one.outlook.days_50 for one in (better, small.ranked[0])]
        assert days[0] is not None
        assert days[1] is not None
        assert days[0] <= days[1] * (1 + 1e-6)


def test_every_ranked_plan_is_legal_and_the_runnable_one_runs() -> None:
    work = work_of(DENSE, batch=16, nodes=2)
    result = search(work, top=20)
    assert len(result.ranked) == 20
    for one in result.ranked:
        arguments = {"model": work.model, "plan": one.plan, "batch": work.batch, "cluster": work.cluster}
        assert not rules.check(**arguments, precision=work.precision, modelled=True)  # type: ignore[arg-type]
        assert one.runnable == (not rules.check(**arguments, precision=work.precision))  # type: ignore[arg-type]
        assert one.fits
    assert result.best_runnable is not None
    assert result.best_runnable.runnable
    only = search(work, top=3, runnable_only=True)
    assert only.ranked[0].plan == result.best_runnable.plan
    assert all(one.runnable for one in only.ranked)


def test_what_cannot_run_has_no_runnable_plan() -> None:
    assert search(work_of(replace(SPARSE, embed_norm=True), nodes=2), top=1).best_runnable is None


def test_when_nothing_fits_the_closest_is_named() -> None:
    work = work_of(DENSE, nodes=1)
    small = replace(work, cluster=replace(work.cluster, device_memory_bytes=2**20))
    result = search(small)
    assert result.ranked == ()
    assert adds_up(result)
    assert result.closest is not None
    estimator = Estimator(small)
    least = min(estimator.memory.peak(plan) for plan in Space(small).leaves())
    assert result.closest.peak_bytes == pytest.approx(least)


def test_points_for_a_picture() -> None:
    result = search(work_of(DENSE, nodes=2), points=True)
    assert result.points
    assert all(point.step_s > 0 and point.peak_bytes > 0 and math.isfinite(point.step_s) for point in result.points)

"""The engine under many plans: which DeepSpeed engine it is, where each rank sits, what it holds, bf16, the rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest

from strategies.codec import to_json
from strategies.deepspeed_config import learning_rate
from strategies.plan import ParallelPlan
from strategies.specs import ModelSpec
from strategies.topology import Topology
from tests.support.gang import WarmPool
from tests.support.jobspecs import GPT, LLAMA, make_job, make_plan

TINY = dataclasses.replace(GPT, layers=4, hidden=32, ffn=96, vocab=97, seq=16)
TINY_LLAMA = dataclasses.replace(LLAMA, layers=4, hidden=32, ffn=88, vocab=97, seq=16)
BATCH = 8
TRAIN, DESCRIBE = "tests.support.ranks:train", "tests.support.ranks:describe"


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


def train(pool: WarmPool, degrees: dict[str, Any], *, steps: int, **recipe: Any) -> list[dict[str, Any]]:
    job = make_job(TINY, make_plan(TINY, BATCH, micro_batch=2, **degrees), global_batch=BATCH, clip=0.5, **recipe)
    arguments = {"job": to_json(job), "steps": steps}
    ranks = pool.run(TRAIN, world_size=job.plan.world_size, arguments=arguments, timeout_s=120)
    assert len({(tuple(rank["loss"]), tuple(rank["grad_norm"]), tuple(rank["lr"])) for rank in ranks}) == 1
    return ranks


def numbers(rank: dict[str, Any], key: str) -> list[float]:
    return [float.fromhex(text) for text in rank[key]]


BF16_PLANS: dict[str, dict[str, Any]] = {
    "1": {"zero_stage": 1},
    "dp2-zero0": {"dp": 2, "zero_stage": 0, "grad_dtype": "bf16"},
    "dp2-zero1": {"dp": 2, "zero_stage": 1},
    "dp2-zero2": {"dp": 2, "zero_stage": 2},
    "dp2-zero3": {"dp": 2, "zero_stage": 3},
    "dp2-zero1-bf16-grads": {"dp": 2, "zero_stage": 1, "grad_dtype": "bf16"},
    "pp2-zero1": {"pp": 2, "zero_stage": 1},
    "pp2-zero1-recompute": {"pp": 2, "zero_stage": 1, "recompute": "full"},
    "tp2-pp2-dp2-zero1": {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1},
    "tp2-dp2-zero2": {"tp": 2, "dp": 2, "zero_stage": 2},
}


@pytest.fixture(scope="module")
def fp32(pool: WarmPool) -> dict[str, Any]:
    return train(pool, {}, steps=8)[0]


@pytest.mark.parametrize("plan", BF16_PLANS)
def test_bf16_follows_fp32(pool: WarmPool, fp32: dict[str, Any], plan: str) -> None:
    degrees = BF16_PLANS[plan]
    rank = train(pool, degrees, steps=8, precision="bf16")[0]
    assert rank["engine"] == ("PipelineEngine" if degrees.get("pp", 1) != 1 else "DeepSpeedEngine")
    assert rank["zero_stage"] == degrees["zero_stage"]
    assert numbers(rank, "loss") == pytest.approx(numbers(fp32, "loss"), rel=1e-3)
    assert numbers(rank, "grad_norm") == pytest.approx(numbers(fp32, "grad_norm"), rel=2e-2)
    assert rank["loss"] != fp32["loss"]


@pytest.mark.parametrize("degrees", [{}, {"pp": 2}, {"dp": 2, "zero_stage": 3}], ids=["1", "pp2", "dp2-zero3"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_rate_is_a_function_of_the_step(pool: WarmPool, degrees: dict[str, Any], warmup: int) -> None:
    recipe: dict[str, Any] = {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": warmup}
    job = make_job(TINY, make_plan(TINY, BATCH, micro_batch=2, **degrees), global_batch=BATCH, **recipe)
    arguments = {"job": to_json(job), "steps": 20}
    rank = pool.run(TRAIN, world_size=job.plan.world_size, arguments=arguments, timeout_s=120)[0]
    assert numbers(rank, "lr") == [learning_rate(step, steps=20, **recipe) for step in range(1, 21)]
    assert numbers(rank, "lr")[-1] == pytest.approx(1e-4)


def describe(pool: WarmPool, model: ModelSpec, plan: ParallelPlan) -> list[dict[str, Any]]:
    job = make_job(model, plan, global_batch=BATCH)
    return pool.run(DESCRIBE, world_size=plan.world_size, arguments={"job": to_json(job)})


@pytest.mark.parametrize(
    ("model", "degrees"),
    [
        (TINY, {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1}),
        (TINY, {"tp": 2, "dp": 2, "zero_stage": 3}),
        (TINY_LLAMA, {"tp": 4, "pp": 2, "stages": (3, 1)}),
        (TINY_LLAMA, {"pp": 4, "stages": (1, 1, 2, 0)}),
    ],
    ids=["tp2-pp2-dp2", "tp2-dp2-zero3", "llama-tp4-pp2", "llama-pp4"],
)
def test_every_rank_is_where_the_topology_says_and_holds_its_part(
    pool: WarmPool, model: ModelSpec, degrees: dict[str, Any]
) -> None:
    plan = make_plan(model, BATCH, **degrees)
    topology = Topology(plan)
    ranks = describe(pool, model, plan)
    for number, rank in enumerate(ranks):
        at = topology.coordinates(number)
        assert rank["coordinates"] == [at.pipe, at.data, at.model]
        assert rank["needs_data"] == (at.pipe in (0, plan.pp - 1))
        wanted = {"tp": topology.tp_group(number), "dp": topology.dp_group(number), "pp": topology.pp_group(number)}
        assert rank["groups"] == {axis: list(group) if len(group) > 1 else [] for axis, group in wanted.items()}
        assert rank["threads"] == 1
        assert "0 micro-batches given" in rank["refusal"]
        boxes = [[stop - start for start, stop in box] for _, _, _, box, _ in rank["parameters"]]
        assert boxes == rank["local_shapes"]
    check_parts(model, plan, ranks)


def check_parts(model: ModelSpec, plan: ParallelPlan, ranks: list[dict[str, Any]]) -> None:
    """The primary parts of the replica 0 make up the model exactly once."""
    sizes: dict[str, int] = {}
    covered: dict[str, int] = {}
    for rank in ranks:
        if rank["coordinates"][1] == 0:
            for name, _, shape, box, primary in rank["parameters"]:
                sizes[name] = math.prod(shape)
                real = [max(0, min(stop, size) - start) for (start, stop), size in zip(box, shape, strict=True)]
                covered[name] = covered.get(name, 0) + math.prod(real) * primary
    assert covered == sizes
    assert sum(sizes.values()) == model.parameters
    for rank in ranks:
        blocks = {name.split(".")[1] for name, *_ in rank["parameters"] if name.startswith("blocks.")}
        assert len(blocks) == plan.stages[rank["coordinates"][0]]


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_copies_of_a_parameter_stay_bit_identical(pool: WarmPool, zero_stage: int) -> None:
    """Replicas, tensor-parallel copies of norms and biases, and the two ends of the tied embedding."""
    plan = make_plan(TINY, BATCH, tp=2, pp=2, dp=2, zero_stage=zero_stage, micro_batch=2)
    job = make_job(TINY, plan, global_batch=BATCH, clip=0.5)
    arguments = {"job": to_json(job), "steps": 4}
    ranks = pool.run("tests.support.ranks:fingerprints", world_size=8, arguments=arguments)
    copies: dict[str, list[str]] = {}
    for name, box, digest in (entry for rank in ranks for entry in rank):
        copies.setdefault(f"{name} {box}", []).append(digest)
    assert all(len(set(digests)) == 1 for digests in copies.values())
    counts = {key: len(digests) for key, digests in copies.items()}
    assert counts["embed.tokens.weight [[0, 49], [0, 32]]"] == 4  # two replicas, first and last stage
    assert counts["blocks.0.attn_norm.weight [[0, 32]]"] == 4  # two replicas, two tensor-parallel ranks
    assert counts["blocks.0.attn.q.weight [[0, 16], [0, 32]]"] == 2


@pytest.mark.parametrize("degrees", [{"schedule": "interleaved"}, {"vpp": 2}, {"cp": 2}], ids=str)
def test_what_is_modelled_only_is_refused(pool: WarmPool, degrees: dict[str, Any]) -> None:
    job = make_job(TINY, make_plan(TINY, BATCH, **degrees), global_batch=BATCH)
    (answer,) = pool.run("tests.support.gang_bodies:refusal", world_size=1, arguments={"job": to_json(job)})
    assert f"{next(iter(degrees))} is {next(iter(degrees.values()))}" in answer


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("degrees", [{"dp": 2, "zero_stage": 1}, {"pp": 2}], ids=str)
def test_ranks_know_how_long_their_engine_took_by_part(pool: WarmPool, degrees: dict[str, Any], late: bool) -> None:
    """DeepSpeed makes the groups, and talks in them: all of it is seen, once."""
    job = make_job(TINY, make_plan(TINY, BATCH, **degrees), global_batch=BATCH)
    arguments = {"job": to_json(job), "late": late, "seconds": 0.1}
    for rank in pool.run("tests.support.gang_bodies:built_slowly", world_size=2, arguments=arguments, timeout_s=60):
        built = rank["built"]
        meetings = rank["made"] + (rank["groups"] if late else 0)
        assert (rank["made"] > 0, rank["calls"] > rank["groups"] > 0) == (True, True)
        assert built["device_s"] > 0
        assert built["communicators_s"] >= 0.1 * meetings
        assert built["engine_s"] >= 0.1 * (rank["calls"] - (rank["groups"] if late else 0))

"""State beside the device: training is what it is without, in memory and on disks, through a checkpoint, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.disks import BUILD, is_compiled
from strategies.codec import to_json
from strategies.specs import MoeSpec
from tests.e2e.test_checkpoint import RESTORE, TIMEOUT_S, check_bit_identical
from tests.support.direct_io import require_state_on_disks
from tests.support.gang import WarmPool
from tests.support.jobspecs import GPT, make_job, make_plan

TINY = dataclasses.replace(GPT, layers=3, hidden=32, ffn=96, vocab=125, seq=16)  # tied embeddings
# DeepSpeed leaves in memory what is less than 1 MiB on a rank: of two replicas' fp32 state, less than 524,288 elements
WIDE = dataclasses.replace(GPT, layers=2, hidden=256, ffn=2048, vocab=125, seq=16)
EXPERTS = MoeSpec(experts=4, top_k=2, ffn=24, dense_layers=1, router_bias=True, balance_weight=0.02)
MOE = dataclasses.replace(TINY, init_std=0.1, moe=EXPERTS)
SUB_GROUP = 400_000  # elements of a turn with state on disks: several turns, and a last one that stays in memory
STEPS, BATCH, CLIP = 6, 4, 0.5
LOSS_TOLERANCE, NORM_TOLERANCE = 5e-6, 1e-5  # between two of DeepSpeed's optimizers


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


def job_of(plan: dict[str, Any], precision: str, model: Any = TINY) -> tuple[dict[str, Any], int]:
    """The job as JSON, and its number of ranks."""
    made = make_plan(model, BATCH, **plan)
    job = make_job(model, made, global_batch=BATCH, precision=precision, steps=STEPS, clip=CLIP)
    document = to_json(job)
    if made.zero_stage == 3:  # in memory, too: norms are sums over turns, and 16 bit shows their order
        document["deepspeed"]["zero_optimization"]["sub_group_size"] = SUB_GROUP
    return document, made.world_size


def numbers(pool: WarmPool, plan: dict[str, Any], precision: str, model: Any = TINY) -> tuple[list[float], list[float]]:
    """Losses and gradient norms."""
    job, world = job_of(plan, precision, model)
    arguments = {"job": job, "steps": STEPS}
    ranks = pool.run("tests.support.ranks:train", world_size=world, arguments=arguments, timeout_s=TIMEOUT_S)
    return [float.fromhex(x) for x in ranks[0]["loss"]], [float.fromhex(x) for x in ranks[0]["grad_norm"]]


def check_same(found: tuple[list[float], list[float]], wanted: tuple[list[float], list[float]]) -> None:
    assert min(wanted[1]) > CLIP, "clipping must bite in every step"
    assert found == wanted, "where state lives changes no bit"


def check_offload(
    pool: WarmPool, plan: dict[str, Any], precision: str, model: Any = TINY, offload: str = "optimizer"
) -> None:
    """Training with state in host memory is what it is without."""
    found = numbers(pool, plan | {"offload": offload}, precision, model)
    wanted = numbers(pool, plan, precision, model)
    if plan["zero_stage"] == 1 and precision == "bf16":
        # without offload that is another of DeepSpeed's optimizers (BF16_Optimizer), which sums in another order
        assert found[0] == pytest.approx(wanted[0], rel=LOSS_TOLERANCE)
        assert found[1] == pytest.approx(wanted[1], rel=NORM_TOLERANCE)
        found = wanted
    check_same(found, wanted)


FULL = pytest.mark.full
IN_MEMORY = [
    pytest.param({"pp": 2, "zero_stage": 1}, "bf16", id="pp2-bf16"),
    pytest.param({"pp": 2, "dp": 2, "zero_stage": 1}, "bf16", id="pp2-dp2-bf16", marks=FULL),
    pytest.param({"tp": 2, "pp": 2, "zero_stage": 1}, "bf16", id="tp2-pp2-bf16", marks=FULL),
    pytest.param({"pp": 2, "zero_stage": 1}, "fp32", id="pp2-fp32", marks=FULL),
    pytest.param({"pp": 2, "zero_stage": 1, "schedule": "dualpipev"}, "bf16", id="pp2-dualpipev-bf16", marks=FULL),
    pytest.param({"dp": 2, "zero_stage": 1}, "bf16", id="dp2-zero1-bf16", marks=FULL),
    pytest.param({"dp": 2, "zero_stage": 2}, "fp32", id="dp2-zero2-fp32", marks=FULL),
    pytest.param({"dp": 2, "zero_stage": 3}, "bf16", id="dp2-zero3-bf16"),
]


@pytest.mark.parametrize(("plan", "precision"), IN_MEMORY)
def test_state_in_host_memory_changes_nothing(pool: WarmPool, plan: dict[str, Any], precision: str) -> None:
    """Several micro-batches, clipping that bites, and embeddings of which two stages hold a copy."""
    check_offload(pool, plan, precision)


def test_a_partition_of_which_nothing_counts(pool: WarmPool) -> None:
    """All padding, or a copy of what another stage counts."""
    job, world = job_of({"dp": 2, "zero_stage": 1, "offload": "optimizer"}, "bf16")
    function = "tests.support.offload_ranks:norm_of_nothing"
    ranks = pool.run(function, world_size=world, arguments={"job": job}, timeout_s=TIMEOUT_S)
    assert ranks == [[0.0, "cpu", "meta"]] * 2


PARAMETERS = [
    pytest.param({"dp": 2, "zero_stage": 3}, "bf16", id="dp2-bf16"),
    pytest.param({"dp": 2, "zero_stage": 3}, "fp32", id="dp2-fp32", marks=FULL),
    pytest.param({"tp": 2, "dp": 2, "zero_stage": 3}, "fp32", id="tp2-dp2-fp32", marks=FULL),
    pytest.param({"dp": 2, "zero_stage": 3, "recompute": "full"}, "fp32", id="dp2-recompute-fp32", marks=FULL),
    pytest.param({"sp": 2, "zero_stage": 3}, "bf16", id="sp2-bf16", marks=FULL),
]


@pytest.mark.parametrize(("plan", "precision"), PARAMETERS)
def test_parameters_and_optimizer_in_host_memory_change_nothing(
    pool: WarmPool, plan: dict[str, Any], precision: str
) -> None:
    check_offload(pool, plan, precision, offload="optimizer+params")


OF_EXPERTS = [
    pytest.param({"zero_stage": 1}, "fp32", id="zero1-fp32"),
    pytest.param({"zero_stage": 2}, "bf16", id="zero2-bf16", marks=FULL),
    pytest.param({"zero_stage": 1, "pp": 2}, "bf16", id="pp2-zero1-bf16", marks=FULL),
    pytest.param({"zero_stage": 1, "tp": 2}, "bf16", id="tp2-zero1-bf16", marks=FULL),
]


@pytest.mark.parametrize(("plan", "precision"), OF_EXPERTS)
def test_state_of_spread_experts_in_host_memory_changes_nothing(
    pool: WarmPool, tmp_path: Path, plan: dict[str, Any], precision: str
) -> None:
    plan = plan | {"dp": 2, "ep": 2}
    check_offload(pool, plan, precision, MOE)
    check_bit_identical(pool, tmp_path, *job_of(plan | {"offload": "optimizer"}, precision, MOE))


@pytest.mark.full
def test_copies_of_tied_embeddings_learn_from_both_stages_in_fp16(pool: WarmPool) -> None:
    """DeepSpeed itself leaves out what the other stage adds: the norm was 14 % too small."""
    _, wanted = numbers(pool, {"zero_stage": 1}, "fp16")
    _, found = numbers(pool, {"pp": 2, "zero_stage": 1}, "fp16")
    assert found == pytest.approx(wanted, rel=5e-3)


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=FULL)])
def test_deepspeed_has_disks_and_parameters_in_zero_3_alone(pool: WarmPool, tmp_path: Path, stage: int) -> None:
    """It reads both words, does neither and says nothing: hence our rules, and no such rows in the table."""
    job, world = job_of({"dp": 2, "zero_stage": stage}, "fp32", WIDE)
    place = {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": False}
    arguments = {"job": job, "offload": {"offload_optimizer": place, "offload_param": place}}
    target = "tests.support.disk_ranks:what_moves"
    for found in pool.run(target, world_size=world, arguments=arguments, timeout_s=TIMEOUT_S):
        assert found == {"read": [str(tmp_path)] * 2, "host": True, "moved": []}
    assert list(tmp_path.iterdir()) == []


def test_a_node_without_the_op_says_what_to_do(pool: WarmPool, tmp_path: Path) -> None:
    (said,) = pool.run("tests.support.disk_ranks:refusals", world_size=1, arguments={"folder": str(tmp_path)})
    assert said["load"].startswith("ConfigError: DeepSpeed's op for state on disks (async_io) is not compiled on ")
    assert said["build"].startswith("ConfigError: DeepSpeed's op for state on disks (async_io) cannot be compiled here")
    assert "why:  a program that calls io_submit" in said["build"], "ninja is there, beside this Python"
    for text in said.values():
        assert "apt-get install g++ libaio-dev" in text
        assert BUILD in text


needs_op = pytest.mark.skipif(not is_compiled(), reason=f"DeepSpeed's async_io is not compiled here: {BUILD}")
ON_DISKS = [
    pytest.param("optimizer+params", {"dp": 2}, "fp32", id="params-fp32"),
    pytest.param("optimizer", {"dp": 2}, "bf16", id="optimizer-bf16", marks=FULL),
    pytest.param("optimizer", {"dp": 4}, "fp32", id="dp4-optimizer-fp32", marks=FULL),
    pytest.param("optimizer+params", {"tp": 2, "dp": 2}, "bf16", id="tp2-params-bf16", marks=FULL),
]


@needs_op
@pytest.mark.parametrize(("offload", "degrees", "precision"), ON_DISKS)
def test_state_on_disks_changes_nothing(
    pool: WarmPool, tmp_path: Path, offload: str, degrees: dict[str, Any], precision: str
) -> None:
    """Trains the same, goes on bit-identically from a checkpoint, and a plan that keeps it in memory goes on, too."""
    require_state_on_disks(tmp_path)
    disks = tmp_path / "disks"
    disks.mkdir()
    plain = degrees | {"zero_stage": 3}
    job, world = job_of(plain | {"offload": offload, "offload_path": str(disks)}, precision, WIDE)
    arguments = {"job": job, "steps": STEPS}
    rows = pool.run(
        "tests.support.disk_ranks:where_state_lives", world_size=world, arguments=arguments, timeout_s=TIMEOUT_S
    )
    for row in rows:
        assert row["moment_bytes"] >= 2**20
        assert row["masters"] < SUB_GROUP, "all but the last turn is on disks"
        if offload == "optimizer+params" and precision == "fp32":
            assert row["parameters_away"] == 4
            assert row["parameter_bytes"] == 4 * 2**20
        assert not row["left"]
    assert list(disks.iterdir()) == []
    wanted = numbers(pool, plain, precision, WIDE)
    found = ([float.fromhex(x) for x in rows[0][key]] for key in ("losses", "norms"))
    check_same(tuple(found), wanted)  # type: ignore[arg-type]
    path = check_bit_identical(pool, tmp_path / "run", job, world)
    # ZeRO-3 rounds what a linear layer computes before it adds the bias; without that DeepSpeed would keep all weights
    stays = precision == "bf16"
    back, world = job_of(plain if stays else {"dp": 2, "zero_stage": 1}, precision, WIDE)
    after = pool.run(
        RESTORE, world_size=world, timeout_s=TIMEOUT_S, arguments={"job": back, "manifest": str(path), "more": 1}
    )
    loss = float.fromhex(after[0]["results"][0][0])
    assert loss == (wanted[0][3] if stays else pytest.approx(wanted[0][3], rel=2e-6))


@needs_op
def test_what_was_saved_in_memory_goes_on_from_disks(pool: WarmPool, tmp_path: Path) -> None:
    require_state_on_disks(tmp_path)
    job, world = job_of({"dp": 2, "zero_stage": 1}, "fp32", WIDE)  # cut elsewhere: ranks read for each other
    first = pool.run(
        "tests.support.checkpoint_ranks:save_then_train",
        world_size=world,
        timeout_s=TIMEOUT_S,
        arguments={"job": job, "steps": 2, "more": 2},
        run_dir=str(tmp_path / "run"),
    )
    on_disks, _ = job_of(
        {"dp": 2, "zero_stage": 3, "offload": "optimizer", "offload_path": str(tmp_path)}, "fp32", WIDE
    )
    after = pool.run(
        RESTORE,
        world_size=world,
        timeout_s=TIMEOUT_S,
        arguments={"job": on_disks, "manifest": first[0]["path"], "more": 2},
    )
    assert [[float.fromhex(x) for x in row] for row in after[0]["results"]] == [
        pytest.approx([float.fromhex(x) for x in row], rel=2e-6) for row in first[0]["results"]
    ]

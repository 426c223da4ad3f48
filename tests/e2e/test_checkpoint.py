"""Checkpoints end to end: real gangs train, save, die and go on bit-identically, under every kind of optimizer."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.checkpoint import newest, read_manifest, verify
from jobs.checkpoint.digest import weights_digest
from jobs.checkpoint.layout import place_of
from jobs.checkpoint.reader import Reader
from jobs.checkpoint.shardfile import KINDS
from jobs.checkpoint.universal import export_universal
from jobs.spec import CheckpointSpec
from launcher.ledger import account
from launcher.run import EventKind, RunEvent
from strategies.codec import to_json
from tests.support.checkpoints import flip_and_sign_again, flip_bit
from tests.support.gang import WarmPool
from tests.support.jobspecs import GPT, LLAMA, make_job, make_plan
from tests.support.persisters import Node

# 125 tokens: tensor-parallel ranks hold padding. Three blocks: uneven stages.
TINY = dataclasses.replace(GPT, layers=3, hidden=32, ffn=96, vocab=125, seq=16)
TINY_LLAMA = dataclasses.replace(LLAMA, layers=3, hidden=32, ffn=80, vocab=125, seq=16)
TIMEOUT_S = 140.0  # per gang: seconds on an idle machine, a minute on a crowded one
SAVE, RESTORE = "tests.support.checkpoint_ranks:save_then_train", "tests.support.checkpoint_ranks:restore_then_train"


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


def job_of(
    plan: dict[str, Any], *, precision: str = "fp32", model: Any = TINY, **train: Any
) -> tuple[dict[str, Any], int]:
    """The job as JSON, and its number of ranks."""
    job = make_job(model, make_plan(model, 4, **plan), global_batch=4, precision=precision, steps=6, clip=0.5, **train)
    return to_json(job), job.plan.world_size


def check_bit_identical(pool: WarmPool, tmp_path: Path, job: dict[str, Any], world: int) -> Path:
    """Train 3, save, train 3; restore into a fresh gang, train 3: everything must be equal to the last bit."""
    first = pool.run(
        SAVE,
        world_size=world,
        timeout_s=TIMEOUT_S,
        arguments={"job": job, "steps": 3, "more": 3},
        run_dir=str(tmp_path),
    )
    path = Path(first[0]["path"])
    second = pool.run(
        RESTORE, world_size=world, timeout_s=TIMEOUT_S, arguments={"job": job, "manifest": str(path), "more": 3}
    )
    assert newest(tmp_path / "checkpoints") == path
    assert verify(path, deep=True) == []
    assert {row["digest"] for row in first} == {weights_digest(path)}
    for before, after in zip(first, second, strict=True):
        assert before["unchanged"]
        assert before["beside"] == {"waited": True, "equal": True, "changed": True}
        assert after["step"] == 3
        assert after["extra"] == {"sample_index": 12, "why": "test"}
        assert before["results"] == after["results"]
        assert before["noise"] == after["noise"]
        assert before["end"] == after["end"]
    assert first[0]["results"][0] != first[0]["results"][1]
    for times in zip(*(row["times"] for row in first), strict=True):
        assert max(acted for acted, _ in times) <= min(ended for _, ended in times), (
            "a step is complete on all or on none"
        )
    check_stored_once(path)
    check_read_once(path, second)
    received = sum(row["received"] for row in second)
    if job["plan"]["zero_stage"] and job["plan"]["tp"] == job["plan"]["pp"] == 1:
        assert received == 0, "the same plan finds all of it in its own shards"
    elif job["plan"]["zero_stage"]:
        assert received < sum(row["read"] for row in second), "only copies (norms, tied embeddings) travel"
    return path


def test_no_step_is_complete_before_the_state_of_the_step_before_is_on_another_node(
    pool: WarmPool, tmp_path: Path
) -> None:
    """So the loss of a node costs a step, also where a replica takes longer than the next step."""
    model = dataclasses.replace(TINY, layers=1, hidden=64, vocab=80_000, seq=8)
    job = make_job(model, make_plan(model, 2, dp=2, zero_stage=1), global_batch=2)
    job = dataclasses.replace(job, checkpoint=CheckpointSpec(memory_every=1))
    nodes = [Node(tmp_path, name) for name in "ab"]
    try:
        arguments = {"job": to_json(job), "persisters": [node.path for node in nodes], "steps": 3}
        arguments |= {"slow": nodes[1].process.pid}
        target = "tests.support.replica_ranks:replicas_in_time"
        ranks = pool.run(target, world_size=2, timeout_s=TIMEOUT_S, arguments=arguments, run_dir=str(tmp_path))
    finally:
        for node in nodes:
            node.close()
    assert [rank["held"] for rank in ranks] == [[True] * 2] * 2
    for waited, stalled in ((rank["waited_s"], rank["stalled_s"]) for rank in ranks):
        assert all(0 < wait <= stall for wait, stall in zip(waited, stalled, strict=True)), "and copying itself"
    at, lines = itertools.count(1.0), []
    for step, stall_s in enumerate(ranks[0]["stalled_s"], start=1):
        lines.append({"attempt": 1, "step": step, "time": 10.0 * next(at), "stall_s": stall_s})
    begun = RunEvent(seq=1, time=0.0, epoch=1, attempt=1, kind=EventKind.TRAINING_STARTED, data={"step": 1})
    books = account([begun], lines, now=20.0)
    assert books.memory_s == pytest.approx(sum(ranks[0]["stalled_s"]))
    assert books.seconds["productive"] == pytest.approx(20.0 - books.memory_s)
    assert max(ranks[0]["stalled_s"]) > 0.5, "a persister that stands still for a second is waited for"


def check_read_once(path: Path, rows: list[dict[str, Any]]) -> None:
    """All ranks together have read every byte of the model's state once, and no rank nearly all of it."""
    model = read_manifest(path).model
    assert sum(row["read"] for row in rows) == len(KINDS) * 4 * model.parameters
    assert len(rows) == 1 or max(row["read"] for row in rows) < 2 * sum(row["read"] for row in rows) / len(rows)


def check_stored_once(path: Path) -> None:
    """Every element of the model is in exactly one shard, and nothing else is."""
    manifest = read_manifest(path)
    assert sum(shard.elements for shard in manifest.shards) == manifest.model.parameters
    assert manifest.bytes == sum(file.stat().st_size for file in place_of(path).shard_dir.glob("*.safetensors"))
    reader = Reader(path)
    for name in reader.names:
        size = math.prod(reader.shape(name))
        for kind in KINDS:
            assert reader.read_flat(name, kind, 0, size).shape == (size,)


FEW = [
    pytest.param({"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1}, "fp32", TINY, id="tp2-pp2-dp2-zero1-fp32"),
    pytest.param({"pp": 2, "zero_stage": 0}, "fp32", TINY, id="pp2-zero0-fp32"),
    pytest.param({"dp": 2, "zero_stage": 1}, "fp32", TINY, id="dp2-zero1-fp32"),
    pytest.param({"dp": 2, "zero_stage": 2}, "fp32", TINY, id="dp2-zero2-fp32"),
    pytest.param({"dp": 2, "zero_stage": 3}, "fp32", TINY, id="dp2-zero3-fp32"),
    pytest.param({"dp": 2, "zero_stage": 1}, "bf16", TINY, id="dp2-zero1-bf16"),
    pytest.param({"dp": 2, "zero_stage": 2}, "bf16", TINY, id="dp2-zero2-bf16"),
    pytest.param({"dp": 2, "zero_stage": 3}, "bf16", TINY, id="dp2-zero3-bf16"),
    pytest.param({"tp": 2, "dp": 2, "zero_stage": 3}, "bf16", TINY_LLAMA, id="tp2-dp2-zero3-bf16-llama"),
]


@pytest.mark.parametrize(("plan", "precision", "model"), FEW)
def test_training_goes_on_bit_identically(
    pool: WarmPool, tmp_path: Path, plan: dict[str, Any], precision: str, model: Any
) -> None:
    check_bit_identical(pool, tmp_path, *job_of(plan, precision=precision, model=model))


OFFLOADED = [
    pytest.param({"dp": 2, "zero_stage": 3, "offload": "optimizer+params"}, "bf16", id="dp2-zero3-params"),
    pytest.param({"pp": 2, "zero_stage": 1, "offload": "optimizer"}, "bf16", id="pp2-zero1"),
    pytest.param(
        {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1, "offload": "optimizer"},
        "bf16",
        marks=pytest.mark.full,
        id="tp2-pp2-dp2-zero1",
    ),
    pytest.param(
        {"pp": 2, "zero_stage": 1, "offload": "optimizer", "schedule": "dualpipev"},
        "bf16",
        marks=pytest.mark.full,
        id="pp2-dualpipev",
    ),
    pytest.param(
        {"pp": 2, "dp": 2, "zero_stage": 1, "offload": "optimizer"}, "fp32", marks=pytest.mark.full, id="pp2-dp2-fp32"
    ),
    pytest.param({"dp": 2, "zero_stage": 1, "offload": "optimizer"}, "fp32", marks=pytest.mark.full, id="dp2-zero1"),
    pytest.param({"dp": 2, "zero_stage": 2, "offload": "optimizer"}, "bf16", marks=pytest.mark.full, id="dp2-zero2"),
    pytest.param(
        {"tp": 2, "dp": 2, "zero_stage": 3, "offload": "optimizer"}, "bf16", marks=pytest.mark.full, id="tp2-zero3"
    ),
]


@pytest.mark.parametrize(("plan", "precision"), OFFLOADED)
def test_state_in_host_memory_is_saved_and_restored(
    pool: WarmPool, tmp_path: Path, plan: dict[str, Any], precision: str
) -> None:
    path = check_bit_identical(pool, tmp_path, *job_of(plan, precision=precision))
    back, world = job_of({"dp": 2, "zero_stage": 1}, precision=precision)
    rows = pool.run(
        RESTORE, world_size=world, timeout_s=TIMEOUT_S, arguments={"job": back, "manifest": str(path), "more": 1}
    )
    assert {row["step"] for row in rows} == {3}, "a plan without offload goes on from it"


def test_a_checkpoint_of_one_schedule_goes_on_under_another(pool: WarmPool, tmp_path: Path) -> None:
    """DualPipeV to the last bit under itself; under 1F1B, and back, the same losses to rounding."""
    folded, world = job_of({"pp": 2, "zero_stage": 1, "schedule": "dualpipev"}, eps=1e-6)
    plain, _ = job_of({"pp": 2, "zero_stage": 1}, eps=1e-6)
    path = check_bit_identical(pool, tmp_path / "folded", folded, world)
    first = pool.run(
        SAVE,
        world_size=world,
        timeout_s=TIMEOUT_S,
        arguments={"job": plain, "steps": 3, "more": 3},
        run_dir=str(tmp_path / "plain"),
    )
    for job, manifest in ((plain, str(path)), (folded, first[0]["path"])):
        rows = pool.run(
            RESTORE, world_size=world, timeout_s=TIMEOUT_S, arguments={"job": job, "manifest": manifest, "more": 3}
        )
        for row in rows:
            assert [float.fromhex(loss) for loss, _, _ in row["results"]] == pytest.approx(
                [float.fromhex(loss) for loss, _, _ in first[0]["results"]], rel=2e-6
            )


@pytest.mark.parametrize(
    "plan",
    [
        {"dp": 2, "zero_stage": 1},
        pytest.param({"dp": 2, "zero_stage": 0, "grad_dtype": "fp16"}, marks=pytest.mark.full),
        pytest.param({"dp": 2, "zero_stage": 2}, marks=pytest.mark.full),
        pytest.param({"dp": 2, "zero_stage": 3}, marks=pytest.mark.full),
        pytest.param({"pp": 2, "dp": 2, "zero_stage": 1}, marks=pytest.mark.full),
        pytest.param({"tp": 2, "dp": 2, "zero_stage": 1}, marks=pytest.mark.full),
    ],
    ids=lambda plan: "-".join(f"{name}{value}" for name, value in plan.items()),
)
def test_the_loss_scale_goes_on_bit_identically(pool: WarmPool, tmp_path: Path, plan: dict[str, Any]) -> None:
    """fp16 with a scale that doubles after every step until it overflows, on both sides of the checkpoint."""
    job, world = job_of(plan, precision="fp16")
    job["deepspeed"]["fp16"] |= {"initial_scale_power": 22, "loss_scale_window": 1, "hysteresis": 1}
    path = check_bit_identical(pool, tmp_path, job, world)
    scaler = read_manifest(path).trainer.loss_scaler
    assert scaler["cur_iter"] == 3
    assert scaler["cur_scale"] not in (1, 2.0**22)
    if plan["zero_stage"]:
        assert scaler["last_overflow_iter"] >= 0


@pytest.mark.parametrize(
    "plan", [{"zero_stage": 1}, pytest.param({"zero_stage": 0, "grad_dtype": "fp16"}, marks=pytest.mark.full)]
)
def test_the_smallest_loss_scale_excuses_no_gradients(pool: WarmPool, plan: dict[str, Any]) -> None:
    """DeepSpeed would end the rank with an error of its own; phalanx tells of a blow-up and goes back."""
    job, world = job_of(plan, precision="fp16")
    job["deepspeed"]["fp16"] |= {"initial_scale_power": 2, "hysteresis": 1}
    arguments = {"job": job, "steps": 4}
    found = pool.run("tests.support.ranks:gradients_that_overflow", world_size=world, arguments=arguments)[0]
    assert [overflow for _, overflow, _ in found] == [True, True, False, False], "the scale: 4, 2, 1, 1"
    assert all(math.isfinite(loss) for loss, _, _ in found)
    assert [norm for _, _, norm in found[2:]] == [math.inf, math.inf]


MANY = [
    pytest.param(
        {"pp": pp, "tp": tp, "dp": dp, "zero_stage": stage, "grad_dtype": grad},
        precision,
        model,
        id=f"pp{pp}-tp{tp}-dp{dp}-zero{stage}-{precision}-{grad}-{model.flavour}",
    )
    for pp, tp, dp in [(1, 1, 1), (1, 1, 3), (1, 2, 2), (2, 1, 2), (2, 2, 1), (3, 2, 1)]
    for stage in ([0, 1] if pp > 1 else [0, 1, 2, 3])
    for precision, grad in [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")]
    for model in [TINY, TINY_LLAMA]
    if precision == "fp32" or stage > 0
]


@pytest.mark.full
@pytest.mark.parametrize(("plan", "precision", "model"), MANY)
def test_training_goes_on_bit_identically_under_every_plan(
    pool: WarmPool, tmp_path: Path, plan: dict[str, Any], precision: str, model: Any
) -> None:
    check_bit_identical(pool, tmp_path, *job_of(plan, precision=precision, model=model))


@pytest.mark.parametrize("bit", [0, 22], ids=["lowest", "highest-of-the-mantissa"])
def test_the_oracle_sees_one_flipped_bit(pool: WarmPool, tmp_path: Path, bit: int) -> None:
    """A single bit of a single weight, smuggled past the digests, must show in what training ends with.

    The losses show only the coarser one: they are means over many tokens, rounded to float32.
    """
    job, world = job_of({"dp": 2, "zero_stage": 1})
    first = pool.run(
        SAVE,
        world_size=world,
        timeout_s=TIMEOUT_S,
        arguments={"job": job, "steps": 3, "more": 3},
        run_dir=str(tmp_path),
    )
    path = Path(first[0]["path"])
    original = weights_digest(path)
    flip_and_sign_again(path, 0, "embed.tokens.weight", bit)
    assert verify(path, deep=True) == []
    assert weights_digest(path) != original
    second = pool.run(
        RESTORE, world_size=world, timeout_s=TIMEOUT_S, arguments={"job": job, "manifest": str(path), "more": 3}
    )
    assert bit == 0 or first[0]["results"] != second[0]["results"]
    assert any(before["end"] != after["end"] for before, after in zip(first, second, strict=True))


def test_a_flipped_bit_is_found_by_every_rank_and_an_older_checkpoint_restored(pool: WarmPool, tmp_path: Path) -> None:
    job, world = job_of({"tp": 2, "zero_stage": 1})
    good, damaged = (
        pool.run(
            SAVE,
            world_size=world,
            timeout_s=TIMEOUT_S,
            arguments={"job": job, "steps": steps, "more": 0},
            run_dir=str(tmp_path),
        )[0]
        for steps in (1, 2)
    )
    shard = place_of(Path(damaged["path"])).shard(1)
    flip_bit(shard, -1000)
    found = pool.run(
        "tests.support.checkpoint_ranks:restore_damaged",
        world_size=world,
        timeout_s=TIMEOUT_S,
        arguments={"job": job, "damaged": damaged["path"], "good": good["path"]},
    )
    for row in found:
        assert row["path"] == damaged["path"]
        assert "shard-00001" in row["reason"]
        assert row["step"] == 1


def test_one_rank_without_room_fails_the_save_on_all(pool: WarmPool, tmp_path: Path) -> None:
    job, world = job_of({"dp": 2, "zero_stage": 1})
    rows = pool.run(
        "tests.support.checkpoint_ranks:save_without_room",
        world_size=world,
        timeout_s=TIMEOUT_S,
        arguments={"job": job, "rank": 1},
        run_dir=str(tmp_path),
    )
    for row in rows:
        assert "Cannot write the checkpoint shard" in row["message"]
        assert "Free space" in row["message"]
    assert verify(rows[0]["path"], deep=True) == []


PLANS = [
    {"zero_stage": 0},
    {"dp": 2, "zero_stage": 3},
    {"tp": 2, "pp": 2, "zero_stage": 1},
]


def test_the_digest_depends_on_the_weights_only(pool: WarmPool, tmp_path: Path) -> None:
    """The same initial weights, saved under different plans, have one digest; another seed has another."""

    def digest(index: int, plan: dict[str, Any], seed: int = 0) -> str:
        job, world = job_of(plan, seed=seed)
        rows: list[str] = pool.run(
            "tests.support.checkpoint_ranks:save_initial",
            world_size=world,
            timeout_s=TIMEOUT_S,
            arguments={"job": job},
            run_dir=str(tmp_path / str(index)),
        )
        assert len(set(rows)) == 1
        return rows[0]

    digests = {digest(index, plan) for index, plan in enumerate(PLANS)}
    assert len(digests) == 1
    assert digest(9, PLANS[1], seed=1) not in digests


def test_another_plan_trains_on(pool: WarmPool, tmp_path: Path) -> None:
    """What TP2 x PP2 has saved goes on under DP2 ZeRO-3 with the losses of the first, to fp32 rounding."""
    job, world = job_of(PLANS[2])
    first = pool.run(
        SAVE,
        world_size=world,
        timeout_s=TIMEOUT_S,
        arguments={"job": job, "steps": 3, "more": 3},
        run_dir=str(tmp_path),
    )
    job, world = job_of(PLANS[1])
    second = pool.run(
        RESTORE, world_size=world, timeout_s=TIMEOUT_S, arguments={"job": job, "manifest": first[0]["path"], "more": 3}
    )
    check_read_once(Path(first[0]["path"]), second)
    assert sum(row["received"] for row in second) > 0
    there, here = (
        [[float.fromhex(value) for value in step] for step in rows[0]["results"]] for rows in (first, second)
    )
    for before, after in zip(there, here, strict=True):
        assert after == pytest.approx(before, rel=1e-5)


UNIVERSAL = [
    pytest.param({"dp": 2, "zero_stage": 1}, "fp32", id="dp2-zero1"),
    pytest.param({"dp": 2, "zero_stage": 3}, "fp32", id="dp2-zero3"),
    pytest.param({"tp": 2, "dp": 2, "zero_stage": 1}, "fp32", id="tp2-dp2-zero1", marks=pytest.mark.full),
    pytest.param({"tp": 2, "pp": 2, "zero_stage": 1}, "fp32", id="tp2-pp2-zero1", marks=pytest.mark.full),
    pytest.param({"dp": 2, "zero_stage": 2}, "bf16", id="dp2-zero2-bf16", marks=pytest.mark.full),
]


@pytest.fixture(scope="module")
def universal(pool: WarmPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """What 4 ranks (TP2 x PP2) have saved after 3 steps, in DeepSpeed's layout, and how they went on."""
    folder = tmp_path_factory.mktemp("universal")
    job, world = job_of(PLANS[2])
    rows = pool.run(
        SAVE, world_size=world, timeout_s=TIMEOUT_S, arguments={"job": job, "steps": 3, "more": 3}, run_dir=str(folder)
    )
    rate = float.fromhex(rows[0]["results"][0][2])  # of the step to come, as the command line computes it
    learning = {"lr": rate, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    export_universal(rows[0]["path"], folder / "out", learning=learning)
    return folder / "out", rows[0]["results"]


@pytest.mark.parametrize(("plan", "precision"), UNIVERSAL)
def test_deepspeed_loads_the_universal_layout(
    pool: WarmPool, universal: tuple[Path, list[Any]], plan: dict[str, Any], precision: str
) -> None:
    """DeepSpeed's own loader, at another degree of parallelism: the losses go on as they would have."""
    folder, expected = universal
    job, world = job_of(plan, precision=precision)
    rows = pool.run(
        "tests.support.checkpoint_ranks:load_universal_then_train",
        world_size=world,
        timeout_s=TIMEOUT_S,
        arguments={"job": job, "folder": str(folder), "first": 4, "last": 6},
    )
    assert all(row["loaded"] for row in rows)
    assert rows[0]["steps"] == 3
    assert rows[0]["lr"] == expected[0][2]
    rel = 1e-5 if precision == "fp32" else 2e-2
    for before, after in zip(expected, rows[0]["results"], strict=True):
        there, here = ([float.fromhex(value) for value in some] for some in (before, after))
        assert here == pytest.approx(there, rel=rel)


def test_another_plan_reads_it_without_loss(pool: WarmPool, tmp_path: Path) -> None:
    """TP2 x PP2, DP2 ZeRO-3, 1 rank, TP2 x PP2, DP4 ZeRO-1: weights and moments are the same to the last bit."""
    job, world = job_of(PLANS[2])
    run = pool.run(
        SAVE,
        world_size=world,
        timeout_s=TIMEOUT_S,
        arguments={"job": job, "steps": 2, "more": 0},
        run_dir=str(tmp_path / "0"),
    )
    source = Path(run[0]["path"])
    original, path = Reader(source), source
    for hop, plan in enumerate([PLANS[1], PLANS[0], PLANS[2], {"dp": 4, "zero_stage": 1}], start=1):
        job, world = job_of(plan)
        rows = pool.run(
            "tests.support.checkpoint_ranks:reshape",
            world_size=world,
            timeout_s=TIMEOUT_S,
            arguments={"job": job, "manifest": str(path)},
            run_dir=str(tmp_path / str(hop)),
        )
        check_read_once(path, rows)
        path = Path(rows[0]["path"])
        reader = Reader(path)
        assert reader.manifest.trainer.optimizer_steps == 2
        assert weights_digest(path) == weights_digest(source)
        for name in original.names:
            for kind in KINDS:
                stop = math.prod(original.shape(name))
                assert (original.read_flat(name, kind, 0, stop) == reader.read_flat(name, kind, 0, stop)).all()

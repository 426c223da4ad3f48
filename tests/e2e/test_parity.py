"""Every plan trains the same model: losses, gradient norms and final weights agree with plain torch on one rank.

The reference is a plain torch loop over the whole batch, without DeepSpeed. Clipping bites in every step. All plans see
one model, one seed and one sequence of global batches.

Two things about Adam decide how final weights can be compared. Its first update is the sign of the gradient: an element
whose gradient happens to be far below the rounding error of its neighbours can move by 2 lr between two correct plans.
With epsilon 1e-6 instead of 1e-8 such elements move in proportion; ``test_with_the_default_epsilon`` shows that losses
and norms do not need that. And the gradient of the key bias is zero in exact arithmetic (softmax does not see what is
added to all scores of a query), so its values are rounding noise; query, key and value bias of a block are compared as
the one tensor that they are in the usual fused layout.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from strategies.codec import to_json
from strategies.specs import ModelSpec
from tests.support.gang import WarmPool
from tests.support.jobspecs import GPT, LLAMA, make_job, make_plan

STEPS = 20
BATCH = 8
CLIP = 0.5
EPSILON = 1e-6
LOSS_TOLERANCE, NORM_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 1e-5, 1e-4

# 97 tokens: neither 2 nor 4 divides the vocabulary, so tensor parallelism pads it
TIED = dataclasses.replace(GPT, layers=4, hidden=32, ffn=128, vocab=97, seq=16)
LLAMA_TINY = dataclasses.replace(LLAMA, layers=4, hidden=32, ffn=88, vocab=97, seq=16)
MODELS = {
    "tied": TIED,
    "untied": dataclasses.replace(TIED, tied=False),
    "llama": LLAMA_TINY,
    "llama-tied": dataclasses.replace(LLAMA_TINY, tied=True),
}

PLANS: dict[str, dict[str, Any]] = {
    "1": {"micro_batch": 2},
    "dp4-zero0": {"dp": 4, "zero_stage": 0},
    "dp4-zero1": {"dp": 4, "zero_stage": 1},
    "dp4-zero2": {"dp": 4, "zero_stage": 2},
    "dp4-zero3": {"dp": 4, "zero_stage": 3},
    "tp2": {"tp": 2, "micro_batch": 4},
    "tp4": {"tp": 4, "micro_batch": 8},
    "pp2-zero0": {"pp": 2, "zero_stage": 0},
    "pp4": {"pp": 4, "zero_stage": 1, "micro_batch": 2},
    "tp2-pp2": {"tp": 2, "pp": 2, "micro_batch": 4},
    "tp2-pp2-dp2-zero1": {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1, "micro_batch": 2},
    "pp2-recompute": {"pp": 2, "recompute": "full", "micro_batch": 2},
    "pp2-uneven": {"pp": 2, "stages": (3, 1), "micro_batch": 2},
    "dp3": {"dp": 3, "zero_stage": 1},
    "tp2-pp2-dualpipev": {"tp": 2, "pp": 2, "zero_stage": 1, "micro_batch": 2, "schedule": "dualpipev"},
}
MORE_PLANS: dict[str, dict[str, Any]] = {
    "pp2-zero1": {"pp": 2, "zero_stage": 1},
    "pp2-dp2-zero0": {"pp": 2, "dp": 2, "zero_stage": 0},
    "pp4-zero0-uneven": {"pp": 4, "stages": (1, 2, 1, 0), "zero_stage": 0},
    "tp2-pp2-dp2-zero0": {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 0, "micro_batch": 2},
    "tp2-dp2-zero2": {"tp": 2, "dp": 2, "zero_stage": 2, "micro_batch": 2},
    "tp2-dp2-zero3": {"tp": 2, "dp": 2, "zero_stage": 3, "micro_batch": 2},
    "tp4-pp2": {"tp": 4, "pp": 2, "micro_batch": 4},
    "dp3-zero3": {"dp": 3, "zero_stage": 3},
    "dp3-micro3": {"dp": 3, "micro_batch": 3},
    "dp2-zero2-recompute": {"dp": 2, "zero_stage": 2, "recompute": "full"},
    "dp2-zero3-recompute": {"dp": 2, "zero_stage": 3, "recompute": "full"},
    "tp2-pp2-recompute": {"tp": 2, "pp": 2, "recompute": "full", "micro_batch": 4},
    "dp2-zero3-host": {"dp": 2, "zero_stage": 3, "offload": "optimizer+params"},
    "tp2-dp2-zero3-host": {"tp": 2, "dp": 2, "zero_stage": 3, "offload": "optimizer+params", "micro_batch": 2},
    "dp2-zero3-selective": {"dp": 2, "zero_stage": 3, "recompute": "selective"},
    "pp2-selective": {"pp": 2, "recompute": "selective"},
    "tp2-pp2-dp2-dualpipev": {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 1, "schedule": "dualpipev"},
    "pp2-dualpipev-zero0": {"pp": 2, "zero_stage": 0, "schedule": "dualpipev"},
    "pp4-dualpipev-empty-parts": {"pp": 4, "zero_stage": 1, "schedule": "dualpipev"},
    "pp2-dualpipev-uneven": {"pp": 2, "zero_stage": 1, "schedule": "dualpipev", "stages": (1, 3)},
    "pp2-dualpipev-recompute": {"pp": 2, "zero_stage": 1, "schedule": "dualpipev", "recompute": "full"},
    "pp2-dualpipev-selective": {"pp": 2, "zero_stage": 1, "schedule": "dualpipev", "recompute": "selective"},
}
LLAMA_PLANS = ("dp4-zero3", "tp4", "tp2-pp2-dp2-zero1", "pp2-recompute")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What a training leaves behind: per step the loss and the norm, and the weights by global name."""

    loss: np.ndarray[Any, np.dtype[np.float64]]
    grad_norm: np.ndarray[Any, np.dtype[np.float64]]
    weights: dict[str, np.ndarray[Any, np.dtype[np.float32]]]


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


@pytest.fixture(scope="module")
def reference(pool: WarmPool) -> Callable[..., Curve]:
    """The plain torch run of a model and a recipe, made once."""
    known: dict[str, Curve] = {}

    def run(model: ModelSpec, **recipe: Any) -> Curve:
        key = f"{model} {recipe}"
        if key not in known:
            job = make_job(model, global_batch=BATCH, **recipe)
            target = "tests.support.ranks:train_plainly"
            ranks = pool.run(target, world_size=1, arguments={"job": to_json(job), "steps": STEPS}, timeout_s=120)
            known[key] = curve(ranks)
        return known[key]

    return run


def train(
    pool: WarmPool, model: ModelSpec, degrees: dict[str, Any], *, steps: int = STEPS, **recipe: Any
) -> list[dict[str, Any]]:
    """Train one plan; what its ranks report."""
    job = make_job(model, make_plan(model, BATCH, **degrees), global_batch=BATCH, **recipe)
    document = to_json(job)
    if job.plan.zero_stage == 3:  # else parameters this small stay whole on every rank
        document["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    arguments = {"job": document, "steps": steps, "weights": True}
    return pool.run("tests.support.ranks:train", world_size=job.plan.world_size, arguments=arguments, timeout_s=240)


def curve(ranks: list[dict[str, Any]]) -> Curve:
    """Put the parts of all ranks together; every rank must have told the same story."""
    numbers = {key: {tuple(rank[key]) for rank in ranks} for key in ("loss", "grad_norm")}
    assert all(len(stories) == 1 for stories in numbers.values()), "ranks disagree about the loss or the norm"
    return Curve(
        loss=np.array([float.fromhex(text) for text in ranks[0]["loss"]]),
        grad_norm=np.array([float.fromhex(text) for text in ranks[0]["grad_norm"]]),
        weights=assemble(ranks, "final"),
    )


def assemble(ranks: list[dict[str, Any]], key: str) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Global tensors from the boxes of all ranks, padding cut off; every element must be there exactly once."""
    whole: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    for entry in (entry for rank in ranks for entry in rank[key]):
        target = whole.setdefault(entry["name"], np.full(entry["shape"], np.nan, dtype=np.float32))
        local = np.frombuffer(base64.b64decode(entry["data"]), dtype=np.float32)
        local = local.reshape([stop - start for start, stop in entry["box"]])
        inside = tuple(slice(start, stop) for start, stop in entry["box"])
        room = target[inside].shape
        assert np.isnan(target[inside]).all(), f"{entry['name']} is on two ranks"
        kept = tuple(slice(0, size) for size in room)
        target[inside] = local[kept]
        padding = local.copy()
        padding[kept] = 0
        assert not padding.any(), f"padding of {entry['name']} was trained"
    assert not any(np.isnan(value).any() for value in whole.values()), "a part of the model is nowhere"
    return whole


def differences(found: Curve, wanted: Curve) -> dict[str, float]:
    """Largest relative difference of loss, norm and weights (per tensor: difference over largest value)."""
    assert found.weights.keys() == wanted.weights.keys()
    a, b = fused_biases(found.weights), fused_biases(wanted.weights)
    return {
        "loss": float(np.abs(found.loss / wanted.loss - 1).max()),
        "grad_norm": float(np.abs(found.grad_norm / wanted.grad_norm - 1).max()),
        "weights": max(float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()) for name in b),
    }


def fused_biases(
    weights: dict[str, np.ndarray[Any, np.dtype[np.float32]]],
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """The same weights with the biases of q, k and v of a block as one tensor (see the top of this file)."""
    out = {name: value for name, value in weights.items() if not name.endswith(("q.bias", "k.bias", "v.bias"))}
    for name in weights:
        if name.endswith("q.bias"):
            stem = name.removesuffix("q.bias")
            out[f"{stem}qkv.bias"] = np.concatenate([weights[f"{stem}{part}.bias"] for part in "qkv"])
    return out


def check_parity(pool: WarmPool, reference: Callable[..., Curve], model: ModelSpec, degrees: dict[str, Any]) -> None:
    wanted = reference(model, clip=CLIP, eps=EPSILON)
    ranks = train(pool, model, degrees, clip=CLIP, eps=EPSILON)
    pipeline = "DualPipeVEngine" if degrees.get("schedule") == "dualpipev" else "PipelineEngine"
    assert {rank["engine"] for rank in ranks} == {pipeline if degrees.get("pp", 1) > 1 else "DeepSpeedEngine"}
    assert {rank["zero_stage"] for rank in ranks} == {degrees.get("zero_stage", 0)}
    shares = degrees.get("sp", 1) * (degrees.get("tp", 1) if degrees.get("sequence_parallel") else 1)
    assert {held for rank in ranks for held in rank["held"]} == {model.seq // shares}, "what norms get of a sequence"
    assert (wanted.grad_norm > CLIP).all(), "clipping must bite in every step"
    found = differences(curve(ranks), wanted)
    assert found["loss"] < LOSS_TOLERANCE, found
    assert found["grad_norm"] < NORM_TOLERANCE, found
    assert found["weights"] < WEIGHT_TOLERANCE, found


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", ["tied", pytest.param("untied", marks=pytest.mark.full)])
def test_gpt(pool: WarmPool, reference: Callable[..., Curve], model: str, plan: str) -> None:
    check_parity(pool, reference, MODELS[model], PLANS[plan])


@pytest.mark.parametrize("plan", LLAMA_PLANS)
def test_llama(pool: WarmPool, reference: Callable[..., Curve], plan: str) -> None:
    check_parity(pool, reference, MODELS["llama"], PLANS[plan])


@pytest.mark.full
@pytest.mark.parametrize("plan", PLANS | MORE_PLANS)
@pytest.mark.parametrize("model", MODELS)
def test_everything(pool: WarmPool, reference: Callable[..., Curve], model: str, plan: str) -> None:
    check_parity(pool, reference, MODELS[model], (PLANS | MORE_PLANS)[plan])


@pytest.mark.parametrize("plan", ["1", "tp2-pp2-dp2-zero1"])
def test_with_the_default_epsilon(pool: WarmPool, reference: Callable[..., Curve], plan: str) -> None:
    wanted = reference(TIED, clip=CLIP)
    found = differences(curve(train(pool, TIED, PLANS[plan], clip=CLIP)), wanted)
    assert found["loss"] < LOSS_TOLERANCE, found
    assert found["grad_norm"] < NORM_TOLERANCE, found
    assert found["weights"] < 0.1, found  # a few elements, see the top of this file


@pytest.mark.parametrize("degrees", [{}, {"pp": 2}, {"dp": 2, "zero_stage": 2}], ids=["1", "pp2-zero0", "dp2-zero2"])
def test_without_clipping_the_norm_is_reported_all_the_same(
    pool: WarmPool, reference: Callable[..., Curve], degrees: dict[str, Any]
) -> None:
    wanted = reference(TIED, clip=0.0, eps=EPSILON)
    found = differences(curve(train(pool, TIED, {"micro_batch": 2} | degrees, clip=0.0, eps=EPSILON)), wanted)
    assert found["loss"] < LOSS_TOLERANCE, found
    assert found["grad_norm"] < NORM_TOLERANCE, found
    assert found["weights"] < WEIGHT_TOLERANCE, found


def test_the_oracle_sees_a_batch_shifted_by_one(pool: WarmPool, reference: Callable[..., Curve]) -> None:
    """The tolerances would not hide a mistake: one row of one step is enough to break all three."""
    wanted = reference(TIED, clip=CLIP, eps=EPSILON)
    job = to_json(make_job(TIED, global_batch=BATCH, clip=CLIP, eps=EPSILON))
    shifted = pool.run(
        "tests.support.ranks:train_plainly", world_size=1, arguments={"job": job, "steps": STEPS, "shift_at": 10}
    )
    found = differences(curve(shifted), wanted)
    assert found["loss"] > 10 * LOSS_TOLERANCE, found
    assert found["grad_norm"] > 10 * NORM_TOLERANCE, found
    assert found["weights"] > 10 * WEIGHT_TOLERANCE, found


@pytest.mark.parametrize(
    "degrees", [{"pp": 2}, {"tp": 2}, {"tp": 2, "dp": 2, "zero_stage": 1}], ids=["pp2-zero0", "tp2", "tp2-dp2-zero1"]
)
def test_without_our_marks_the_norm_is_wrong(
    pool: WarmPool, reference: Callable[..., Curve], degrees: dict[str, Any]
) -> None:
    """The bugs of DeepSpeed that the marks step around are still there; else the marks may go."""
    plan = make_plan(TIED, BATCH, micro_batch=4, **degrees)
    job = to_json(make_job(TIED, plan, global_batch=BATCH, clip=CLIP, eps=EPSILON))
    norms = pool.run("tests.support.ranks:unmarked_norm", world_size=plan.world_size, arguments={"job": job})
    wanted = reference(TIED, clip=CLIP, eps=EPSILON).grad_norm[0]
    assert float.fromhex(norms[0]) < 0.99 * wanted


def test_initial_weights_do_not_depend_on_the_plan(pool: WarmPool) -> None:
    whole = assemble(train(pool, TIED, {"micro_batch": 8}, steps=0), "initial")
    for plan in ("tp2-pp2-dp2-zero1", "dp4-zero3"):
        parts = assemble(train(pool, TIED, PLANS[plan], steps=0), "initial")
        assert parts.keys() == whole.keys()
        assert all(np.array_equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("plan", ["tp2-pp2-dp2-zero1", "dp4-zero3", "pp2-zero0"])
def test_the_same_plan_twice_is_bit_identical(pool: WarmPool, plan: str) -> None:
    first, second = (train(pool, TIED, PLANS[plan], steps=5, clip=CLIP) for _ in range(2))
    assert first == second

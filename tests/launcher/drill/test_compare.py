"""A run against the undisturbed one: every number, and the weights of the end wherever they must be looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.checkpoint.slices import whole
from launcher.drill.case import Outcome
from launcher.drill.compare import WEIGHTS, Comparison, compare
from launcher.run import EventKind
from launcher.store import RunStore
from strategies.specs import Precision
from tests.support import checkpoints
from tests.support.drills import metrics
from tests.support.fakes import tiny_request
from tests.support.runs import put

Make = Callable[..., RunStore]
PIECE = [[whole("w", (30, 10), 0, 300)]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(name: str, *, digest: str = "w", loss: float = 0.1, precision: Precision = "fp32") -> RunStore:
        request = tiny_request(tmp_path, name=name)
        job = replace(request.job, train=replace(request.job.train, precision=precision))
        run = RunStore.create(replace(request, job=job))
        metrics(run, 1, range(1, 21), 5.0, loss)
        put(run, 20, EventKind.RUN_SUCCEEDED, step=20, weights_digest=digest)
        return run

    return made


def save(run: RunStore, *, scale: float = 1.0, step: int = 20) -> None:
    checkpoints.write_checkpoint(run.paths.checkpoint_dir, step, ranks=PIECE, scale=scale)


def test_one_bit_and_one_digest_are_seen(make: Make) -> None:
    reference = make("undisturbed")
    assert compare(make("same"), reference) == Comparison(identical=True, worst=0.0)
    run = make("close")
    metrics(run, 2, [9], 5.0, loss=0.1 * (1 + 2**-52))
    save(reference)
    save(run)
    found = compare(run, reference)
    assert (found.identical, found.first, found.weights) == (False, 9, 0.0)
    assert 0 < found.worst < 1e-15
    assert not found.meets(Outcome.SAME, "fp32")
    assert found.meets(Outcome.CLOSE, "fp32")
    assert not compare(make("other", digest="v"), reference).meets(Outcome.SAME, "fp32")


def test_a_run_that_failed_is_not_compared(tmp_path: Path, make: Make) -> None:
    other = RunStore.create(tiny_request(tmp_path, name="failed"))
    put(other, 30, EventKind.RUN_FAILED, reason="an example")
    assert compare(other, make("undisturbed")).problem == "the run failed: an example"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_compared_in_every_precision(make: Make, precision: Precision) -> None:
    """The fp32 masters are: equal losses and other weights are not the same run."""
    reference = make("undisturbed", precision=precision)
    save(reference)
    rtol, atol = WEIGHTS[precision]
    weights = checkpoints.values((30, 10), "master")
    size = np.max(np.abs(weights)) if precision == "fp32" else np.sqrt(np.mean(weights**2))
    for name, times, meets in (("near", 0.5, True), ("far", 2.0, False)):
        run = make(name, digest="v", precision=precision)
        save(run, scale=1 + times * (rtol + atol / float(size)))
        found = compare(run, reference)
        assert found.weights == pytest.approx(times, rel=0.01)
        assert found.meets(Outcome.CLOSE, precision) is meets


@pytest.mark.parametrize(("name", "meets"), [("blocks.0.mlp.experts.7.up.weight", True), ("blocks.0.w", False)])
def test_experts_may_be_further_off_in_16_bits(make: Make, name: str, meets: bool) -> None:
    """A token that is between two of them goes to the other."""
    for precision in ("bf16", "fp32"):
        reference = make(f"undisturbed-{precision}", precision=precision)
        run = make(f"run-{precision}", digest="v", precision=precision)
        for store, scale in ((reference, 1.0), (run, 1 + 5 * WEIGHTS["bf16"][0])):
            pieces = [[whole(name, (30, 10), 0, 300)]]
            checkpoints.write_checkpoint(store.paths.checkpoint_dir, 20, ranks=pieces, scale=scale)
        assert compare(run, reference).meets(Outcome.CLOSE, precision) is (meets and precision == "bf16")


@pytest.mark.parametrize("step", [0, 18])
def test_weights_that_cannot_be_read_are_not_equal(make: Make, step: int) -> None:
    reference, run = make("undisturbed"), make("run", digest="v")
    save(reference)
    if step:
        save(run, step=step)
    found = compare(run, reference)
    assert found.unread == "'run' has no checkpoint of step 20."
    assert not found.meets(Outcome.CLOSE, "fp32")


def test_a_damaged_checkpoint_of_the_end_is_told_and_ends_no_drill(make: Make) -> None:
    reference, run = make("undisturbed"), make("run", digest="v")
    save(reference)
    save(run)
    (shard,) = run.paths.checkpoint_dir.rglob("*.safetensors")
    checkpoints.flip_bit(shard, -3500)  # of three times 1200 bytes the first are the masters
    found = compare(run, reference)
    assert "is damaged" in found.unread
    assert not found.meets(Outcome.CLOSE, "fp32")


def test_what_is_not_a_number_is_as_far_as_can_be(make: Make) -> None:
    reference, run = make("undisturbed"), make("run", digest="v")
    save(reference)
    save(run, scale=math.nan)
    assert compare(run, reference).weights == math.inf
    spoiled = make("spoiled", digest="v")
    save(spoiled)
    metrics(spoiled, 2, [9], 5.0, loss=math.nan)
    found = compare(spoiled, reference)
    assert (found.worst, found.meets(Outcome.CLOSE, "fp32")) == (math.inf, False)


def test_other_tensors_are_another_model(make: Make) -> None:
    reference, run = make("undisturbed"), make("run", digest="v")
    save(reference)
    pieces: list[Any] = [[whole("v", (30, 10), 0, 300)]]
    checkpoints.write_checkpoint(run.paths.checkpoint_dir, 20, ranks=pieces)
    assert "not of the same tensors" in compare(run, reference).unread

"""Which samples an evaluation takes, and that its mean is over exactly those, under any plan."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobs.spec import JobSpec
from jobs.stages.evaluation import Evaluation
from tests.support.jobspecs import GPT, make_job, make_plan

BATCH = 8


def job_of(*, dp: int = 1, micro_batch: int = 2, **train: Any) -> JobSpec:
    plan = make_plan(GPT, BATCH, micro_batch=micro_batch, dp=dp)
    return make_job(GPT, plan, global_batch=BATCH, **train)


class Replica:
    """An engine whose loss of sample ``i`` is ``i``: a sum over its rows, divided as ours are by a whole batch."""

    def __init__(self, job: JobSpec, data: int) -> None:
        self.plan = job.plan
        self.grid = SimpleNamespace(data=data)
        self.needs_data = True
        self.seen: list[int] = []

    def evaluate(self, batches: list[tuple[int | None, ...]]) -> float:
        rows = [row for batch in batches for row in batch if row is not None]
        self.seen += rows
        return sum(rows) / BATCH


def run(evaluation: Evaluation, replica: Replica, beats: list[int]) -> dict[str, Any]:
    return evaluation.run(cast(Any, replica), cast(Any, lambda rows: rows), lambda: beats.append(1))


@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize(("there", "batches"), [(1000, 4), (21, 4), (3, 1), (8, 2)])
def test_the_mean_is_over_what_there_is(there: int, batches: int, dp: int) -> None:
    job = job_of(dp=dp, micro_batch=1, eval_every=5, eval_batches=batches)
    evaluation = Evaluation(job, cast(Any, SimpleNamespace(count=there)))
    beats: list[int] = []
    total, seen = 0.0, []
    for data in range(dp):
        replica = Replica(job, data)
        found = run(evaluation, replica, beats)
        total += found["loss"]  # what a reduction over the replicas would do
        seen += replica.seen
    count = min(there, BATCH * batches)
    assert sorted(seen) == list(range(count))
    assert found["samples"] == count
    assert total == pytest.approx(sum(range(count)) / count)
    assert len(beats) == dp * -(-count // BATCH), "every batch is a sign of life"


def test_when_it_is_due() -> None:
    samples = cast(Any, SimpleNamespace(count=10))
    evaluation = Evaluation(job_of(eval_every=6, steps=20), samples)
    assert [step for step in range(1, 21) if evaluation.due(step)] == [6, 12, 18, 20]
    assert not Evaluation(job_of(steps=20), samples).due(20)
    assert not Evaluation(job_of(eval_every=6, steps=20), None).due(6)


def test_ranks_in_the_middle_get_nothing() -> None:
    job = job_of(eval_every=1)
    replica = Replica(job, 0)
    replica.needs_data = False
    found = run(Evaluation(job, cast(Any, SimpleNamespace(count=8))), replica, [])
    assert replica.seen == []
    assert found["perplexity"] == math.exp(found["loss"])


def test_a_loss_beyond_all_numbers_has_a_perplexity() -> None:
    job = dataclasses.replace(job_of(eval_every=1))
    replica = Replica(job, 0)
    replica.evaluate = lambda batches: 1e4  # type: ignore[method-assign]
    found = run(Evaluation(job, cast(Any, SimpleNamespace(count=8))), replica, [])
    assert math.isfinite(found["perplexity"])


def test_an_evaluation_of_nothing_is_said() -> None:
    """Nothing of it is in the metrics, so that nobody would notice."""
    said = Evaluation(job_of(eval_every=6, steps=20), None).missing
    assert "train.eval_every=6 evaluates nothing" in said
    assert "train.eval_every=0" in said
    assert not Evaluation(job_of(steps=20), None).missing
    assert not Evaluation(job_of(eval_every=6), cast(Any, SimpleNamespace(count=1))).missing

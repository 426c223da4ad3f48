"""What a rank trains on: the samples of the schedule, whatever is read when."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from jobs.metrics import MetricsWriter
from jobs.parallel.vocabulary import IGNORE
from jobs.spec import JobSpec
from jobs.stages import feed as feeding
from jobs.stages.feed import Feed
from jobs.stages.pretrain import Pretrain
from strategies.errors import StorageError
from strategies.schedule import BatchChange, SampleSchedule, Skip
from tests.support.jobspecs import GPT, make_job, make_plan

SEQ = GPT.seq
LONG_S = 30.0


class Samples:
    """Sample ``i`` is ``i, i + 1, ...``; one of them may be unreadable, and each tells that it was read."""

    count = 1000

    def __init__(self, bad: int = -1) -> None:
        self.bad = bad
        self.read: dict[int, threading.Event] = {}

    def event(self, index: int) -> threading.Event:
        return self.read.setdefault(index, threading.Event())

    def sample(self, seed: int, index: int) -> npt.NDArray[np.int64]:
        self.event(index).set()
        if index == self.bad:
            raise StorageError("The token store cannot be used.")
        return np.arange(index, index + SEQ + 1)


def engine_of(data: int = 0, *, needs_data: bool = True, held: slice = slice(0, SEQ)) -> Any:
    grid = SimpleNamespace(data=data, tokens=lambda seq: held)
    return SimpleNamespace(grid=grid, needs_data=needs_data, fetchable=lambda batch: batch)


def job_of(*, dp: int = 1, micro_batch: int = 2, rows: int = 8, steps: int = 6) -> JobSpec:
    return make_job(GPT, make_plan(GPT, rows, micro_batch=micro_batch, dp=dp), global_batch=rows, steps=steps)


def feed_of(monkeypatch: pytest.MonkeyPatch, job: JobSpec, engine: Any, samples: Samples | None = None) -> Feed:
    monkeypatch.setattr(feeding, "open_samples", lambda data, seq: samples or Samples())
    return Feed(job, engine)


RAMP = SampleSchedule(
    global_batch=2,
    changes=(BatchChange(step=3, global_batch=5), BatchChange(step=5, global_batch=8)),
    skips=(Skip(step=4, samples=7),),
)


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("dp", [1, 2])
def test_every_step_gets_the_samples_of_the_schedule(monkeypatch: pytest.MonkeyPatch, first: int, dp: int) -> None:
    """Under a ramp, a skip and padding, from any step on; evaluation in between takes its own."""
    job = job_of(dp=dp)
    for data in range(dp):
        feed = feed_of(monkeypatch, job, engine_of(data))
        feed.begin(RAMP, first)
        for step in range(first, 7):
            batches = feed.take(step)
            feed.micro_batch((90, 91), Samples())
            wanted = [RAMP.rows(step, data, m, job.plan) for m in range(RAMP.micro_batches(step, job.plan))]
            assert [[int(row[0]) if target[0] != IGNORE else None for row, target in zip(*batch, strict=True)]
                    for batch in batches] == [list(rows) for rows in wanted]  # fmt: skip
            for tokens, targets in batches:
                real = targets[:, 0] != IGNORE
                assert torch.equal(tokens[real] + 1, targets[real])
                assert (tokens[~real] == 0).all()
                assert (targets[~real] == IGNORE).all()
        feed.end()


def test_a_rank_gets_its_part_of_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = feed_of(monkeypatch, job_of(), engine_of(held=slice(8, 16)))
    tokens, targets = feed.micro_batch((3, None), feed.samples)
    assert tokens.tolist() == [list(range(11, 19)), [0] * 8]
    assert targets.tolist() == [list(range(12, 20)), [IGNORE] * 8]
    assert tokens.dtype == targets.dtype == torch.int64


def test_a_rank_that_looks_at_nothing_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples()
    feed = feed_of(monkeypatch, job_of(), engine_of(needs_data=False), samples)
    feed.begin(RAMP, 1)
    shapes = [[tuple(tokens.shape) for tokens, _ in feed.take(step)] for step in range(1, 7)]
    assert shapes == [[(2, SEQ)] * RAMP.micro_batches(step, job_of().plan) for step in range(1, 7)]
    assert not samples.read
    feed.end()


def test_no_thread_runs_before_the_reading_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm pool forks with what it has imported and made; one thread more, and it could not."""
    before = threading.active_count()
    feed = feed_of(monkeypatch, job_of(), engine_of())
    assert threading.active_count() == before
    feed.begin(RAMP, 1)
    assert threading.active_count() == before + 1
    feed.end()
    assert threading.active_count() == before


def loop_of(monkeypatch: pytest.MonkeyPatch, samples: Samples, train: Any, tmp_path: Any) -> Pretrain:
    """A loop of one rank whose engine is ``train``."""
    job, loop = job_of(steps=3), object.__new__(Pretrain)
    engine = engine_of()
    engine.own_time = SimpleNamespace(begin=lambda count: None, end=lambda: (0.1, 0.1), queued_s=0.0)
    engine.train_step = train
    nothing = SimpleNamespace(step=0, step_begin=lambda step: None, step_end=lambda step: None)
    loop._job, loop._engine, loop._hooks, loop._counter = job, engine, nothing, nothing
    loop._schedule, loop._env = SampleSchedule(global_batch=8), SimpleNamespace(attempt=1, epoch=1)  # type: ignore[assignment]
    loop._reporter = SimpleNamespace(send=lambda *unused, **more: None)  # type: ignore[assignment]
    loop._saver = SimpleNamespace(stalled_s=lambda: 0.0, copies_every=0)
    loop._orders = SimpleNamespace(leaves_after=lambda step: False)  # type: ignore[assignment]
    loop._watch = SimpleNamespace(judge=lambda loss, norm: "")  # type: ignore[assignment]
    loop._evaluation = SimpleNamespace(due=lambda step: False)  # type: ignore[assignment]
    loop._metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    loop._feed = feed_of(monkeypatch, job, engine, samples)
    loop._feed.begin(loop._schedule, 1)
    return loop


RESULT = SimpleNamespace(loss=1.0, grad_norm=1.0, lr=0.1, overflow=False, moe=None)


def test_a_step_trains_while_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A step here is as long as it takes until the whole of the next one was read: for ever, if nobody does."""
    samples = Samples()

    def train(step: int, batches: Any, *, tokens: int) -> Any:
        if step < 3:
            assert all(samples.event(index).wait(LONG_S) for index in range(step * 8, step * 8 + 8))
        return RESULT

    loop = loop_of(monkeypatch, samples, train, tmp_path)
    for step in (1, 2, 3):
        loop._step(step, due=False)
    assert sorted(samples.read) == list(range(24)), "nothing beyond the last step"
    loop._feed.end()


def test_an_unreadable_sample_fails_the_step_that_needs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    trained: list[int] = []

    def train(step: int, batches: Any, *, tokens: int) -> Any:
        trained.append(step)
        if step == 1:
            assert samples.event(11).wait(LONG_S)  # the error is there before the step that it belongs to
        return RESULT

    samples = Samples(bad=11)
    loop = loop_of(monkeypatch, samples, train, tmp_path)
    loop._step(1, due=False)
    with pytest.raises(StorageError, match="token store") as caught:
        loop._step(2, due=False)
    assert trained == [1]
    assert loop._counter.step == 2
    assert any(entry.name == "sample" for entry in caught.traceback)
    loop._feed.end()


def test_a_job_without_steps_left_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, job = Samples(), job_of(steps=4)
    feed = feed_of(monkeypatch, job, engine_of(), samples)
    feed.begin(RAMP, 5)
    feed.end()
    assert not samples.read

"""The parts of the pretraining loop that decide something without a gang."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.checkpoint import CorruptCheckpoint
from jobs.checkpoint.errors import Unsaved
from jobs.checkpoint.exchange import Traffic
from jobs.checkpoint.manifest import Manifest, TrainerState
from jobs.checkpoint.restore import RestoredState
from jobs.numerics import BlowUp, LossWatch
from jobs.parallel.router_log import RouterStats
from jobs.paths import RunPaths
from jobs.spec import DataSpec, JobSpec
from jobs.stages import pretrain
from jobs.stages.pretrain import Pretrain, continued, refuse_another_run, replace_file
from jobs.worker import exit_code
from strategies.errors import ConfigError, ResumeRefused, StorageError
from strategies.schedule import BatchChange, SampleSchedule, Skip
from strategies.specs import BatchSpec
from tests.support.jobspecs import make_job


@pytest.fixture
def job() -> JobSpec:
    return dataclasses.replace(make_job(seed=3), data=DataSpec(kind="text", digest="abc", vocab=128))


def batch(size: int) -> BatchSpec:
    return BatchSpec(global_batch=size, seq=32)


def restored_from(job: JobSpec) -> RestoredState:
    trainer = TrainerState(optimizer_steps=4, learning_rates=(), counters={}, loss_scaler={})
    manifest = Manifest(
        run_id=job.run_id,
        step=4,
        epoch=1,
        attempt=1,
        time=0.0,
        plan=job.plan,
        model=job.model,
        tensors={},
        shards=(),
        trainer=trainer,
        extra={"data": {"digest": job.data.digest, "vocab": job.data.vocab}, "seed": job.train.seed},
    )
    return RestoredState(step=4, extra=manifest.extra, manifest=manifest, traffic=Traffic())


def test_the_same_run_is_welcome_with_a_model_of_another_name(job: JobSpec) -> None:
    renamed = dataclasses.replace(job, model=dataclasses.replace(job.model, name="other"))
    assert renamed != job
    refuse_another_run(restored_from(job), renamed)  # raises nothing


def test_a_run_of_the_same_sweep_is_another(job: JobSpec) -> None:
    """Model, samples and seed are the same."""
    with pytest.raises(ResumeRefused, match="is of another run") as caught:
        refuse_another_run(restored_from(job), dataclasses.replace(job, run_id="sweep-2"))
    assert caught.value.why == "run: test in the checkpoint, sweep-2 here"


def test_another_run_is_refused_with_every_difference(job: JobSpec) -> None:
    other = dataclasses.replace(
        job,
        model=dataclasses.replace(job.model, norm_eps=1e-6),
        train=dataclasses.replace(job.train, seed=4),
        data=dataclasses.replace(job.data, digest="def", vocab=129),
    )
    with pytest.raises(ResumeRefused) as caught:
        refuse_another_run(restored_from(job), other)
    for words in (
        "model.norm_eps: 1e-05 in the checkpoint, 1e-06 here",
        "data digest: abc",
        "vocabulary: 128 in the checkpoint, 129 here",
        "seed: 3",
    ):
        assert words in str(caught.value)


def test_the_schedule_goes_on_where_it_was() -> None:
    recorded = SampleSchedule(global_batch=8, skips=(Skip(step=2, samples=5),))
    assert continued(recorded, 5, batch(8), recorded.skips) == recorded


def test_a_skip_that_was_decided_since_counts() -> None:
    recorded = SampleSchedule(global_batch=8, skips=(Skip(step=2, samples=5), Skip(step=9, samples=1)))
    skips = (Skip(step=2, samples=5), Skip(step=6, samples=8))  # and one that was only planned was taken back
    schedule = continued(recorded, 5, batch(8), skips)
    assert schedule == SampleSchedule(global_batch=8, skips=skips)
    assert [schedule.step_range(step).start for step in (5, 6, 9)] == [37, 53, 77]


@pytest.mark.parametrize("skips", [(), (Skip(step=4, samples=5),), (Skip(step=2, samples=5), Skip(step=4, samples=1))])
def test_history_is_not_rewritten(skips: tuple[Skip, ...]) -> None:
    recorded = SampleSchedule(global_batch=8, skips=(Skip(step=2, samples=5),))
    with pytest.raises(ResumeRefused, match="5 before step 2 in the checkpoint"):
        continued(recorded, 5, batch(8), skips)


def test_another_batch_leaves_no_sample_out_and_repeats_none() -> None:
    recorded = SampleSchedule(global_batch=8)
    changed = continued(recorded, 5, batch(6))
    assert [changed.step_range(step) for step in (4, 5, 6)] == [range(24, 32), range(32, 38), range(38, 44)]
    back = continued(changed, 7, batch(8))
    assert [back.step_range(step) for step in (6, 7)] == [range(38, 44), range(44, 52)]


def test_an_older_checkpoint_forgets_later_changes() -> None:
    recorded = SampleSchedule(global_batch=8, changes=(BatchChange(step=5, global_batch=6),))
    assert continued(recorded, 3, batch(6)).step_range(3) == range(16, 22)
    assert continued(recorded, 3, batch(8)).step_range(5) == range(32, 40)


def test_files_are_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "final.json"
    replace_file(path, "one")
    replace_file(path, "two")
    assert path.read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["final.json"]
    with pytest.raises(StorageError, match="write the result"):
        replace_file(tmp_path / "nowhere" / "final.json", "x")


class Record(list[str]):
    """Stands for a reporter and for the metrics."""

    def send(self, kind: str, **unused: object) -> None:
        self.append(kind)

    def sync(self) -> None:
        """Nothing."""

    close = sync


@pytest.mark.parametrize("broken", ["sample", "replace_file"])
def test_a_sample_that_fails_does_not_fail_a_finished_run(
    broken: str, job: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*unused: object) -> str:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pretrain, "sample", fail if broken == "sample" else lambda *unused: "text")
    monkeypatch.setattr(pretrain, "gang_weights_digest", lambda manifest: "d" * 64)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    if broken == "replace_file":
        (tmp_path / "sample.txt").mkdir()
    loop, reports = object.__new__(Pretrain), Record()
    loop._job = dataclasses.replace(job, train=dataclasses.replace(job.train, sample_tokens=4))
    loop._counter, loop._paths = SimpleNamespace(step=0), RunPaths(tmp_path)
    loop._feed = SimpleNamespace(samples=None, end=lambda: None)  # type: ignore[assignment]
    loop._metrics = loop._reporter = reports  # type: ignore[assignment]
    loop._finish(6, tmp_path / "manifest")
    assert reports == ["done"]
    assert json.loads((tmp_path / "final.json").read_text())["weights_digest"] == "d" * 64
    assert "warning" in capsys.readouterr().out
    if broken == "generate":
        assert "out of memory" in (tmp_path / "sample.txt").read_text()


def judging(job: JobSpec) -> Pretrain:
    loop = object.__new__(Pretrain)
    loop._watch, loop._schedule = LossWatch(10.0, [2.0] * 20), SampleSchedule(global_batch=8)
    return loop


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (2.0, float("inf")), (50.0, 1.0)])
def test_a_blow_up_ends_the_rank(loss: float, norm: float, job: JobSpec) -> None:
    result = SimpleNamespace(loss=loss, grad_norm=norm, lr=0.1, overflow=False)
    loop = judging(job)
    with pytest.raises(BlowUp) as caught:
        loop._judge(9, result)  # type: ignore[arg-type]
    assert (caught.value.step, caught.value.samples) == (9, 8)
    assert loop._watch.state == [2.0] * 20


def test_a_loss_scale_that_is_lowered_excuses_the_gradients_alone(job: JobSpec) -> None:
    """The scale is not in the forward: a loss that is not finite has another cause, and no smaller scale mends it."""
    loop = judging(job)
    loop._judge(9, SimpleNamespace(loss=2.5, grad_norm=math.inf, lr=0.1, overflow=True))  # type: ignore[arg-type]
    assert loop._watch.state == [*[2.0] * 20, 2.5]
    for loss in (math.nan, 50.0):
        with pytest.raises(BlowUp):
            loop._judge(10, SimpleNamespace(loss=loss, grad_norm=1.0, lr=0.1, overflow=True))  # type: ignore[arg-type]


def test_what_routers_do_is_in_the_metrics(job: JobSpec) -> None:
    loop = judging(job)
    loop._job, loop._env = job, SimpleNamespace(attempt=1, epoch=1)  # type: ignore[assignment]
    result = SimpleNamespace(loss=2.0, grad_norm=1.0, lr=0.1, overflow=False, moe=None)
    plain = loop._line(9, result, 0.5)  # type: ignore[arg-type]
    assert "moe" not in plain
    stats = RouterStats(
        aux_loss=0.1,
        balance_loss=4.2,
        z_loss=3.0,
        load=(3, 5),
        imbalance=1.25,
        imbalance_layer=1,
        dropped=0,
        crossed=4,
    )
    result.moe = stats
    line = loop._line(9, result, 0.5)  # type: ignore[arg-type]
    assert json.loads(json.dumps(line))["moe"] == dataclasses.asdict(stats) | {"load": [3, 5]}
    assert line["loss"] == plain["loss"], "the loss is that of the tokens alone"


def test_exit_codes() -> None:
    assert exit_code(RuntimeError("x")) == 1
    assert exit_code(StorageError("x")) == 7
    assert exit_code(ConfigError("x")) == 2
    assert exit_code(CorruptCheckpoint("manifest", "reason")) == 76
    assert exit_code(BlowUp(3, "the loss is nan", 8)) == 77


def test_a_gang_that_begins_after_the_last_step_says_that_it_saves(
    job: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All was done, and not on disk: nobody may wait for a first step."""
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    told: list[object] = []
    steps = job.train.steps
    loop = object.__new__(Pretrain)
    parts = {
        "_job": job,
        "_env": SimpleNamespace(resume_from=f"memory:{steps}:e0001-a0001"),
        "_hooks": SimpleNamespace(model_ready=lambda module: None),
        "_engine": SimpleNamespace(module=None),
        "_feed": SimpleNamespace(begin=lambda schedule, first: None),
        "_schedule": None,
        "_saver": SimpleNamespace(open=lambda: None),
        "_reporter": SimpleNamespace(send=lambda kind, **fields: told.append((kind, fields))),
        "_restore": lambda: steps,
        "_save_last": lambda step: told.append("saved"),
        "_finish": lambda step, manifest: told.append("finished"),
    }
    for name, part in parts.items():
        monkeypatch.setattr(loop, name, part, raising=False)
    loop.run()
    said = [("step", {"step": steps, "next": word}) for word in ("save", "finish")]
    assert told == [said[0], "saved", said[1], "finished"]


def test_the_end_that_cannot_be_written_has_a_name_of_its_own(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same state, and no store, it would be so again: the controller has to know."""
    failure = StorageError("Cannot write.", why="No space left on device", hint="Free some.")
    saver = SimpleNamespace(save=lambda step, extra, must: "manifest", finish=lambda patience_s: failure)
    loop = object.__new__(Pretrain)
    for name, part in {"_job": job, "_saver": saver, "_metrics": None, "_extra": lambda step: {}}.items():
        monkeypatch.setattr(loop, name, part, raising=False)
    with pytest.raises(Unsaved) as caught:
        loop._save_last(20)
    assert str(caught.value) == str(failure)
    assert exit_code(caught.value) == exit_code(failure)


@pytest.mark.parametrize(
    ("words", "due", "memory", "does"),
    [
        ([True, True], False, True, ["copy"]),
        ([True, False], False, True, ["copy"]),  # what rank 0 has seen counts
        ([False, True], False, True, ["save", "finish"]),  # a node will be taken away
        ([True, True], True, True, ["save", "finish"]),  # it is due on disk anyway
        ([True, True], False, False, ["save", "finish"]),
    ],
)
def test_ranks_that_nothing_urges_leave_at_a_copy_in_memory(
    job: JobSpec, monkeypatch: pytest.MonkeyPatch, words: list[bool], due: bool, memory: bool, does: list[str]
) -> None:
    """They wait for no disk, which may be slow or stuck."""
    did: list[str] = []
    monkeypatch.setattr(pretrain, "gather", lambda mine: words)
    saver = SimpleNamespace(
        in_memory=memory,
        copy=lambda step, extra: did.append("copy"),
        save=lambda step, extra, must: did.append("save"),
        finish=lambda: did.append("finish"),
    )
    loop = object.__new__(Pretrain)
    orders = SimpleNamespace(in_memory=words[1])
    parts: dict[str, Any] = {"_saver": saver, "_orders": orders, "_metrics": None, "_extra": lambda step: {}}
    for name, part in parts.items():
        monkeypatch.setattr(loop, name, part, raising=False)
    assert loop._save(7, due=due, ordered=True)
    assert did == does

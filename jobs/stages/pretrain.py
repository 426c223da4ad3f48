"""Pretraining: restore, then for every step read the samples, train, report and save; at the end digest and sample."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from jobs.checkpoint.errors import storage_error
from jobs.checkpoint.gang import gang_weights_digest
from jobs.checkpoint.layout import sync_dir, write_durably
from jobs.checkpoint.restore import RestoredState, restore
from jobs.checkpoint.retention import prune
from jobs.checkpoint.save import save
from jobs.data import TokenStore
from jobs.hooks import Hooks
from jobs.metrics import MetricsWriter
from jobs.parallel.vocabulary import IGNORE
from jobs.paths import RunPaths
from jobs.report import Reporter
from jobs.sample import generate
from jobs.spec import JobSpec, RankEnv
from strategies.errors import ResumeRefused, StorageError
from strategies.schedule import BatchChange, SampleSchedule

if TYPE_CHECKING:
    from jobs.engine import Engine, MicroBatch, StepResult


class Counter(Protocol):
    """Learns which step the loop is at."""

    step: int


class Pretrain:
    """The loop of one rank.

    Args:
        job: The job.
        env: This rank.
        engine: Built, with initial weights.
        reporter: Where to report.
        hooks: Whom to tell.
        counter: Learns the current step.

    Raises:
        StorageError: The token store cannot be used.
    """

    def __init__(
        self, *, job: JobSpec, env: RankEnv, engine: Engine, reporter: Reporter, hooks: Hooks, counter: Counter
    ) -> None:
        self._job = job
        self._env = env
        self._engine = engine
        self._reporter = reporter
        self._hooks = hooks
        self._counter = counter
        self._paths = RunPaths(env.run_dir)
        self._store = TokenStore(job.data, job.batch.seq)
        self._schedule = SampleSchedule(global_batch=job.batch.global_batch)
        self._metrics = MetricsWriter(self._paths.metrics) if env.rank == 0 else None

    def run(self) -> None:
        """Run from the checkpoint to restore, or from the start, to the end of the job. Collective.

        Raises:
            CorruptCheckpoint: The checkpoint to restore is damaged.
            ResumeRefused: It belongs to another model, corpus or seed.
            StorageError: The run directory cannot be read or written.
        """
        done, manifest = 0, Path(self._env.resume_from)
        if self._env.resume_from:
            done = self._restore(manifest)
        dist.barrier()
        steps = self._job.train.steps
        if done < steps:
            self._reporter.send("training", step=done + 1)
        for step in range(done + 1, steps + 1):
            due = step == steps or bool(self._job.checkpoint.every and step % self._job.checkpoint.every == 0)
            self._step(step, then="save" if due else "step")
            if due:
                manifest = self._save(step)
                self._reporter.send("step", step=step, next="finish" if step == steps else "step")
        self._finish(max(done, steps), manifest)

    def _restore(self, manifest: Path) -> int:
        begin = time.perf_counter()
        restored = restore(self._engine, manifest, hooks=self._hooks)
        refuse_another_run(restored, self._job)
        self._counter.step = restored.step
        recorded = SampleSchedule.from_state(restored.extra["sampler"])
        self._schedule = continued(recorded, restored.step + 1, self._job.batch.global_batch)
        self._reporter.send("restored", step=restored.step + 1, seconds=time.perf_counter() - begin)
        return restored.step

    def _step(self, step: int, *, then: str) -> None:
        self._counter.step = step
        self._hooks.step_begin(step)
        begin = time.perf_counter()
        result = self._engine.train_step(step, self._batches(step))
        if self._metrics is not None:
            self._metrics.append(self._line(step, result, time.perf_counter() - begin))
        self._reporter.send("step", step=step, next=then)
        self._hooks.step_end(step)

    def _line(self, step: int, result: StepResult, seconds: float) -> dict[str, Any]:
        return {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens_per_s": self._schedule.batch_at(step) * self._job.batch.seq / seconds,
            "attempt": self._env.attempt,
            "epoch": self._env.epoch,
            "seconds": seconds,
            "time": time.time(),
        }

    def _batches(self, step: int) -> list[MicroBatch]:
        """This replica's micro-batches; ranks that look at no data get empty ones of the right shape."""
        plan = self._job.plan
        if not self._engine.needs_data:
            return [self._micro_batch((None,) * plan.micro_batch)] * plan.grad_accum
        replica = self._engine.grid.data
        return [self._micro_batch(self._schedule.rows(step, replica, micro, plan)) for micro in range(plan.grad_accum)]

    def _micro_batch(self, rows: tuple[int | None, ...]) -> MicroBatch:
        seq = self._job.batch.seq
        tokens = torch.zeros(len(rows), seq, dtype=torch.int64)
        targets = torch.full((len(rows), seq), IGNORE, dtype=torch.int64)
        for row, index in enumerate(rows):
            if index is not None:
                sample = torch.from_numpy(self._store.sample(self._job.train.seed, index))
                tokens[row], targets[row] = sample[:-1], sample[1:]
        return tokens, targets

    def _save(self, step: int) -> Path:
        if self._metrics is not None:
            self._metrics.sync()  # the lines of what a checkpoint holds are never lost
        token = (self._env.epoch, self._env.attempt)
        extra = {
            "sampler": self._schedule.state(step + 1),
            "data": {"digest": self._job.data.digest, "vocab": self._job.data.vocab},
            "seed": self._job.train.seed,
            "tracking": {"step": step},
        }
        saved = save(
            self._engine,
            run_paths=self._paths,
            job=self._job,
            step=step,
            token=token,
            extra=extra,
            hooks=self._hooks,
        )
        if self._env.rank == 0:
            self._reporter.send("checkpoint", step=step, path=str(saved.path), bytes=saved.bytes, stall_s=saved.stall_s)
            prune(self._paths.checkpoints, self._job.checkpoint.keep, token=token)
        return saved.path

    def _finish(self, step: int, manifest: Path) -> None:
        """From the last checkpoint to the end: its digest, a sample of text, and nobody leaves before all are here."""
        self._counter.step = step
        digest = gang_weights_digest(manifest)
        if self._metrics is not None:
            self._metrics.sync()
            self._metrics.close()
            final = {"step": step, "weights_digest": digest, "checkpoint": str(manifest)}
            replace_file(self._paths.root / "final.json", json.dumps(final) + "\n")
            if self._job.train.sample_tokens > 0:
                self._sample(manifest)
        dist.barrier()
        self._reporter.send("done", step=step)

    def _sample(self, manifest: Path) -> None:
        """Text for people to look at. The run is done: whatever fails here is told in its place and fails nothing."""
        try:
            text = generate(self._job, manifest, self._store)
        except Exception as error:
            print(f"warning: no sample could be generated: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
            text = f"(no sample could be generated: {type(error).__name__}: {error})"
        try:
            replace_file(self._paths.sample, text + "\n")
        except StorageError as error:
            print(f"warning: {error}", flush=True)


def refuse_another_run(restored: RestoredState, job: JobSpec) -> None:
    """Refuse to go on from what another model, corpus or seed has made.

    Raises:
        ResumeRefused: Lists every difference.
    """
    extra = restored.extra
    model = dataclasses.replace(restored.manifest.model, name=job.model.name)  # a name changes nothing
    pairs = [
        ("model", model, job.model),
        ("data digest", extra["data"]["digest"], job.data.digest),
        ("vocabulary", extra["data"]["vocab"], job.data.vocab),
        ("seed", extra["seed"], job.train.seed),
    ]
    differences = [f"{name}: {there} in the checkpoint, {here} here" for name, there, here in pairs if there != here]
    if differences:
        raise ResumeRefused(
            f"The checkpoint of step {restored.step} is of another run.",
            why="; ".join(differences),
            hint="Resume with the model, corpus, vocabulary and seed of the run, or start a new run.",
        )


def continued(recorded: SampleSchedule, step: int, global_batch: int) -> SampleSchedule:
    """The recorded schedule, with another global batch from ``step`` on if it differs; no sample is left out."""
    earlier = tuple(change for change in recorded.changes if change.step < step)
    recorded = dataclasses.replace(recorded, changes=earlier)
    if recorded.batch_at(step) == global_batch:
        return recorded
    return dataclasses.replace(recorded, changes=(*earlier, BatchChange(step=step, global_batch=global_batch)))


def replace_file(path: Path, text: str) -> None:
    """Give a file new content, durably and at once; raises StorageError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_durably(aside, text.encode())
        os.replace(aside, path)
        sync_dir(path.parent)
    except OSError as error:
        raise storage_error("write the result", path, error) from error

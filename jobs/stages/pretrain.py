"""Pretraining: restore, then for every step take the samples, train, report and save; at the end digest and sample."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist

from jobs.checkpoint.direct import DirectSaver
from jobs.checkpoint.errors import Unsaved, storage_error
from jobs.checkpoint.gang import gang_weights_digest, gather
from jobs.checkpoint.identity import differences
from jobs.checkpoint.keeping import Saver
from jobs.checkpoint.layout import sync_dir, write_durably
from jobs.checkpoint.memory import generation_of
from jobs.checkpoint.memory_source import MemorySource, read_point
from jobs.checkpoint.persister import link_from_environment
from jobs.checkpoint.restore import RestoredState, restore
from jobs.checkpoint.saver import BehindSaver
from jobs.checkpoint.source import ShardSource
from jobs.hooks import Hooks
from jobs.initial import initialise
from jobs.location import Location, locate
from jobs.metrics import MetricsWriter
from jobs.numerics import BlowUp, LossWatch
from jobs.orders import Orders
from jobs.paths import RunPaths
from jobs.report import Reporter
from jobs.sample import sample
from jobs.spec import JobSpec, RankEnv
from jobs.stages.evaluation import Evaluation
from jobs.stages.feed import Feed
from strategies.codec import to_json
from strategies.errors import ResumeRefused, StorageError
from strategies.schedule import SampleSchedule, Skip
from strategies.specs import BatchSpec

if TYPE_CHECKING:
    from jobs.engine import Engine, StepResult


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
        self._orders = Orders(env.order_fd)
        self._paths = RunPaths(env.run_dir)
        self._feed = Feed(job, engine)
        self._held_out = self._feed.samples.validation()
        self._evaluation = Evaluation(job, self._held_out)
        if self._evaluation.missing and env.rank == 0:  # a submit refuses this; an older version's did not
            print(f"warning: {self._evaluation.missing}", flush=True)
        self._schedule = job.schedule()
        self._watch = LossWatch(job.train.spike_sigmas)
        self._metrics = MetricsWriter(self._paths.metrics) if env.rank == 0 else None
        self._link = link_from_environment()
        if self._link is None:
            self._saver: Saver = DirectSaver(engine, job, env, hooks, reporter)
        else:
            self._saver = BehindSaver(engine, job, env, hooks, reporter, self._link)

    def run(self) -> None:
        """Run from the checkpoint to restore, or from the start, to the end of the job. Collective.

        Or to a checkpoint, if the ranks have been asked to leave: at the next one that is due (``leave.json`` of the
        attempt), or at one after a given step (:mod:`jobs.orders`).

        Raises:
            CorruptCheckpoint: The checkpoint to restore is damaged.
            ResumeRefused: It belongs to another model, corpus or seed.
            ConfigError: The weights to begin with are another model's.
            StorageError: The run directory cannot be read or written.
            BlowUp: A step's numbers cannot be right; nothing of it was kept.
        """
        self._hooks.model_ready(self._engine.module)
        done, manifest = 0, locate(self._env.resume_from)
        if self._env.resume_from:
            done = self._restore()
        else:
            initialise(self._engine, self._job)
        self._feed.begin(self._schedule, done + 1)
        dist.barrier()
        self._saver.open()
        steps = self._job.train.steps
        if done < steps:
            self._reporter.send("training", step=done + 1, micro_batches=self._micro_batches(done + 1))
        elif generation_of(self._env.resume_from):  # all was done, but not on disk
            self._reporter.send("step", step=done, next="save")
            manifest = self._save_last(done)
            self._reporter.send("step", step=done, next="finish")
        for step in range(done + 1, steps + 1):
            due = step == steps or bool(self._job.checkpoint.every and step % self._job.checkpoint.every == 0)
            ordered = self._step(step, due=due)
            if not due and not ordered:
                self._saver.keep(step, self._extra(step))
                continue
            if step == steps:
                manifest = self._save_last(step)
            leaving = step < steps and self._save(step, due=due, ordered=ordered)
            self._reporter.send("step", step=step, next="finish" if leaving or step == steps else "step")
            if leaving:
                self._leave(step)
                return
        self._finish(max(done, steps), manifest)

    def _source(self) -> Location | ShardSource:
        """What there is to restore: on disk, or in the memory of the nodes."""
        if generation_of(self._env.resume_from) is None:
            return locate(self._env.resume_from)
        if self._link is None:
            raise StorageError(
                f"{self._env.resume_from} cannot be restored here.",
                why="this rank has no persister, so it cannot reach the memory of the nodes",
            )
        return MemorySource(read_point(self._paths.memory(self._env.attempt)), self._link)

    def _restore(self) -> int:
        begin = time.perf_counter()
        restored = restore(self._engine, self._source, hooks=self._hooks)
        refuse_another_run(restored, self._job)
        self._counter.step = restored.step
        recorded = SampleSchedule.from_state(restored.extra["sampler"])
        self._schedule = continued(recorded, restored.step + 1, self._job.batch, self._job.skips)
        self._watch = LossWatch(self._job.train.spike_sigmas, restored.extra.get("losses", ()))
        seconds, moved = time.perf_counter() - begin, dataclasses.asdict(restored.traffic)
        self._reporter.send("restored", step=restored.step + 1, seconds=seconds, **moved)
        return restored.step

    def _step(self, step: int, *, due: bool) -> bool:
        """One step; ``due``: a checkpoint follows. Returns whether the ranks have been told to leave after it."""
        self._counter.step = step
        self._hooks.step_begin(step)
        self._engine.own_time.begin(self._micro_batches(step))
        began = time.perf_counter()
        batches = self._feed.take(step)
        data_s = time.perf_counter() - began
        tokens = self._schedule.batch_at(step) * self._job.batch.seq
        result = self._engine.train_step(step, batches, tokens=tokens)
        ordered = self._orders.leaves_after(step)  # here, where all ranks come to at the same time
        then = "save" if due or ordered else "step"
        own_s, seconds = self._engine.own_time.end()
        self._judge(step, result)
        copying = {"stall_s": self._saver.stalled_s(), "copies_every": self._saver.copies_every}
        line = self._line(step, result, seconds) | {"data_s": data_s} | copying
        evaluates = self._evaluation.due(step)
        if not evaluates:
            self._note(line)
        doing = "evaluate" if evaluates else then
        times = {"own_s": round(own_s, 6), "seconds": round(seconds, 6), "copies_every": self._saver.copies_every}
        times |= {"queued_s": round(self._engine.own_time.queued_s, 6), "data_s": round(data_s, 6)}
        self._reporter.send("step", step=step, next=doing, **times, micro_batches=self._micro_batches(step + 1))
        if evaluates:
            self._note(line | {"eval": self._evaluate(step)})
            self._reporter.send("step", step=step, next=then)
        self._hooks.step_end(step)
        return ordered

    def _evaluate(self, step: int) -> dict[str, Any]:
        """Loss and perplexity on what is not trained on; every batch is a sign of life."""
        began, held_out = time.perf_counter(), self._held_out
        assert held_out is not None, "it is never due without"
        found = self._evaluation.run(
            self._engine,
            lambda rows: self._engine.fetchable(self._feed.micro_batch(rows, held_out)),
            lambda: self._reporter.send("step", step=step, next="evaluate"),
        )
        return found | {"seconds": time.perf_counter() - began}

    def _note(self, line: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.append(line)

    def _judge(self, step: int, result: StepResult) -> None:
        """Every rank comes to the same verdict, and a checkpoint needs all of them: nothing of a bad step is committed.

        What the update has done to the weights shows in the loss of the next step only. By then it may be committed:
        where the run blows up there again, it goes on from an older state (:mod:`launcher.rollback`).
        A loss scale that is too large excuses gradients that are not finite, but no loss: it is not in the forward.
        """
        why = self._watch.judge(result.loss, 0.0 if result.overflow else result.grad_norm)
        if why:
            raise BlowUp(step, why, self._schedule.batch_at(step))

    def _line(self, step: int, result: StepResult, seconds: float) -> dict[str, Any]:
        routing = {} if result.moe is None else {"moe": dataclasses.asdict(result.moe)}
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
            **routing,
        }

    def _micro_batches(self, step: int) -> int:
        return self._schedule.micro_batches(step, self._job.plan)

    def _save(self, step: int, *, due: bool, ordered: bool) -> bool:
        """A checkpoint is due, or the ranks have been ordered to leave after it; returns whether they do."""
        self._sync_metrics()
        if ordered and not due and self._saver.in_memory and gather(self._orders.in_memory)[0]:
            self._saver.copy(step, self._extra(step))
            return True
        leaving = ordered or self._is_to_leave()
        self._saver.save(step, self._extra(step), must=leaving)
        failure = self._saver.finish() if leaving else None
        if failure is None or (ordered and self._saver.in_memory):
            return leaving
        if ordered:
            raise failure
        return False  # who was to make room for something better goes on instead

    def _save_last(self, step: int) -> Location:
        self._sync_metrics()
        manifest = self._saver.save(step, self._extra(step), must=True)
        if failure := self._saver.finish(self._job.checkpoint.patience_s):
            raise Unsaved(failure.what, why=failure.why, hint=failure.hint)
        return manifest

    def _sync_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.sync()  # the lines of what a checkpoint holds are never lost

    def _extra(self, step: int) -> dict[str, Any]:
        initial = {} if self._job.initial is None else {"initial": to_json(self._job.initial)}
        return initial | {
            "sampler": self._schedule.state(step + 1),
            "data": {
                "digest": self._job.data.digest,
                "vocab": self._job.data.vocab,
                "packing": self._job.data.packing,
                "end_id": self._job.data.end_id,
            },
            "seed": self._job.train.seed,
            "losses": self._watch.state,
            "tracking": {"step": step},
        }

    def _is_to_leave(self) -> bool:
        """Whether the ranks have been asked to; rank 0 looks, so that all of them come to the same answer."""
        asked = self._env.rank == 0 and self._paths.leave(self._env.attempt).exists()
        return bool(gather(asked)[0])

    def _leave(self, step: int) -> None:
        """End after a checkpoint, before the last step; the next attempt goes on from there and nothing is lost."""
        self._feed.end()
        if self._metrics is not None:
            self._metrics.close()
        dist.barrier()
        self._reporter.send("done", step=step)

    def _finish(self, step: int, manifest: Location) -> None:
        """From the last checkpoint to the end: its digest, a sample of text, and nobody leaves before all are here."""
        self._counter.step = step
        self._feed.end()
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

    def _sample(self, manifest: Location) -> None:
        """Text for people to look at. The run is done: whatever fails here is told in its place and fails nothing."""
        try:
            text = sample(self._job, manifest, self._feed.samples)
        except Exception as error:
            print(f"warning: no sample could be generated: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
            text = f"(no sample could be generated: {type(error).__name__}: {error})"
        try:
            replace_file(self._paths.sample, text + "\n")
        except StorageError as error:
            print(f"warning: {error}", flush=True)


def refuse_another_run(restored: RestoredState, job: JobSpec) -> None:
    """Refuse to go on from what another run, model, corpus or seed has made.

    Raises:
        ResumeRefused: Lists every difference.
    """
    found = differences(restored.manifest, job)
    if found:
        raise ResumeRefused(
            f"The checkpoint of step {restored.step} is of another run.",
            why="; ".join(found),
            hint="Bring the run's own checkpoints back. A new run may begin with these weights: train.init_from.",
        )


def continued(recorded: SampleSchedule, step: int, batch: BatchSpec, skips: tuple[Skip, ...] = ()) -> SampleSchedule:
    """The recorded schedule from ``step`` on.

    Another global batch or ramp counts from there on. Which samples are skipped is the run's to say, not the
    checkpoint's: skips may have been decided since. Those before ``step`` are history, and there the two must agree.

    Args:
        recorded: What the checkpoint says.
        step: The step to go on with.
        batch: The global batch from there on.
        skips: All skips of the run.

    Raises:
        ResumeRefused: The checkpoint was made with other samples left out.
    """
    here, there = ([skip for skip in some if skip.step < step] for some in (skips, recorded.skips))
    if sorted(here, key=_by_place) != sorted(there, key=_by_place):
        raise ResumeRefused(
            f"The checkpoint of step {step - 1} was made with other samples left out.",
            why=f"{_told(there)} in the checkpoint, {_told(here)} here",
            hint="Leave the skips of steps that are done as they are; later ones may be changed.",
        )
    return dataclasses.replace(recorded, skips=skips).onward(step, batch)


def _by_place(skip: Skip) -> tuple[int, int]:
    return skip.step, skip.samples


def _told(skips: list[Skip]) -> str:
    return ", ".join(f"{skip.samples} before step {skip.step}" for skip in skips) or "none"


def replace_file(path: Path, text: str) -> None:
    """Give a file new content, durably and at once; raises StorageError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_durably(aside, text.encode())
        os.replace(aside, path)
        sync_dir(path.parent)
    except OSError as error:
        raise storage_error("write the result", path, error) from error

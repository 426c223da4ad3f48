"""Evaluation and generation: batches of rows through a model, results kept batch by batch.

What is done lies in ``checkpoints/<batch>/results.jsonl`` with a file ``COMMIT`` beside it, as a script's checkpoints
do: a gang that was restarted goes on after the newest of them. Results do not depend on the plan, so neither do they.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jobs import distributed
from jobs.build_time import BuildTime
from jobs.checkpoint.errors import storage_error
from jobs.checkpoint.gang import agree, gather
from jobs.checkpoint.layout import sync_dir, write_durably
from jobs.engine.inference import join, load
from jobs.forward import Forward
from jobs.hooks import Hooks
from jobs.inference import results
from jobs.inference.generation import Sampling, generate
from jobs.inference.rows import Encoder, Row, read_rows
from jobs.inference.scoring import losses_of
from jobs.metrics import MetricsWriter
from jobs.paths import RunPaths
from jobs.report import Reporter
from jobs.spec import InferenceSpec, JobSpec, RankEnv
from strategies.errors import StorageError

Result = dict[str, Any]  # {"row": number, "loss": of what counts or was generated} and, of a generation, "tokens"


class Counter(Protocol):
    """Learns which batch the loop is at."""

    step: int


class Task(Protocol):
    """What is done with rows."""

    def work(self, rows: Sequence[Row]) -> list[Result] | None:
        """Results of some rows, without their numbers; None on ranks that have none. Collective within a replica."""

    def finish(self, rows: Sequence[Row], found: Mapping[int, Result]) -> tuple[dict[str, Any], str]:
        """All results as a document, and for people."""


class Evaluation:
    """Log-likelihoods."""

    def __init__(self, forward: Forward, job: JobSpec) -> None:
        self._forward = forward

    def work(self, rows: Sequence[Row]) -> list[Result] | None:
        """See :class:`Task`."""
        losses = losses_of(self._forward, rows)
        return None if losses is None else [{"loss": loss} for loss in losses]

    def finish(self, rows: Sequence[Row], found: Mapping[int, Result]) -> tuple[dict[str, Any], str]:
        """See :class:`Task`."""
        document = results.summary(rows, {number: one["loss"] for number, one in found.items()})
        return document, results.table(document)


class Generation:
    """Continuations."""

    def __init__(self, forward: Forward, job: JobSpec) -> None:
        assert job.inference is not None
        self._forward, self._spec = forward, job.inference
        self._how = sampling(job.inference, job.train.seed)

    def work(self, rows: Sequence[Row]) -> list[Result] | None:
        """See :class:`Task`."""
        prompts, keys = [row.tokens for row in rows], [row.key for row in rows]
        done = generate(self._forward, prompts, keys, count=self._spec.tokens, how=self._how)
        if not self._forward.grid.last_stage:
            return None
        return [
            {"loss": loss, "tokens": tokens[len(row.tokens) :]} for row, (tokens, loss) in zip(rows, done, strict=True)
        ]

    def finish(self, rows: Sequence[Row], found: Mapping[int, Result]) -> tuple[dict[str, Any], str]:
        """See :class:`Task`."""
        decode = Encoder(Path(self._spec.tokenizer), self._spec.start).tokenizer.decode
        texts = [
            {"prompt": row.key, "text": decode(found[number]["tokens"]), **found[number]}
            for number, row in enumerate(rows)
        ]
        return {"texts": texts}, "\n\n".join(one["prompt"] + one["text"] for one in texts)


def sampling(spec: InferenceSpec, seed: int) -> Sampling:
    """How a job chooses tokens."""
    return Sampling(temperature=spec.temperature, top_k=spec.top_k, top_p=spec.top_p, seed=seed, end=spec.end)


def run(*, job: JobSpec, env: RankEnv, reporter: Reporter, hooks: Hooks, counter: Counter) -> None:
    """Be one rank of an evaluation or a generation, from the newest results to the end. Collective.

    Raises:
        ConfigError: The weights are another model's.
        StorageError: The weights, the rows or the run directory cannot be read or written.
    """
    took = BuildTime()
    grid = join(job, env, took)
    reporter.send("built", **took.end())
    begin = time.perf_counter()
    forward = load(job, env, grid)
    task: Task = (Evaluation if job.kind == "evaluate" else Generation)(forward, job)
    loop = _Loop(job, env, forward, task)
    done = loop.restore()
    reporter.send("restored", step=done + 1, seconds=time.perf_counter() - begin, read_bytes=0, received_bytes=0)
    steps = job.train.steps
    if done < steps:
        reporter.send("training", step=done + 1)
    for step in range(done + 1, steps + 1):
        counter.step = step
        hooks.step_begin(step)
        seconds = loop.step(step)
        due = step == steps or bool(job.checkpoint.every and step % job.checkpoint.every == 0)
        reporter.send("step", step=step, next="save" if due else "step", own_s=seconds, seconds=seconds)
        hooks.step_end(step)
        if due:
            fields = loop.commit(step)
            if env.rank == 0:
                reporter.send("checkpoint", step=step, **fields)
            reporter.send("step", step=step, next="finish" if step == steps else "step")
    loop.finish(steps)
    reporter.send("done", step=steps)
    distributed.shutdown()


class _Loop:
    """The batches of one rank; rank 0 keeps the results of all."""

    def __init__(self, job: JobSpec, env: RankEnv, forward: Forward, task: Task) -> None:
        assert job.inference is not None
        self._job, self._env, self._forward, self._task = job, env, forward, task
        self._paths = RunPaths(env.run_dir)
        self._rows = read_rows(job.inference)
        self._found: dict[int, Result] = {}
        self._fresh: list[Result] = []
        self._metrics = MetricsWriter(self._paths.metrics) if env.rank == 0 else None

    def restore(self) -> int:
        """Read what is committed; returns the last batch that is done."""
        if not self._env.resume_from:
            return 0
        newest, error = int(Path(self._env.resume_from).name), None
        try:
            for folder in self._paths.checkpoint_dir.iterdir() if self._env.rank == 0 else ():
                if folder.name.isdigit() and int(folder.name) <= newest and (folder / "COMMIT").exists():
                    for line in (folder / "results.jsonl").read_text().splitlines():
                        self._keep(json.loads(line))
        except (OSError, ValueError) as caught:
            error = StorageError(f"The results in {self._paths.checkpoint_dir} cannot be read.", why=str(caught))
        agree(error)
        self._fresh = []
        return newest

    def step(self, step: int) -> float:
        """One batch: each replica takes its share, rank 0 gets all results. Returns seconds."""
        begin = time.perf_counter()
        size = self._job.batch.global_batch
        numbers = range((step - 1) * size, min(step * size, len(self._rows)))
        found = self._found_in(numbers)
        for one in (one for part in gather(found) for one in part):
            self._keep(one)
        seconds = time.perf_counter() - begin
        if self._metrics is not None:
            self._metrics.append(self._line(step, numbers, seconds))
        return seconds

    def _found_in(self, numbers: range) -> list[Result]:
        """Results of this replica's share of some rows, on the rank that tells them."""
        plan, grid, found = self._job.plan, self._forward.grid, list[Result]()
        mine = numbers[grid.data :: plan.dp]
        # Replicas that share experts go through the model together: who has no rows left takes one of another's along.
        most = -(-len(numbers) // plan.dp) if plan.ep > 1 else len(mine)
        for start in range(0, most, plan.micro_batch):
            share = mine[start : start + plan.micro_batch]
            done = self._task.work([self._rows[number] for number in share or numbers[:1]])
            if share and done is not None and grid.model == 0:
                found += [{"row": number, **one} for number, one in zip(share, done, strict=True)]
        return found

    def _keep(self, result: Result) -> None:
        self._found[result["row"]] = {key: value for key, value in result.items() if key != "row"}
        self._fresh.append(result)

    def _line(self, step: int, numbers: Sequence[int], seconds: float) -> dict[str, Any]:
        counted = sum(self._counted(number) for number in numbers)
        loss = math.fsum(self._found[number]["loss"] for number in numbers) / max(1, counted)
        line = {"step": step, "loss": loss, "tokens_per_s": counted / seconds, "attempt": self._env.attempt}
        return line | {"epoch": self._env.epoch, "seconds": seconds, "time": time.time()}

    def _counted(self, number: int) -> int:
        """Tokens whose likelihood was summed."""
        tokens = self._found[number].get("tokens")
        return len(self._rows[number].tokens) - self._rows[number].begin if tokens is None else len(tokens)

    def commit(self, step: int) -> dict[str, Any]:
        """Keep what came since the last commit. Collective.

        Raises:
            StorageError: Rank 0 cannot write; on every rank.
        """
        fields, error, begin = {}, None, time.perf_counter()
        if self._env.rank == 0:
            try:
                fields = self._write(self._paths.checkpoint_dir / str(step))
            except OSError as caught:
                error = storage_error("write the results", self._paths.checkpoint_dir, caught)
        agree(error)
        return fields | {"stall_s": time.perf_counter() - begin}

    def _write(self, folder: Path) -> dict[str, Any]:
        data = "".join(json.dumps(one) + "\n" for one in self._fresh).encode()
        aside = folder.with_name(f".{folder.name}.{self._env.epoch}-{self._env.attempt}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_durably(aside / "results.jsonl", data)
        write_durably(aside / "COMMIT", b"")
        sync_dir(aside)
        with contextlib.suppress(FileExistsError):  # an earlier attempt came as far, with the same results
            _rename(aside, folder)
        sync_dir(folder.parent)
        self._fresh = []
        return {"path": str(folder), "bytes": len(data), "written_bytes": len(data)}

    def finish(self, step: int) -> None:
        """Write ``results.json`` and, for people, ``sample.txt``; nobody leaves before. Collective.

        Raises:
            StorageError: Rank 0 cannot write; on every rank.
        """
        error = None
        if self._env.rank == 0:
            assert self._metrics is not None
            self._metrics.sync()
            document, text = self._task.finish(self._rows, self._found)
            head = {"kind": self._job.kind, "weights": self._job.initial.path if self._job.initial else ""}
            try:
                for path, content in (
                    (self._paths.results, json.dumps(head | document, indent=2)),
                    (self._paths.sample, text),
                    (self._paths.root / "final.json", json.dumps({"step": step})),
                ):
                    aside = path.with_name(f".{path.name}.{os.getpid()}")
                    write_durably(aside, (content + "\n").encode())
                    os.replace(aside, path)
                sync_dir(self._paths.root)
            except OSError as caught:
                error = storage_error("write the results", self._paths.root, caught)
        agree(error)


def _rename(aside: Path, folder: Path) -> None:
    try:
        os.rename(aside, folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not (folder / "COMMIT").exists():
            raise
        raise FileExistsError from error

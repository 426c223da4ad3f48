"""The worker as real processes, without Ray: whatever happens to it, a run ends with the very same numbers.

A gang of 4 ranks (2 stages, 2 replicas, ZeRO-1, two ranks to a "node") trains 6 steps and saves after every second one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.checkpoint import newest
from jobs.data import prepare
from jobs.paths import RunPaths
from jobs.spec import CheckpointSpec, DataSpec, JobSpec, RankEnv
from strategies.codec import to_json
from tests.support.gang import ROOT, GangFailed, WarmPool
from tests.support.jobspecs import GPT as BASE
from tests.support.jobspecs import make_job, make_plan

pytestmark = pytest.mark.timeout(180)
MODEL = dataclasses.replace(BASE, layers=2, hidden=32, ffn=64, vocab=320, seq=32)
PLAN = make_plan(MODEL, 6, pp=2, dp=2, zero_stage=1)
WORLD = PLAN.world_size
EXACT = ("step", "loss", "grad_norm", "lr")


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as pool:
        yield pool


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("jobs/faults.py", "jobs/worker.py", "jobs/spec.py", "jobs/report.py"):
        shutil.copy(ROOT / name, folder)
    return prepare(DataSpec(kind="text", path=str(folder)), folder / "stores", MODEL.vocab, seq=MODEL.seq)


class Run:
    """A run directory, and attempts in it."""

    def __init__(self, root: Path, pool: WarmPool, job: JobSpec) -> None:
        self.paths = RunPaths(root)
        self.job = job
        self._pool = pool
        self._attempt = 0
        root.mkdir()

    def attempt(self, resume_from: str = "", **options: Any) -> None:
        """Start the gang and wait for its end."""
        self._attempt += 1
        self.paths.attempt(self._attempt).mkdir(parents=True)
        self.paths.job(self._attempt).write_text(json.dumps(to_json(self.job)))
        self._pool.run(
            "tests.support.worker_ranks:work",
            world_size=self.job.plan.world_size,
            arguments={"attempt": self._attempt, "resume_from": resume_from, **options},
            run_dir=str(self.paths.root),
            timeout_s=90,
        )

    def resume(self, **options: Any) -> None:
        """One more attempt, from the newest checkpoint."""
        self.attempt(str(newest(self.paths.checkpoint_dir) or ""), **options)

    def newest_step(self) -> int:
        """Step of the newest checkpoint."""
        path = newest(self.paths.checkpoint_dir)
        assert path is not None
        return int(json.loads(Path(str(path)).read_text())["step"])

    def lines(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        text = self.paths.metrics.read_text() if self.paths.metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def curve(self) -> dict[int, tuple[Any, ...]]:
        """What must not depend on faults: step -> exact numbers, as last computed."""
        return {line["step"]: tuple(line[key] for key in EXACT) for line in self.lines()}

    def final(self) -> dict[str, Any]:
        """What the run ended with."""
        return dict(json.loads((self.paths.root / "final.json").read_text()))

    def reports(self, rank: int = 0) -> list[dict[str, Any]]:
        """Reports of the last attempt."""
        path = self.paths.attempt(self._attempt) / f"reports-{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def kinds(self, rank: int = 0) -> list[str]:
        """Kinds of the reports of the last attempt."""
        return [report["kind"] for report in self.reports(rank)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, pool: WarmPool, data: DataSpec) -> Callable[..., Run]:
    def make(*faults: str, plan: Any = PLAN, **train: Any) -> Run:
        recipe = {"steps": 6, "seed": 3, "sample_tokens": 8, "clip": 0.5} | train
        job = make_job(MODEL, plan, global_batch=6, **recipe)
        job = dataclasses.replace(job, data=data, checkpoint=CheckpointSpec(every=2, keep=2), faults=faults)
        return Run(tmp_path_factory.mktemp("parent") / "run", pool, job)

    return make


@pytest.fixture(scope="module")
def undisturbed(start: Callable[..., Run]) -> Run:
    run = start()
    run.attempt()
    return run


def test_an_undisturbed_run_tells_everything(undisturbed: Run) -> None:
    lines = undisturbed.lines()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    told = {"tokens_per_s", "attempt", "epoch", "seconds", "data_s", "stall_s", "copies_every", "time"}
    assert {*lines[0]} == {*EXACT, *told}
    assert all(line["attempt"] == 1 and line["tokens_per_s"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert undisturbed.kinds() == [
        "started", "built", "training", *["step", "step", "checkpoint", "step"] * 3, "done",
    ]  # fmt: skip
    assert undisturbed.kinds(rank=3) == ["started", "built", "training", *["step"] * 9, "done"], (
        "six, and after three saves"
    )
    assert undisturbed.final()["step"] == undisturbed.newest_step() == 6
    assert len(undisturbed.final()["weights_digest"]) == 64
    assert undisturbed.paths.sample.read_text().startswith("def ")
    assert len(list(undisturbed.paths.checkpoint_dir.glob("*/*.manifest.json"))) == 2, "older ones are pruned"


def test_every_rank_tells_how_long_it_took_to_build_its_engine(undisturbed: Run) -> None:
    for rank in range(WORLD):
        started, built = undisturbed.reports(rank)[:2]
        parts = {name: seconds for name, seconds in built.items() if name not in ("kind", "time")}
        assert set(parts) == {"device_s", "communicators_s", "engine_s"}
        assert all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) <= built["time"] - started["time"]


@pytest.mark.parametrize(
    ("fault", "restored", "first_lines", "ending"),
    [
        ("rank_kill@rank=2,step=4", 2, [1, 2, 3], "rank 2 ended with -9"),
        ("rank_kill@rank=0,step=6,phase=step_end", 4, [1, 2, 3, 4, 5, 6], "rank 0 ended with -9"),
        ("rank_kill@rank=3,step=4,phase=shards_written", 2, [1, 2, 3, 4], "rank 3 ended with -9"),
        ("rank_exit@rank=1,step=1", 0, [], "rank 1 ended with 17"),
    ],
)
def test_a_killed_run_ends_bit_identical(
    start: Callable[..., Run], undisturbed: Run, fault: str, restored: int, first_lines: list[int], ending: str
) -> None:
    run = start(fault)
    with pytest.raises(GangFailed, match=ending):
        run.attempt()
    assert len(list(run.paths.faults.glob("*.json"))) == 1, "the fault must have fired"
    # rank 0 may have been torn out of the last step before it wrote its line
    assert [line["step"] for line in run.lines()] in (first_lines, first_lines[:-1])
    if restored:
        assert run.newest_step() == restored
    run.resume()
    assert run.kinds()[:4] == ["started", "built", *["restored"] * bool(restored), "training", "step"][:4]
    assert [line["step"] for line in run.lines() if line["attempt"] == 2] == list(range(restored + 1, 7))
    assert run.curve() == undisturbed.curve()
    assert run.final()["weights_digest"] == undisturbed.final()["weights_digest"]
    assert run.paths.sample.read_text() == undisturbed.paths.sample.read_text()


def test_three_faults_in_one_run(start: Callable[..., Run], undisturbed: Run) -> None:
    run = start("rank_error@rank=1,step=3", "rank_kill@rank=3,step=5", "rank_kill@rank=0,phase=restore")
    for ending in ("rank 1 ended with 1", "rank 0 ended with -9", "rank 3 ended with -9"):
        with pytest.raises(GangFailed, match=ending):
            run.resume()
    run.resume()
    assert len(list(run.paths.faults.glob("*.json"))) == 3
    assert run.curve() == undisturbed.curve()
    assert run.final()["weights_digest"] == undisturbed.final()["weights_digest"]


@pytest.mark.parametrize("sabotage", ["shifted batch", "flipped bit"])
def test_the_oracle_notices_the_smallest_mistake(start: Callable[..., Run], undisturbed: Run, sabotage: str) -> None:
    run = start("rank_kill@rank=2,step=5")
    with pytest.raises(GangFailed):
        run.attempt()
    run.resume(sabotage=sabotage)
    curve, expected = run.curve(), undisturbed.curve()
    assert [curve[step] for step in (1, 2, 3, 4)] == [expected[step] for step in (1, 2, 3, 4)]
    if sabotage == "shifted batch":  # one bit of one weight may be too little for a digit of the loss
        assert curve[5][1] != expected[5][1]
        assert curve[6][1] != expected[6][1]
    assert run.final()["weights_digest"] != undisturbed.final()["weights_digest"]


def test_a_finished_run_only_ends_again(start: Callable[..., Run], undisturbed: Run) -> None:
    run = start()
    shutil.copytree(undisturbed.paths.root, run.paths.root, dirs_exist_ok=True)
    (run.paths.root / "final.json").unlink()
    run._attempt = 1
    run.resume()
    assert run.lines() == undisturbed.lines()
    assert run.kinds() == ["started", "built", "restored", "done"]
    assert run.final()["weights_digest"] == undisturbed.final()["weights_digest"]


def test_an_error_is_reported_with_its_traceback(start: Callable[..., Run]) -> None:
    run = start("rank_error@rank=2,step=2")
    with pytest.raises(GangFailed, match="rank 2 ended with 1") as caught:
        run.attempt()
    error = run.reports(rank=2)[-1]
    assert (error["kind"], error["type"], error["step"], error["exit_code"]) == ("error", "InjectedFault", 2, 1)
    assert error["message"] == "injected fault: rank_error@rank=2,step=2"
    assert "in step_begin" in error["traceback"]
    assert "[rank 2] jobs.faults.InjectedFault: injected fault" in str(caught.value)


def test_a_damaged_checkpoint_is_rejected(start: Callable[..., Run], undisturbed: Run) -> None:
    run = start()
    shutil.copytree(undisturbed.paths.checkpoint_dir, run.paths.checkpoint_dir)
    path = newest(run.paths.checkpoint_dir)
    assert path is not None
    shard = next(Path(str(path.parent)).glob("e*/shard-00002.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(GangFailed, match="ended with 76"):
        run.resume()
    rejected = next(report for report in run.reports() if report["kind"] == "rejected")
    assert rejected["path"] == str(path)
    assert "shard-00002" in rejected["reason"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"seed": 4}, 6, "seed: 3 in the checkpoint, 4 here"),
        ({"digest": "0" * 64}, 7, "token store"),
        ({"store": "/nowhere"}, 7, "token store"),
    ],
)
def test_another_run_is_refused(
    start: Callable[..., Run], undisturbed: Run, change: dict[str, Any], code: int, words: str
) -> None:
    run = start(**{key: value for key, value in change.items() if key == "seed"})
    fields = {key: value for key, value in change.items() if key != "seed"}
    run.job = dataclasses.replace(run.job, data=dataclasses.replace(run.job.data, **fields))
    shutil.copytree(undisturbed.paths.checkpoint_dir, run.paths.checkpoint_dir)
    with pytest.raises(GangFailed, match=f"ended with {code}"):
        run.resume()
    errors = [report for report in run.reports() if report["kind"] == "error"]
    assert [error["exit_code"] for error in errors] == [code]
    assert words in errors[0]["message"]
    assert run.lines() == []


def test_sigterm_ends_a_waiting_rank_at_once(start: Callable[..., Run], data: DataSpec) -> None:
    run = start()
    run.paths.attempt(1).mkdir(parents=True)
    run.paths.job(1).write_text(json.dumps(to_json(run.job)))
    read, write = os.pipe()
    env = RankEnv(
        rank=1,
        local_rank=1,
        world_size=4,
        local_world_size=2,
        node_rank=0,
        master_addr="127.0.0.1",
        master_port=9,  # nobody listens: the rank waits for its rendezvous
        run_id="test",
        run_dir=str(run.paths.root),
        epoch=1,
        attempt=1,
        report_fd=write,
    )
    command = [sys.executable, "-P", "-m", "jobs.worker"]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env.variables()}, pass_fds=(write,), stderr=subprocess.PIPE, text=True
    ) as rank:
        assert b"started" in os.read(read, 4096)
        time.sleep(0.5)
        rank.terminate()
        _, errors = rank.communicate(timeout=20)
    assert rank.returncode == -signal.SIGTERM
    assert "Traceback" not in errors
    os.close(read)
    os.close(write)


def test_outside_a_gang_it_says_what_is_missing() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "jobs.worker"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "'RANK' is not set" in done.stderr
    assert "Traceback" not in done.stderr

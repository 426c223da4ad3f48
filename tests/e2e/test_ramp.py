"""A batch that grows: real workers under three plans, killed in mid-ramp and going on, also under another plan.

The ramp has steps of 2, 3, 4 and 5 sequences, so that two replicas have padding in every second size.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.checkpoint import newest
from jobs.data import prepare
from jobs.paths import RunPaths
from jobs.spec import CheckpointSpec, DataSpec, JobSpec, engine_config
from strategies.codec import to_json
from strategies.deepspeed_config import learning_rate
from strategies.ramp import Ramp
from tests.support.gang import ROOT, GangFailed, WarmPool
from tests.support.jobspecs import GPT, make_job, make_plan

pytestmark = pytest.mark.timeout(180)
MODEL = dataclasses.replace(GPT, layers=2, hidden=32, ffn=64, vocab=320, seq=32)
FULL, STEPS = 5, 11
RAMP = Ramp(start=2, increment=1, samples=24)
SIZES = [2, 2, 2, 2, 3, 3, 3, 4, 4, 5, 5]
LOSS_TOLERANCE, NORM_TOLERANCE = 2e-6, 1e-5  # as in the parity tests


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("jobs/faults.py", "jobs/worker.py", "jobs/spec.py", "jobs/report.py"):
        shutil.copy(ROOT / name, folder)
    return prepare(DataSpec(kind="text", path=str(folder)), folder / "stores", MODEL.vocab, seq=MODEL.seq)


def job_of(data: DataSpec, *, faults: tuple[str, ...] = (), **degrees: Any) -> JobSpec:
    job = make_job(
        MODEL, make_plan(MODEL, FULL, **degrees), global_batch=FULL, steps=STEPS, clip=0.5, eps=1e-6, warmup_steps=2
    )
    batch = dataclasses.replace(job.batch, ramp=RAMP)
    engine = engine_config(job.plan, job.train, batch)
    saving = CheckpointSpec(every=3)
    return dataclasses.replace(job, batch=batch, data=data, checkpoint=saving, deepspeed=engine, faults=faults)


def attempt(pool: WarmPool, root: Path, job: JobSpec, number: int = 1, resume_from: str = "") -> None:
    """One gang in a run directory."""
    paths = RunPaths(root)
    paths.attempt(number).mkdir(parents=True)
    paths.job(number).write_text(json.dumps(to_json(job)))
    arguments = {"attempt": number, "resume_from": resume_from}
    target = "tests.support.worker_ranks:work"
    pool.run(target, world_size=job.plan.world_size, arguments=arguments, run_dir=str(root), timeout_s=90)


def lines(root: Path) -> dict[int, list[float]]:
    """Loss, norm and rate of every step; a step that was done again counts once."""
    rows = [json.loads(line) for line in RunPaths(root).metrics.read_text().splitlines()]
    return {row["step"]: [row[key] for key in ("loss", "grad_norm", "lr")] for row in rows}


def samples(root: Path, number: int) -> list[int]:
    """Indices that the ranks of an attempt have read, in order; ranks of one replica read the same."""
    files = RunPaths(root).attempt(number).glob("samples-*.txt")
    return sorted({int(line) for file in files for line in file.read_text().split()})


def check_parity(found: dict[int, list[float]], wanted: dict[int, list[float]]) -> None:
    for step, (loss, norm, rate) in found.items():
        assert loss == pytest.approx(wanted[step][0], rel=LOSS_TOLERANCE), step
        assert norm == pytest.approx(wanted[step][1], rel=NORM_TOLERANCE), step
        assert rate == wanted[step][2]


def rates(job: JobSpec) -> list[float]:
    """Learning rates of the steps."""
    train, whole = job.train, sum(SIZES) / FULL
    done = itertools.accumulate(size / FULL for size in SIZES)
    recipe: dict[str, Any] = {"lr": train.lr, "min_lr": train.min_lr, "warmup_steps": train.warmup_steps}
    return [learning_rate(position, steps=whole, **recipe) for position in done]


def test_a_ramp_is_the_same_under_every_plan_and_after_every_restart(
    pool: WarmPool, data: DataSpec, tmp_path: Path
) -> None:
    pipelined: dict[str, Any] = {"pp": 2, "dp": 2, "zero_stage": 1}
    job = job_of(data, **pipelined)
    schedule = job.schedule()
    assert [schedule.batch_at(step) for step in range(1, STEPS + 1)] == SIZES

    attempt(pool, tmp_path / "whole", job)
    wanted = lines(tmp_path / "whole")
    assert samples(tmp_path / "whole", 1) == list(range(sum(SIZES)))
    assert [rate for _, _, rate in wanted.values()] == pytest.approx(rates(job), rel=1e-12), (
        "by samples, in full batches"
    )
    attempt(pool, tmp_path / "alone", job_of(data))
    check_parity(lines(tmp_path / "alone"), wanted)

    # killed at a step of 4; from the checkpoint before it, in mid-ramp, the end is the same to the last bit
    killed = tmp_path / "killed"
    with pytest.raises(GangFailed):
        attempt(pool, killed, job_of(data, faults=("rank_kill@rank=3,step=8",), **pipelined))
    point = newest(RunPaths(killed).checkpoint_dir)
    assert point is not None
    shutil.copytree(killed, tmp_path / "replanned")
    attempt(pool, killed, job, 2, str(point))
    assert lines(killed) == wanted
    first = sum(SIZES[:6])
    assert samples(killed, 2) == list(range(first, sum(SIZES)))

    # under another plan: the same samples in the same steps
    moved = newest(RunPaths(tmp_path / "replanned").checkpoint_dir)
    attempt(pool, tmp_path / "replanned", job_of(data, dp=2, zero_stage=2), 2, str(moved))
    check_parity(lines(tmp_path / "replanned"), wanted)
    assert samples(tmp_path / "replanned", 2) == list(range(first, sum(SIZES)))
    assert (
        json.loads((killed / "final.json").read_text())["weights_digest"]
        == (json.loads((tmp_path / "whole" / "final.json").read_text())["weights_digest"])
    )

"""Restore under a changed plan: beside restore under the same plan, and beside DeepSpeed's universal conversion.

A GPT of 30 million parameters in fp32 with Adam (360 MB a checkpoint), four ranks. DeepSpeed changes a plan offline:
``save_checkpoint``, ``ds_to_universal``, ``load_checkpoint`` with ``load_universal``; the only change that its own
tests cover is that of data parallelism, so that is what is compared. Ours is a save and a restore. Digests are
verified, files are fsynced. Asserted: the loss of the next step is the same whatever the road.

``python -m pytest tests/benchmarks/test_restore_peers.py -m full -s``
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from strategies.codec import to_json
from tests.benchmarks.contenders import PEER_ENVIRONMENT
from tests.benchmarks.peers import TAG
from tests.benchmarks.stats import Musts, repeats, show
from tests.support.gang import WarmPool
from tests.support.jobspecs import GPT, make_job, make_plan

MODEL = dataclasses.replace(GPT, name="bench", layers=8, hidden=512, heads=8, kv_heads=8, ffn=2048, vocab=8192, seq=64)
HERE = "tests.benchmarks.peers.checkpoints"
PLANS: dict[str, dict[str, Any]] = {
    "PP2 x TP2": {"pp": 2, "tp": 2, "zero_stage": 1},
    "PP4": {"pp": 4, "zero_stage": 1},
    "TP2 x DP2": {"tp": 2, "dp": 2, "zero_stage": 1},
    "DP4": {"dp": 4, "zero_stage": 1},
    "DP2": {"dp": 2, "zero_stage": 1},
}
WRITER = "PP2 x TP2"
TIMEOUT_S = 280.0


def job_of(plan: str) -> dict[str, Any]:
    """The job as JSON."""
    return dict(to_json(make_job(MODEL, make_plan(MODEL, 4, **PLANS[plan]), global_batch=4, steps=4)))


def ranks_of(plan: str) -> int:
    """Number of ranks."""
    degrees = PLANS[plan]
    return int(degrees.get("pp", 1) * degrees.get("tp", 1) * degrees.get("dp", 1))


class Bench:
    """Gangs forked from one warm process, and what they took."""

    def __init__(self, pool: WarmPool) -> None:
        self._pool = pool
        self.losses: list[float] = []

    def save(self, plan: str, run_dir: Path, theirs: str = "") -> dict[str, Any]:
        """Save; returns what rank 0 says, with the seconds of the slowest rank."""
        rows = self._run("save_both", plan, {"theirs": theirs}, run_dir)
        return dict(rows[0]) | {name: max(row[name] for row in rows) for name in ("ours_s", "theirs_s")}

    def load(self, function: str, plan: str, **source: str) -> float:
        """Restore; returns the seconds of the slowest rank."""
        rows = self._run(function, plan, source, Path("."))
        self.losses.append(rows[0]["loss"])
        return max(float(row["seconds"]) for row in rows)

    def _run(self, function: str, plan: str, arguments: dict[str, str], run_dir: Path) -> list[Any]:
        return self._pool.run(
            f"{HERE}:{function}",
            world_size=ranks_of(plan),
            timeout_s=TIMEOUT_S,
            arguments={"job": job_of(plan), **arguments},
            run_dir=str(run_dir),
        )


def convert(source: Path, target: Path) -> float:
    """Seconds of the offline conversion, a command of its own as people run it."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    begin = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **PEER_ENVIRONMENT}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return time.perf_counter() - begin


def check_same(losses: list[float]) -> None:
    """All roads lead to the same weights, up to the rounding of other orders of summation."""
    assert max(losses) - min(losses) <= 1e-4 * abs(statistics.median(losses)), losses


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_changed_plan_beside_the_same_plan(tmp_path: Path, musts: Musts) -> None:
    """Beside the same plan twice: the plan that wrote (the same checkpoint), and the plan that reads (the same work).

    Replicas of data parallelism hold the weights several times, and gather them whoever wrote the checkpoint.
    """
    changed: dict[str, list[float]] = {}
    same: dict[str, list[float]] = {}
    with WarmPool() as pool:
        bench = Bench(pool)
        saved = {plan: bench.save(plan, tmp_path / str(number)) for number, plan in enumerate(PLANS)}
        for _ in range(repeats(5)):
            for plan in PLANS:
                took = bench.load("restore_ours", plan, manifest=saved[plan]["path"])
                same.setdefault(plan, []).append(took)
                if plan != WRITER:
                    took = bench.load("restore_ours", plan, manifest=saved[WRITER]["path"])
                    changed.setdefault(plan, []).append(took)
    check_same(bench.losses)
    show(f"restore of {saved[WRITER]['bytes'] / 1e6:.0f} MB, saved under the same plan", same)
    show(f"saved under {WRITER}", changed)
    for plan, seconds in changed.items():
        musts.ratio(seconds, same[WRITER], what=f"{WRITER} -> {plan} / {WRITER} -> {WRITER}", must=2.0)
        musts.ratio(seconds, same[plan], what=f"{WRITER} -> {plan} / {plan} -> {plan}", must=2.0)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_changed_plan_beside_deepspeed_universal(tmp_path: Path, musts: Musts) -> None:
    ours: list[float] = []
    theirs: dict[str, list[float]] = {"save_checkpoint": [], "ds_to_universal": [], "load_checkpoint": []}
    with WarmPool() as pool:
        bench = Bench(pool)
        for number in range(repeats(5)):
            folder = tmp_path / str(number)
            source, target = folder / "deepspeed", folder / "universal"
            saved = bench.save("DP4", folder, theirs=str(source))
            ours.append(saved["ours_s"] + bench.load("restore_ours", "DP2", manifest=saved["path"]))
            theirs["save_checkpoint"].append(saved["theirs_s"])
            theirs["ds_to_universal"].append(convert(source / TAG, target / TAG))
            theirs["load_checkpoint"].append(bench.load("load_universal", "DP2", folder=str(target)))
    check_same(bench.losses)
    whole = [sum(parts) for parts in zip(*theirs.values(), strict=True)]
    show("from DP4 to DP2, save included", {"phalanx": ours, "DeepSpeed universal": whole, **theirs})
    musts.ratio(ours, whole, what="phalanx / DeepSpeed universal", must=0.5)

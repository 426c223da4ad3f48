"""How fast the planner is: ``make bench`` prints the numbers and what became of every plan."""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import build
from launcher.config import compose
from strategies.estimate import Estimator
from strategies.plan import ParallelPlan
from strategies.space import Space
from tests.benchmarks.stats import Musts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
@pytest.mark.parametrize(("experiment", "must_s"), [("gpt3_175b", 1.0), ("gpt4_1800b", 3.0)])
def test_whole_command(experiment: str, must_s: float, tmp_path: Path, musts: Musts) -> None:
    words = ["plan", f"experiment={experiment}", "strategy=auto"]
    seconds, busy = [], []
    for _ in range(3):
        start, used = time.perf_counter(), processor_s()
        document = run([*words, "--json"], tmp_path)
        seconds.append(time.perf_counter() - start)
        busy.append(processor_s() - used)
    found = document["search"]
    counts = {**found["pruned"], **found["rejected"]}
    assert found["space"] == found["evaluated"] + sum(counts.values())
    print(
        f"\nphalanx {' '.join(words)}: median {statistics.median(seconds):.2f} s of 3, of which "
        f"{statistics.median(busy):.2f} s on the processor"
    )
    musts.hold("seconds on the processor", statistics.median(busy), "<=", must_s, ".2f")
    print(f"  {found['space']:>15,} plans in the space\n  {found['evaluated']:>15,} predicted one by one")
    for name, number in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"  {number:>15,} {name}")


def processor_s() -> float:
    """Seconds that the processor has spent on commands so far: what counts on a machine that does other things, too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(words: list[str], cwd: Path) -> dict[str, Any]:
    """The document of a command on one core."""
    pinned = ["taskset", "-c", "0"] if Path("/usr/bin/taskset").exists() else []
    done = subprocess.run(
        [*pinned, sys.executable, "-P", "-m", "launcher.cli", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.full
@pytest.mark.parametrize("experiment", ["gpt3_175b", "gpt4_1800b"])
def test_one_estimate(experiment: str, musts: Musts) -> None:
    config = compose([f"experiment={experiment}"])
    work = build.workload(config, build.outline(config))
    assert work is not None
    space, rng = Space(work), random.Random(0)
    shapes = [shape for shape in space.shapes() if shape.pp > 1 and space.room(shape) >= shape.unit]
    plans: list[ParallelPlan] = []
    while len(plans) < 2000:
        shape = rng.choice(shapes)
        inner, pipe = rng.choice(list(space.inners(shape))), rng.choice(space.pipes(shape))
        replicas = space.replicas(shape, inner, pipe, 1, space.room(shape))
        if replicas:
            plans.append(space.plan(shape, rng.choice(space.states(shape)), inner, pipe, replicas[-1]))
    estimator = Estimator(work)
    for name in ("cold", "warm"):
        start = time.process_time()
        for plan in plans:
            estimator.score(plan, sum(estimator.timing.step(plan)), "goodput")
            estimator.memory.peak(plan)
        each = (time.process_time() - start) / len(plans)
        print(f"\n{experiment}: one estimate, {name}: time, memory, goodput")
        musts.hold("microseconds", each * 1e6, "<=", 100, ".0f")

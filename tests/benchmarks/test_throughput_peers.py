"""Steady state: steps per second under phalanx against the same engine under torchrun, in interleaved pairs.

Two ranks, TP2, the same loop: as many ranks as the smallest machine has cores, for with more of them than cores a
rate is one of the kernel's scheduler and differs by half from run to run. The rate is that of the last hundred steps,
between two lines of ``metrics.jsonl``: no start, no checkpoint. Runs alternate, and in every second pair torchrun comes
first, so that a drift of the machine favours nobody. phalanx runs at its defaults, which copy the state into memory as
often as the share of time allows that copies may take; what a copy at every step costs is another benchmark's
(``test_checkpoint_stall.py``). Asserted: the runs end well with equal losses.

``python -m pytest tests/benchmarks/test_throughput_peers.py -m full -s``; PHALANX_BENCH_QUICK=1 for one pair.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.benchmarks.contenders import Contender, job_of, phalanx, running, torchrun, words
from tests.benchmarks.stats import Musts, interval, repeats, show

RANKS, PLAN = 2, ("strategy.tp=2", "strategy.pp=1")
STEPS, FROM = 120, 20
PROCESS = ("cluster=process", "cluster.nodes=2", "cluster.slots_per_node=1")


def measure(contender: Contender, run_dir: Path, job: dict[str, object]) -> tuple[float, dict[int, float]]:
    """Steps per second, and the losses."""
    with running(contender, run_dir, job) as run:
        losses = run.finish()
        at = {line["step"]: float(line["time"]) for line in run.lines(1)}
    return (STEPS - FROM) / (at[STEPS] - at[FROM]), losses


@pytest.mark.full
@pytest.mark.timeout(2700)
def test_steady_state(tmp_path: Path, musts: Musts) -> None:
    job = words(tmp_path, steps=STEPS, every=0, more=PLAN)
    document = job_of((*job, "cluster.slots_per_node=1"), tmp_path)
    ours = phalanx(job, *PROCESS, name="phalanx")
    theirs = torchrun(RANKS)
    rates: dict[str, list[float]] = {one.name: [] for one in (ours, theirs)}
    curves: list[dict[int, float]] = []
    for number in range(repeats(10)):
        order = (ours, theirs) if number % 2 else (theirs, ours)
        for index, contender in enumerate(order):
            rate, losses = measure(contender, tmp_path / f"{number}-{index}" / "run", document)
            rates[contender.name].append(rate)
            curves.append(losses)
    assert len(curves[0]) == STEPS
    assert all(curve == curves[0] for curve in curves), "not everybody computed the same"
    show("steady state, 2 ranks, TP2", rates, unit="steps/s")
    ratios = [mine / other for mine, other in zip(rates[ours.name], rates[theirs.name], strict=True)]
    low, high = interval(ratios)
    print(f"  of {len(ratios)} pairs: 95 % interval {low:.3f} to {high:.3f}")
    musts.hold("steps per second, phalanx / torchrun, median", statistics.median(ratios), ">=", 0.99)

"""Steady state: steps per second under phalanx against the same engine under torchrun, in interleaved pairs.

Four ranks, PP2 x TP2, the same loop. The rate is that of the second half of a run, between two lines of
``metrics.jsonl``: no start, no checkpoint. Runs alternate, and in every second pair torchrun comes first, so that a
drift of the machine favours nobody. phalanx runs with its defaults, which copy the state into memory as often as the
share of time allows that copies may take (the must), and with a copy at every step whatever that costs: the nodes are
processes of one machine here, so their persisters compete with the ranks for its cores. Asserted: the runs end well
with equal losses.

``python -m pytest tests/benchmarks/test_throughput_peers.py -m full -s``; PHALANX_BENCH_QUICK=1 for one pair.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.benchmarks.contenders import EVERY_STEP, Contender, job_of, phalanx, running, torchrun, words
from tests.benchmarks.stats import Musts, interval, repeats, show

STEPS, FROM = 160, 40
PROCESS = ("cluster=process", "cluster.nodes=2", "cluster.slots_per_node=2")


def measure(contender: Contender, run_dir: Path, job: dict[str, object]) -> tuple[float, dict[int, float]]:
    """Steps per second, and the losses."""
    with running(contender, run_dir, job) as run:
        losses = run.finish()
        at = {line["step"]: float(line["time"]) for line in run.lines(1)}
    return (STEPS - FROM) / (at[STEPS] - at[FROM]), losses


@pytest.mark.full
@pytest.mark.timeout(2700)
def test_steady_state(tmp_path: Path, musts: Musts) -> None:
    job = words(tmp_path, steps=STEPS, every=0)
    document = job_of(job, tmp_path)
    ours = phalanx(job, *PROCESS, name="phalanx")
    copying = phalanx(job, *PROCESS, EVERY_STEP, name="phalanx, a copy in memory every step")
    theirs = torchrun()
    rates: dict[str, list[float]] = {one.name: [] for one in (ours, copying, theirs)}
    curves: list[dict[int, float]] = []
    for number in range(repeats(10)):
        order = (ours, theirs, copying) if number % 2 else (copying, theirs, ours)
        for index, contender in enumerate(order):
            rate, losses = measure(contender, tmp_path / f"{number}-{index}" / "run", document)
            rates[contender.name].append(rate)
            curves.append(losses)
    assert len(curves[0]) == STEPS
    assert all(curve == curves[0] for curve in curves), "not everybody computed the same"
    show("steady state, 4 ranks, PP2 x TP2", rates, unit="steps/s")
    for name in (ours.name, copying.name):
        ratios = [mine / other for mine, other in zip(rates[name], rates[theirs.name], strict=True)]
        low, high = interval(ratios)
        print(f"  {name} / torchrun: median {statistics.median(ratios):.3f}, 95 % interval {low:.3f} to {high:.3f}")
        print(f"    of {len(ratios)} pairs")
        if name == ours.name:
            musts.hold("steps per second, phalanx / torchrun", statistics.median(ratios), ">=", 0.99)

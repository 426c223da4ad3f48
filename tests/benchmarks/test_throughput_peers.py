"""Steady state: steps per second under phalanx against the same engine under torchrun, in interleaved pairs.

Four ranks, PP2 x TP2, the same loop. Both of a pair are started, and when both train they run by turns of two seconds
(:mod:`tests.benchmarks.turns`), so that a drift of the machine favours nobody; who has the first turn alternates, too.
phalanx runs with its defaults, which copy the state into memory as often as the share of time allows that copies may
take (the must), and with a copy at every step whatever that costs: the nodes are processes of one machine here, so
their persisters compete with the ranks for its cores. And torchrun runs against itself: that shows how fine the measure
is. Asserted: the runs end well with equal losses, and phalanx has taken no turn of the other for a failure.

``python -m pytest tests/benchmarks/test_throughput_peers.py -m full -s``; PHALANX_BENCH_QUICK=1 for one pair.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launcher.store import RunStore
from tests.benchmarks.contenders import EVERY_STEP, Contender, job_of, phalanx, running, torchrun, words
from tests.benchmarks.stats import Musts, interval, repeats, show
from tests.benchmarks.turns import take_turns

FROM, UNTIL, STEPS = 20, 220, 260
PROCESS = ("cluster=process", "cluster.nodes=2", "cluster.slots_per_node=2")


def at_defaults(job: Sequence[str]) -> Contender:
    """phalanx as it is."""
    return phalanx(job, *PROCESS, name="phalanx")


def copying(job: Sequence[str]) -> Contender:
    """phalanx with a copy at every step."""
    return phalanx(job, *PROCESS, EVERY_STEP, name="phalanx, a copy in memory every step")


def itself(job: Sequence[str]) -> Contender:
    """The one that it is compared with."""
    return torchrun()


def measure(pair: Sequence[Contender], folder: Path, job: dict[str, object]) -> list[float]:
    """Steps per second of each."""
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(running(one, folder / str(index) / "run", job)) for index, one in enumerate(pair)]
        for run in runs:
            run.wait_for_step(FROM)
        rates = take_turns(runs, UNTIL)
        curves = [run.finish() for run in runs]
    assert len(curves[0]) == STEPS
    assert curves[0] == curves[1], "not both computed the same"
    for run in runs:
        assert not run.contender.ours or len(RunStore(run.run_dir).run().attempts) == 1
    return rates


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("ours", "pairs"), [(at_defaults, 10), (copying, 3), (itself, 3)])
def test_steady_state(ours: Callable[[Sequence[str]], Contender], pairs: int, tmp_path: Path, musts: Musts) -> None:
    job = words(tmp_path, steps=STEPS, every=0)
    document = job_of(job, tmp_path)
    mine, theirs = ours(job), torchrun()
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats(pairs)):
        found = measure((mine, theirs) if number % 2 else (theirs, mine), tmp_path / str(number), document)
        for kept, rate in zip(rates, found if number % 2 else reversed(found), strict=True):
            kept.append(rate)
        print(f"  pair {number + 1}: {rates[0][-1]:.3f} and {rates[1][-1]:.3f} steps/s", flush=True)
    ratios = [one / other for one, other in zip(*rates, strict=True)]
    show("steady state, 4 ranks, PP2 x TP2", {mine.name: rates[0], f"beside {theirs.name}": rates[1]}, unit="steps/s")
    low, high = interval(ratios)
    print(
        f"  {mine.name} / torchrun: median {statistics.median(ratios):.3f} of {len(ratios)} pairs, 95 % interval",
        end="",
    )
    print(f" {low:.3f} to {high:.3f}")
    if ours is at_defaults:
        musts.hold("steps per second, phalanx / torchrun", statistics.median(ratios), ">=", 0.99)

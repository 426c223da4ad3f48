"""Steady state: steps per second under phalanx against the same engine under torchrun, in interleaved pairs.

Four ranks, PP2 x TP2, the same loop. Both of a pair are started, and when both train they run by turns of two seconds
(:mod:`tests.benchmarks.turns`), so that a drift of the machine blurs nothing; who has the first turn alternates, too.
phalanx runs with its defaults, which copy the state into memory as often as the share of time allows that copies may
take (the must), and with a copy at every step whatever that costs: the nodes are processes of one machine here, so
their persisters compete with the ranks for its cores. And torchrun runs against itself, which shows how fine the
measure is. Asserted: both compute the same losses, and no turn was taken for a failure.

``python -m pytest tests/benchmarks/test_throughput_peers.py -m full -s``; PHALANX_BENCH_QUICK=1 for one pair.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.store import RunStore
from tests.benchmarks.contenders import EVERY_STEP, OURS, Contender, job_of, phalanx, running, torchrun, words
from tests.benchmarks.stats import Musts, interval, repeats, show
from tests.benchmarks.turns import Turns, take_turns

FROM, OWN = 20, 200
PROCESS = ("cluster=process", "cluster.nodes=2", "cluster.slots_per_node=2")


def measure(pair: Sequence[Contender], folder: Path, job: dict[str, object]) -> list[Turns]:
    """Let two run by turns."""
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(running(one, folder / str(number) / "run", job)) for number, one in enumerate(pair)]
        for run in runs:
            run.wait_for_step(FROM)
        turns = take_turns(runs, OWN)
    first, second = ({line["step"]: line["loss"] for line in run.lines(1)} for run in runs)
    both = first.keys() & second.keys()
    assert len(both) >= OWN
    assert all(first[step] == second[step] for step in both), "not both computed the same"
    for run in runs:
        assert not run.lines(2), f"{run.contender.name} has begun again"
        assert not run.contender.ours or len(RunStore(run.run_dir).run().attempts) == 1
    return turns


def copies(turns: Turns) -> float:
    """Copies in memory per step."""
    every = [int(line.get("copies_every", 0)) for line in turns.steps()]
    return sum(1 / steps for steps in every if steps) / len(every)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("who", "more", "pairs", "least"),
    [
        pytest.param(OURS, (), 10, 0.99, id="defaults"),
        pytest.param(f"{OURS}, a copy at every step", (EVERY_STEP,), 6, None, id="a-copy-every-step"),
        pytest.param("torchrun", None, 6, None, id="torchrun-itself"),
    ],
)
def test_steady_state(
    who: str, more: Sequence[str] | None, pairs: int, least: float | None, tmp_path: Path, musts: Musts
) -> None:
    job = words(tmp_path, steps=10 * (FROM + OWN), every=0)  # more than anybody does
    document = job_of(job, tmp_path)
    mine = torchrun() if more is None else phalanx(job, *PROCESS, *more, name=who)
    rates: dict[str, list[float]] = {mine.name: [], "torchrun beside it": []}
    made: list[float] = []
    for number in range(repeats(pairs)):
        first = number % 2
        found = measure((mine, torchrun()) if first else (torchrun(), mine), tmp_path / str(number), document)
        ours, theirs = found if first else reversed(found)
        rates[mine.name].append(ours.rate())
        rates["torchrun beside it"].append(theirs.rate())
        made.append(copies(ours))
        print(f"  pair {number + 1}: {ours.rate():.3f} / {theirs.rate():.3f} = {ours.rate() / theirs.rate():.4f}")
    ratios = [one / other for one, other in zip(*rates.values(), strict=True)]
    (low, high), median = interval(ratios), statistics.median(ratios)
    show(f"steady state, 4 ranks, PP2 x TP2, {len(ratios)} pairs by turns", rates, unit="steps/s")
    print(f"  copies in memory per step: {statistics.median(made):.3f}")
    print(f"  {mine.name} / torchrun: {median:.3f}, 95 % interval {low:.3f} to {high:.3f}", flush=True)
    if least is not None:
        musts.hold("steps per second, phalanx / torchrun", median, ">=", least)

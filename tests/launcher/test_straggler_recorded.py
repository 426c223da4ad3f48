"""Who is slow in a run that really took place, while another process took a core now and then: nobody.

Recorded with four ranks (two tensor-parallel in each of two stages, on two nodes) on a machine of two cores, whose
times have all that real ones have: they depend on each other, for as long as whatever disturbs them lasts. A step is
``[own_s, queued_s]`` of every rank and the seconds that the step took.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.observation import Observation
from launcher.straggler import WINDOW, StragglerWatch
from tests.launcher.test_straggler import WITHIN, plan_of

RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDED / "own-times-tp2pp2.json").read_text())
    return found


def named(run: dict[str, Any], slowdown: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Ranks that are named, with the step."""
    watch = StragglerWatch()
    watch.begin(plan_of(2, 2, 1))
    found = []
    for step, times, seconds in run["steps"]:
        for rank, (own_s, queued_s) in enumerate(times):
            more_s = (own_s - queued_s) * (slowdown(rank, step) - 1)
            data = {"kind": "step", "rank": rank, "step": step, "queued_s": queued_s}
            data |= {"own_s": own_s + more_s, "seconds": seconds + more_s}
            watch.note(Observation(kind="report", node=run["nodes"][str(rank)], time=1.0, data=data))
        found += [(failure.rank, failure.step) for failure, _ in watch.take()]
    return found


def test_it_was_disturbed(run: dict[str, Any]) -> None:
    """Steps took clearly longer while something else ran, so that there is something to be misled by."""
    took = {step: seconds for step, _, seconds in run["steps"]}
    assert len(took) >= 400
    begins, ends = run["burned"][::2], run["burned"][1::2]
    spans = [range(begin + 1, end) for begin, end in zip(begins, ends, strict=True)]
    beside = [took[step] for span in spans for step in span if step in took]
    assert len(beside) >= WINDOW
    assert statistics.median(beside) > 1.15 * statistics.median(took.values())


def test_nobody_is_named(run: dict[str, Any]) -> None:
    assert named(run, lambda rank, step: 1.0) == []


@pytest.mark.parametrize("victim", range(4))
def test_who_is_slow_is_named(victim: int, run: dict[str, Any]) -> None:
    """Where nothing else disturbs: from a step on, one of the ranks takes 1.3 times as long for what it computes."""
    begin = 200
    ((rank, step),) = named(run, lambda rank, step: 1.3 if rank == victim and step > begin else 1.0)
    assert rank == victim
    assert step <= begin + WITHIN

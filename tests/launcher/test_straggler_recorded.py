"""Who is slow in a run that really took place, while another process took a core now and then: nobody.

Recorded with four ranks (two tensor-parallel in each of two stages, on two nodes) on a busy machine of two cores, whose
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
    found: dict[str, Any] = json.loads((RECORDED / "paces" / "own-times-tp2pp2.json").read_text())
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
    """Whole windows of steps took twice as long as others, so that there is something to be misled by."""
    took = [seconds for _, _, seconds in run["steps"]]
    assert len(took) >= 400
    windows = [statistics.median(took[at : at + WINDOW]) for at in range(0, 400 - WINDOW, WINDOW)]
    assert max(windows) > 2 * min(windows)


def test_nobody_is_named(run: dict[str, Any]) -> None:
    assert named(run, lambda rank, step: 1.0) == []


@pytest.mark.parametrize("victim", range(4))
def test_who_is_slow_is_named(victim: int, run: dict[str, Any]) -> None:
    """What a rank computes is a ninth of a step here, the rest is waiting for cores: less would not hold it up."""
    begin = 200
    found = named(run, lambda rank, step: 2.5 if rank == victim and step > begin else 1.0)
    assert [rank for rank, _ in found] == [victim]
    assert found[0][1] <= begin + WITHIN

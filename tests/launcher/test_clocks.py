"""Nodes whose clock is off are named, and those of which that cannot be known are not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from launcher import clocks
from launcher.describe import describe
from launcher.observation import Observation
from launcher.render import run_text
from launcher.render_events import event_line
from launcher.run import EventKind
from tests.support.agents import agents_in
from tests.support.stage import Stage


def named(*differences: tuple[float, float]) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []

    def record(kind: EventKind, **data: Any) -> None:
        assert kind is EventKind.CLOCK_SKEWED
        told.append(data)

    watch = clocks.Clocks(record)
    for number, (ahead_s, within_s) in enumerate(differences):
        data = {"incarnation": "i", "ahead_s": ahead_s, "within_s": within_s}
        for _ in range(2):
            watch.note(Observation(kind="agent_up", node=f"n{number}", time=1.0, data=data))
    return told


def test_an_answer_that_takes_long_says_little() -> None:
    assert clocks.difference(100.0, 0.2, 100.1) == pytest.approx({"ahead_s": 0.0, "within_s": 0.1})
    assert clocks.difference(100.0, 8.0, 106.0) == pytest.approx({"ahead_s": 2.0, "within_s": 4.0})
    assert named((2.0, 4.0), (0.9, 0.0), (-0.9, 0.0), (-4.9, 4.0)) == []
    assert [one["node"] for one in named((1.1, 0.0), (-1.1, 0.0), (0.0, 0.0), (6.0, 4.0))] == ["n0", "n1", "n3"]


def test_where_all_differ_it_is_said_of_some() -> None:
    assert len(named(*[(60.0, 0.0)] * 100)) == clocks.MAX_NAMED


def test_it_is_on_record_and_in_the_status(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    stage.gang.say("agent_up", "b", incarnation="b-0", ahead_s=-93.25, within_s=0.001)
    stage.gang.say("agent_up", "c", incarnation="c-0", ahead_s=0.2, within_s=0.001)
    stage.turn()
    (event,) = [event for event in stage.store.events() if event.kind is EventKind.CLOCK_SKEWED]
    assert event.data == {"node": "b", "ahead_s": -93.25, "within_s": 0.001}
    words = "node b: its clock is 93.2 s behind the controller's, and so are the times of its ranks"
    assert event_line(event) == words
    document = describe(stage.store, stage.clock.time())
    assert document["clocks"] == [event.data]
    assert words in run_text(document)


def test_an_agent_tells_its_time(tmp_path: Path) -> None:
    """A real one; the controller's clock is two minutes fast."""
    with agents_in(tmp_path) as agents:
        agents.start("a")
        seen = agents.watch("a", wall=lambda: time.time() + 120).until_kind("agent_up")
        assert seen.data["ahead_s"] == pytest.approx(-120, abs=seen.data["within_s"] + 0.5)
        assert seen.data["within_s"] >= 0

"""Nodes whose clock is off are named, and those of which that cannot be known are not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from launcher import adoption, clocks, lock
from launcher.describe import describe
from launcher.observation import Observation
from launcher.render import run_text
from launcher.render_events import event_line
from launcher.run import EventKind
from tests.support.agents import agents_in
from tests.support.stage import Stage


def up(node: str, ahead_s: float, within_s: float = 0.0) -> Observation:
    data = {"incarnation": "i", "ahead_s": ahead_s, "within_s": within_s}
    return Observation(kind="agent_up", node=node, time=1.0, data=data)


def named(*differences: tuple[float, float]) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []

    def record(kind: EventKind, **data: Any) -> None:
        assert kind is EventKind.CLOCK_SKEWED
        told.append(data)

    watch = clocks.Clocks(record)
    watch.begin([])
    for number, (ahead_s, within_s) in enumerate(differences):
        for _ in range(2):
            watch.note(up(f"n{number}", ahead_s, within_s))
    return told


def test_an_answer_that_takes_long_says_little() -> None:
    assert clocks.difference(100.0, 0.2, 100.1) == pytest.approx({"ahead_s": 0.0, "within_s": 0.1})
    assert clocks.difference(100.0, 8.0, 106.0) == pytest.approx({"ahead_s": 2.0, "within_s": 4.0})
    assert named((2.0, 4.0), (0.9, 0.0), (-0.9, 0.0), (-4.9, 4.0)) == []
    assert [one["node"] for one in named((1.1, 0.0), (-1.1, 0.0), (0.0, 0.0), (6.0, 4.0))] == ["n0", "n1", "n3"]


def test_where_all_differ_it_is_said_of_some() -> None:
    assert len(named(*[(60.0, 0.0)] * 100)) == clocks.MAX_NAMED


def test_rank_0_s_node_is_named_however_many_are() -> None:
    """If the controller's own clock is off, all differ, and that of the steps must be known all the same."""
    told: list[str] = []
    watch = clocks.Clocks(lambda kind, **data: told.append(data["node"]))
    watch.begin([])
    for number in range(20):
        watch.note(up(f"n{number}", 60.0))
    assert len(told) == clocks.MAX_NAMED
    watch.first("n15")
    watch.first("n3")  # is named already
    assert told[clocks.MAX_NAMED :] == ["n15"]


def test_a_clock_that_agrees_again_is_off_no_more(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    first = stage.store.run().attempts[-1].nodes[0]
    for incarnation, (ahead_s, within_s), left in (
        ("1", (60.0, 0.01), 60.0),
        ("2", (60.5, 0.01), 60.0),  # as was told
        ("3", (56.5, 4.0), 60.0),  # who answers so late proves nothing
        ("4", (90.0, 0.01), 90.0),
        ("5", (0.1, 4.0), 0.0),  # but this
        ("6", (1.2, 0.01), 1.2),
        ("7", (0.3, 0.01), 0.0),
        ("8", (0.3, 0.01), 0.0),
    ):
        stage.gang.say("agent_up", first, incarnation=incarnation, ahead_s=ahead_s, within_s=within_s)
        stage.turn()
        assert clocks.Offset.of(stage.store.events()).ahead_s == left
    told = [event for event in stage.store.events() if event.kind is EventKind.CLOCK_SKEWED]
    assert [event.data["ahead_s"] for event in told] == [60.0, 90.0, 0.1, 1.2, 0.3]
    assert event_line(told[-1]) == f"node {first}: its clock agrees with the controller's again"
    assert describe(stage.store, stage.clock.time())["clocks"] == []


@pytest.mark.parametrize(("found", "left"), [(60.0, 60.0), (0.0, 0.0)])
@pytest.mark.parametrize("host", ["another", ""])
def test_a_successor_says_what_it_has_found_once_it_has_begun(
    tmp_path: Path, host: str, found: float, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another host nothing is known but what it says itself, and here what its predecessor said until it is over."""
    stage = Stage(tmp_path)
    stage.start()
    stage.gang.say("agent_up", "a", incarnation="1", ahead_s=30.0, within_s=0.01)
    stage.turn()
    stage.lock.release()
    if host:
        monkeypatch.setattr(adoption, "identity", lambda: lock.identity() | {"host": host})
    stage.renew()
    begun = len(stage.kinds())
    stage.gang.say("agent_up", "a", incarnation="1", attempt=0, ranks=[], ahead_s=found, within_s=0.01)
    adoption.begin(stage.controller)
    news = stage.store.events()[begun:]
    assert news[0].kind is EventKind.CONTROLLER_STARTED
    assert [event.kind for event in news].count(EventKind.CLOCK_SKEWED) == (not (host and not found))
    assert clocks.Offset.of(stage.store.events()).ahead_s == left


@pytest.mark.parametrize("ahead_s", [300.0, -300.0])
def test_a_failure_is_when_it_was_by_the_clock_of_the_log(tmp_path: Path, ahead_s: float) -> None:
    """Its node says when it was, by its own clock: what passed until it was known is no work that was lost."""
    stage = Stage(tmp_path)
    stage.start()
    stage.gang.say("agent_up", "b", incarnation="1", ahead_s=ahead_s, within_s=0.01)
    stage.turn()
    was = stage.clock.time() + ahead_s
    stage.clock.now += 2.0
    data = {"rank": 2, "attempt": 1, "pid": 102, "code": 1, "signal": 0, "requested": False, "log_tail": ""}
    stage.gang.queue.append(Observation(kind="exit", node="b", time=was, data={**data, "time": was}))
    stage.turn()
    (event,) = [event for event in stage.store.events() if event.kind is EventKind.FAILURE_DETECTED]
    assert event.data["failed_at"] == pytest.approx(was - ahead_s)


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

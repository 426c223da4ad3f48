"""When the controller's side of the agents hands out what it has heard, on a clock of its own."""

from __future__ import annotations

import math
import selectors
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from launcher.backend import AgentAddress
from launcher.gang import TOGETHER_S, Gang, Link
from launcher.hang_watch import HangWatch
from launcher.host import wire
from launcher.host.wire import Stream
from launcher.observation import Observation
from tests.support.jobspecs import GPT, make_plan


class Script(selectors.DefaultSelector):
    """Time passes only while somebody waits here, and an agent says everything at its time; at last it hangs up."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.said: list[tuple[float, dict[str, Any]]] = []
        self.agent, self.ours = socket.socketpair()

    def clock(self) -> float:
        return self.now

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "it would wait for ever"
        at = self.said[0][0] if self.said else math.inf
        self.now = min(self.now + timeout, max(self.now, at))
        while self.said and self.said[0][0] <= self.now:
            event = self.said.pop(0)[1]
            if event:
                self.agent.sendall(wire.encode({"op": "event", "event": event}))
            else:
                self.agent.shutdown(socket.SHUT_WR)
        return super().select(0)


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()
    yield made
    made.agent.close()


@pytest.fixture
def gang(script: Script) -> Iterator[Gang]:
    made = Gang(b"secret", 1, script.clock, wall=script.clock, selector=script, lease_s=60.0)
    address = AgentAddress(node="a", host="127.0.0.1", port=1, pid=1, slots=4, incarnation="1")
    link = made.links["a"] = Link(address, Stream(script.ours), up=True, greeted=True)
    made._silence.add(link)
    script.register(script.ours, selectors.EVENT_READ, link)
    yield made
    made.close()


def step(rank: int, next_: str = "step") -> dict[str, Any]:
    return {"kind": "step", "rank": rank, "step": 7, "next": next_, "attempt": 1}


def test_what_ranks_tell_of_a_step_is_looked_at_together(gang: Gang, script: Script) -> None:
    script.said = [(100.02, step(0)), (100.05, step(1)), (100.06, step(2)), (100.1, step(3))]
    heard = gang.poll(0.2)
    assert [seen.data["rank"] for seen in heard] == [0, 1, 2]
    assert [seen.heard for seen in heard] == pytest.approx([100.02, 100.05, 100.06]), "each has its own time"
    assert script.now == pytest.approx(100.02 + TOGETHER_S)
    assert [seen.data["rank"] for seen in gang.poll(0.2)] == [3]
    assert script.now == pytest.approx(100.1 + TOGETHER_S), "the last one waits as long"


@pytest.mark.parametrize(
    "urgent",
    [step(1, "save"), step(1, "finish"), {"kind": "exit", "rank": 1, "attempt": 1}, {"kind": "training", "rank": 1}],
)
def test_all_else_is_looked_at_at_once(gang: Gang, script: Script, urgent: dict[str, Any]) -> None:
    script.said = [(100.02, step(0)), (100.03, urgent), (100.04, step(2))]
    assert [seen.data["rank"] for seen in gang.poll(0.2)] == [0, 1]
    assert script.now == pytest.approx(100.03)


def test_nothing_waits_longer_than_it_was_told_to(gang: Gang, script: Script) -> None:
    script.said = [(100.19, step(0)), (100.22, step(1))]
    assert [seen.data["rank"] for seen in gang.poll(0.2)] == [0]
    assert script.now == pytest.approx(100.2)
    script.said = [(100.2, step(1)), (100.21, step(2))]
    assert [seen.data["rank"] for seen in gang.poll(0.0)] == [1], "what is there already"
    assert gang.poll(0.0) == []


def test_a_connection_that_ends_is_seen_at_once(gang: Gang, script: Script) -> None:
    script.said = [(100.02, step(0)), (100.03, {})]
    assert [seen.kind for seen in gang.poll(0.2)] == ["report", "agent_lost"]
    assert script.now == pytest.approx(100.03)


@pytest.fixture
def second(gang: Gang, script: Script) -> Iterator[socket.socket]:
    """Another agent, which says nothing by itself."""
    theirs, ours = socket.socketpair()
    address = AgentAddress(node="b", host="127.0.0.1", port=1, pid=1, slots=4, incarnation="2")
    link = gang.links["b"] = Link(address, Stream(ours), up=True, greeted=True)
    gang._silence.add(link)
    script.register(ours, selectors.EVENT_READ, link)
    yield theirs
    theirs.close()


def listen(gang: Gang, script: Script, seconds: int) -> list[Observation]:
    """Agent a speaks every second."""
    script.said = [(script.now + at, step(0)) for at in range(1, seconds + 1)]
    return [seen for _ in range(seconds) for seen in gang.poll(1.0)]


def test_when_nobody_is_heard_that_is_said_once_and_nobody_is_lost(
    gang: Gang, script: Script, second: socket.socket
) -> None:
    assert [(seen.kind, seen.node) for seen in gang.poll(20.0)] == [("cut_off", "")]
    assert script.now == pytest.approx(100.0 + 4.0, abs=1.3)
    told = [gang.in_doubt]
    assert gang.poll(30.0) == []
    script.said = [(script.now + 1.0, step(0))]
    assert [seen.kind for seen in gang.poll(2.0)] == ["report"]
    assert sorted(gang.links) == ["a", "b"]
    told.append(gang.in_doubt)  # b may be heard later
    lost = [seen.node for seen in listen(gang, script, 50) if seen.kind == "agent_lost"]
    assert (lost, [*told, gang.in_doubt]) == (["b"], [True, True, False]), "not for ever"


def test_while_one_is_heard_the_other_is_lost(gang: Gang, script: Script, second: socket.socket) -> None:
    script.said = [(100.0 + tick, step(0)) for tick in range(1, 8)]
    kinds = [seen.kind for _ in range(7) for seen in gang.poll(1.0)]
    assert kinds.count("agent_lost") == 1
    assert "cut_off" not in kinds
    assert list(gang.links) == ["a"]


def test_a_controller_that_is_cut_off_takes_no_rank_for_hanging(
    gang: Gang, script: Script, second: socket.socket
) -> None:
    watch, now = HangWatch(first_s=10.0, save_s=60.0), 0.0
    watch.begin(make_plan(GPT, 1), now)
    assert [seen.kind for seen in gang.poll(20.0) + gang.poll(20.0)] == ["cut_off"]
    for _ in range(200):
        now += 0.2
        assert watch.look(gang, 1, 1, now=now, wall=now) is None
    assert second.recv(1 << 16, socket.MSG_DONTWAIT).count(b"dump") == 0
    listen(gang, script, 3)
    assert watch.look(gang, 1, 1, now=now + 9.5, wall=now) is None
    assert b"dump" not in script.agent.recv(1 << 16, socket.MSG_DONTWAIT), "the other may come back later"
    listen(gang, script, 50)
    watch.look(gang, 1, 1, now=now + 19.5, wall=now)
    assert b"dump" in script.agent.recv(1 << 16, socket.MSG_DONTWAIT), "what comes after that counts"

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
from launcher.host import wire
from launcher.host.wire import Stream


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
    made = Gang(b"secret", 1, script.clock, wall=script.clock, selector=script)
    address = AgentAddress(node="a", host="127.0.0.1", port=1, pid=1, slots=4, incarnation="1")
    link = made.links["a"] = Link(address, Stream(script.ours), up=True, greeted=True)
    made._quiet[link] = None
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

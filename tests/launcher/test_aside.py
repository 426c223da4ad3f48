"""The thread between the controller and a cluster: what hangs there holds nobody up here."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from launcher.aside import Aside
from launcher.backend import AgentAddress, NodeInfo
from strategies.errors import ClusterError

AGENTS = [
    AgentAddress(node=name, host="h", port=1, pid=1, slots=2, incarnation=f"inc-{name}") for name in ("a", "b", "c")
]


class Cluster:
    """A cluster whose head can go away: calls then hang, or fail."""

    def __init__(self) -> None:
        self.well = threading.Event()
        self.well.set()
        self.error: Exception | None = None
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.there = list(AGENTS)

    def _called(self, what: str) -> None:
        self.threads.add(threading.current_thread().name)
        assert self.well.wait(30.0)
        self.calls.append(what)
        if self.error is not None:
            raise self.error

    def nodes(self) -> list[NodeInfo]:
        self._called("nodes")
        return [NodeInfo(node=agent.node, address="h", slots=2) for agent in self.there]

    def request_agents(self, count: int) -> None:
        self._called(f"request {count}")

    def agents(self) -> list[AgentAddress]:
        self._called("agents")
        return list(self.there)

    def forget(self, agent: AgentAddress) -> None:
        self._called(f"forget {agent.node}")
        self.there.remove(agent)

    def why_missing(self) -> str:
        self._called("why")
        return "too small"

    def release(self) -> None:
        self._called("release")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def aside(cluster: Cluster) -> Iterator[Aside]:
    made = Aside(cluster, answer_s=0.2, first_s=0.5, patience_s=1.0)
    yield made
    cluster.well.set()
    made.close()


def test_a_cluster_that_is_well_answers_at_once_and_in_order(cluster: Cluster, aside: Aside) -> None:
    aside.request_agents(3)
    assert aside.agents() == AGENTS
    assert [node.node for node in aside.nodes()] == ["a", "b", "c"]
    assert aside.why_missing() == "too small"
    aside.forget(AGENTS[1])
    assert aside.agents() == [AGENTS[0], AGENTS[2]]
    aside.release()
    assert cluster.calls == ["request 3", "agents", "nodes", "why", "forget b", "agents", "release"]
    assert cluster.threads == {"phalanx-cluster"}


def test_a_head_that_is_gone_keeps_nobody_waiting(cluster: Cluster, aside: Aside) -> None:
    assert len(aside.agents()) == 3
    cluster.well.clear()
    began = time.monotonic()
    aside.forget(AGENTS[0])
    for _ in range(50):
        aside.request_agents(3)
        assert aside.agents() == AGENTS[1:]  # what is known: without the one that was forgotten
    assert time.monotonic() - began < 5.0  # fifty hanging calls of either kind
    assert cluster.calls == ["agents"]
    time.sleep(0.6)
    assert "has not answered for" in aside.why_missing()
    cluster.well.set()
    deadline = time.monotonic() + 10
    while "forget a" not in cluster.calls and time.monotonic() < deadline:
        time.sleep(0.01)
    aside.agents()
    assert cluster.calls[:4] == ["agents", "forget a", "request 3", "agents"]  # once each, in order
    assert aside.why_missing() == "too small"


def test_a_cluster_that_has_never_answered_is_an_error(cluster: Cluster, aside: Aside) -> None:
    cluster.well.clear()
    with pytest.raises(ClusterError, match="does not answer"):
        aside.agents()


def test_an_error_is_raised_at_once_only_where_nothing_is_known(cluster: Cluster, aside: Aside) -> None:
    cluster.error = ClusterError("It refuses us.")
    with pytest.raises(ClusterError, match="refuses us"):
        aside.agents()
    cluster.error = None
    assert aside.agents() == AGENTS
    cluster.error = ClusterError("The head was started again.")
    assert aside.agents() == AGENTS
    cluster.error = None
    assert aside.agents() == AGENTS
    time.sleep(1.1)  # nobody asks for longer than its patience: that is no illness
    cluster.error = ClusterError("Gone.")
    assert aside.agents() == AGENTS
    time.sleep(1.1)
    with pytest.raises(ClusterError, match="Gone"):
        aside.agents()


def test_release_waits_and_says_what_went_wrong(cluster: Cluster, aside: Aside) -> None:
    cluster.error = ClusterError("No.")
    with pytest.raises(ClusterError, match="No"):
        aside.release()
    cluster.error = None
    aside.release()


def test_release_does_not_wait_for_a_head_that_is_gone(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    aside = Aside(cluster, release_s=0.1)
    cluster.well.clear()
    aside.release()
    assert "was not given back" in capsys.readouterr().out
    cluster.well.set()
    aside.close()

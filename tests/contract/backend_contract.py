"""What every backend must do, in one suite: a test module subclasses :class:`BackendContract` and gives it a site."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from jobs.paths import RunPaths
from launcher.backend import AgentAddress, Backend
from launcher.host import announce, process
from tests.support.agents import Watcher


@dataclass(kw_only=True)
class Site:
    """A cluster under test. Its ranks are those of ``tests.support.fakejob``.

    Attributes:
        paths: The run directory; the run's secret is there, or the backend makes it.
        nodes: Nodes that can have an agent, the spares included; at least 3.
        slots: Devices per node.
        connect: Makes a backend as a new controller of the run would.
        kill_node: SIGKILL of everything on the node of an agent, or of the agent where that is the same.
        patience_s: Longest wait for an agent to come or go.
    """

    paths: RunPaths
    nodes: int
    slots: int
    connect: Callable[[], Backend]
    kill_node: Callable[[AgentAddress], None]
    patience_s: float = 30.0


class BackendContract:
    """Inherited by the test class of each backend, which provides the fixture ``site``."""

    @pytest.fixture
    def site(self) -> Site:
        """The cluster under test."""
        raise NotImplementedError

    @contextmanager
    def backend(self, site: Site) -> Iterator[Backend]:
        """A backend that is released at the end, with the proof that nothing is left."""
        backend = site.connect()
        words: set[str] = set()
        try:
            yield backend
            words = {agent.incarnation for agent in announce.read_all(site.paths)}
        finally:
            backend.release()
            backend.close()
        assert not [pid for word in words for pid in process.marked(f"{word}.")]
        assert announce.read_all(site.paths) == []

    def wait_for_agents(self, site: Site, backend: Backend, count: int) -> list[AgentAddress]:
        """Wait until exactly ``count`` agents are there."""
        assert process.wait_until(lambda: len(backend.agents()) == count, site.patience_s), backend.why_missing()
        return backend.agents()

    @contextmanager
    def watch(self, site: Site, agents: list[AgentAddress], epoch: int = 1) -> Iterator[Watcher]:
        """A gang that is connected to ``agents``."""
        watcher = Watcher(site.paths, epoch)
        try:
            watcher.gang.connect(agents)
            for agent in agents:
                watcher.until(lambda o, node=agent.node: o.kind == "agent_up" and o.node == node)  # type: ignore[misc]
            yield watcher
        finally:
            watcher.gang.close()

    def test_nodes_are_known_before_anything_is_asked_for(self, site: Site) -> None:
        with self.backend(site) as backend:
            usable = [node for node in backend.nodes() if node.alive and node.slots >= site.slots]
            assert len(usable) == site.nodes
            assert len({node.node for node in usable}) == site.nodes
            assert all(node.address for node in usable)
            assert backend.agents() == []

    def test_request_agents_is_idempotent_and_tops_up(self, site: Site) -> None:
        with self.backend(site) as backend:
            for _ in range(3):
                backend.request_agents(2)
            first = self.wait_for_agents(site, backend, 2)
            backend.request_agents(2)
            backend.request_agents(1)
            assert {a.incarnation for a in backend.agents()} == {a.incarnation for a in first}
            backend.request_agents(3)
            all_three = self.wait_for_agents(site, backend, 3)
            assert {a.incarnation for a in first} < {a.incarnation for a in all_three}
            assert len({a.node for a in all_three}) == 3
            assert {a.node for a in all_three} <= {node.node for node in backend.nodes()}
            assert {a.slots for a in all_three} == {site.slots}

    def test_ranks_run_below_the_agent_of_their_node(self, site: Site) -> None:
        with self.backend(site) as backend:
            backend.request_agents(2)
            agents = self.wait_for_agents(site, backend, 2)
            with self.watch(site, agents) as watcher:
                placement = {agent.node: [2 * index, 2 * index + 1] for index, agent in enumerate(agents)}
                pids = watcher.spawn(1, placement, FAKE="step=1,wait")
                for agent in agents:
                    for rank in placement[agent.node]:
                        assert agent.pid in ancestors(pids[rank])

    def test_agents_and_ranks_outlive_the_controller_and_are_found_again(self, site: Site) -> None:
        first = site.connect()
        first.request_agents(2)
        agents = self.wait_for_agents(site, first, 2)
        with self.watch(site, agents) as watcher:
            placement = {agent.node: [index] for index, agent in enumerate(agents)}
            pids = watcher.spawn(1, placement, FAKE="step=1,wait")
        first.close()
        with self.backend(site) as second:
            found = self.wait_for_agents(site, second, 2)
            assert {a.incarnation for a in found} == {a.incarnation for a in agents}
            second.request_agents(2)
            with self.watch(site, found, epoch=2) as adopter:
                assert adopter.pids(1, placement) == pids
                assert len(second.agents()) == 2

    def test_a_lost_node_is_noticed_and_replaced_by_another(self, site: Site) -> None:
        with self.backend(site) as backend:
            backend.request_agents(2)
            agents = self.wait_for_agents(site, backend, 2)
            with self.watch(site, agents) as watcher:
                pids = watcher.spawn(1, {agents[0].node: [0], agents[1].node: [1]}, FAKE="step=1,wait")
                site.kill_node(agents[0])
                watcher.until_kind("agent_lost")
                backend.forget(agents[0])
                assert agents[0].incarnation not in {a.incarnation for a in backend.agents()}
                assert process.wait_until(lambda: not process.is_running(pids[0]), site.patience_s)
                assert process.is_running(pids[1])
                backend.request_agents(2)
                after = self.wait_for_agents(site, backend, 2)
                assert agents[1].incarnation in {a.incarnation for a in after}
                assert agents[0].node not in {a.node for a in after}

    def test_forget_ends_an_agent_that_still_lives(self, site: Site) -> None:
        with self.backend(site) as backend:
            backend.request_agents(2)
            agents = self.wait_for_agents(site, backend, 2)
            with self.watch(site, agents) as watcher:
                pids = watcher.spawn(1, {agents[0].node: [0]}, FAKE="step=1,wait")
            backend.forget(agents[0])
            assert process.wait_until(lambda: not process.is_running(pids[0]), site.patience_s)
            assert agents[0].incarnation not in {a.incarnation for a in backend.agents()}

    def test_what_cannot_be_had_is_explained(self, site: Site) -> None:
        with self.backend(site) as backend:
            backend.request_agents(site.nodes + 2)
            self.wait_for_agents(site, backend, site.nodes)
            why = backend.why_missing()
            assert str(site.nodes + 2) in why
            assert "\n" not in why

    def test_release_leaves_nothing_and_can_be_repeated(self, site: Site) -> None:
        with self.backend(site) as backend:
            backend.request_agents(2)
            agents = self.wait_for_agents(site, backend, 2)
            with self.watch(site, agents) as watcher:
                pids = watcher.spawn(1, {agents[0].node: [0, 1]}, FAKE="stubborn,daemon,step=1,wait")
            backend.release()
            assert not any(process.is_running(pid) for pid in pids.values())
            assert not [pid for agent in agents for pid in process.marked(f"{agent.incarnation}.")]
            assert backend.agents() == []
            backend.release()

    def test_release_while_agents_are_starting_leaves_nothing(self, site: Site) -> None:
        with self.backend(site) as backend:
            backend.request_agents(2)
            backend.release()
            assert not process.wait_until(lambda: bool(backend.agents()), 2.0)


def ancestors(pid: int) -> set[int]:
    """Process ids of the parents of ``pid``, up to the first process."""
    found: set[int] = set()
    while pid > 1:
        pid = process.parent_and_session(pid)[0]
        found.add(pid)
    return found

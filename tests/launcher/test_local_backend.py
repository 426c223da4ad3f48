"""The contract of backends, for processes on this machine; and what is special about them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.paths import RunPaths
from launcher import sites
from launcher.backend import AgentAddress
from launcher.host import announce, process
from launcher.host.agent import AgentOptions
from launcher.local_backend import LocalBackend
from strategies.specs import ClusterSpec
from tests.contract.backend_contract import BackendContract, Site
from tests.support.agents import FAKE

pytestmark = pytest.mark.timeout(90)
CLUSTER = ClusterSpec(name="test", kind="process", nodes=2, slots_per_node=2, spares=1)


def options(root: Path) -> AgentOptions:
    """Agents with fake ranks whose logs lie below ``root``."""
    return AgentOptions(warm=f"{FAKE}:warm", target=f"{FAKE}:main", log_parent=str(root), grace_s=0.5)


def kill(agent: AgentAddress) -> None:
    """SIGKILL of the agent alone; the rest of its node must go by itself."""
    process.send(agent.pid, signal.SIGKILL)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run directory."""
    found = RunPaths(tmp_path / "run")
    found.root.mkdir()
    return found


class TestLocalBackend(BackendContract):
    """The contract."""

    @pytest.fixture
    def site(self, paths: RunPaths, tmp_path: Path) -> Site:
        return Site(
            paths=paths,
            nodes=3,
            slots=2,
            connect=lambda: LocalBackend(paths, CLUSTER, options=options(tmp_path)),
            kill_node=kill,
        )

    def test_a_lost_node_comes_back_only_if_told_so(self, site: Site, tmp_path: Path) -> None:
        with self.backend(site) as backend:
            backend.request_agents(3)
            agents = self.wait_for_agents(site, backend, 3)
            kill(agents[1])
            self.wait_for_agents(site, backend, 2)
            backend.request_agents(3)
            assert [node.alive for node in backend.nodes()] == [True, False, True]
            assert "node1 was lost" in backend.why_missing()
            assert not process.wait_until(lambda: len(backend.agents()) > 2, 1.0)
            kinder = LocalBackend(site.paths, CLUSTER, options=options(tmp_path), replace_lost=True)
            kinder.request_agents(3)
            self.wait_for_agents(site, kinder, 3)
            kill(kinder.agents()[1])
            self.wait_for_agents(site, kinder, 2)
            kinder.request_agents(3)
            self.wait_for_agents(site, kinder, 3)
            kinder.release()

    def test_a_node_elsewhere_is_entered_and_cannot_be_killed_from_here(self, site: Site) -> None:
        """A rehearsal's node in a namespace: what is cut off lives on, until all is given back."""
        sites.write(site.paths, {"node1": sites.Site(address="127.0.0.2", enter=("env", "PHALANX_ELSEWHERE=1"))})
        with self.backend(site) as backend:
            backend.request_agents(2)
            here, there = self.wait_for_agents(site, backend, 2)
            assert [node.address for node in backend.nodes()] == ["127.0.0.1", "127.0.0.2", "127.0.0.1"]
            assert (here.host, there.host) == ("127.0.0.1", "127.0.0.2")
            assert process.environment(there.pid)["PHALANX_ELSEWHERE"] == "1"
            for agent in (here, there):
                backend.forget(agent)
            assert backend.agents() == []
            assert (process.is_running(here.pid), process.is_running(there.pid)) == (False, True)
        assert not process.is_running(there.pid)

    def test_agents_survive_kill_9_of_the_process_that_started_them(self, site: Site, tmp_path: Path) -> None:
        code = (
            "import sys, time\n"
            "from tests.launcher.test_local_backend import *\n"
            "paths = RunPaths(sys.argv[1])\n"
            "backend = LocalBackend(paths, CLUSTER, options=options(Path(sys.argv[2])))\n"
            "backend.request_agents(2)\n"
            "while len(backend.agents()) < 2: time.sleep(0.05)\n"
            "print('ready', flush=True)\n"
            "time.sleep(60)\n"
        )
        command = [sys.executable, "-c", code, str(site.paths.root), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as controller:
            assert controller.stdout is not None
            assert controller.stdout.readline() == b"ready\n"
            controller.kill()
        with self.backend(site) as backend, self.watch(site, self.wait_for_agents(site, backend, 2)) as watcher:
            assert len(watcher.gang.links) == 2

    def test_a_stale_announcement_is_no_agent(self, site: Site) -> None:
        """Its process id belongs to somebody else by now."""
        with subprocess.Popen(["sleep", "60"]) as other:
            stale = AgentAddress(node="node0", host="127.0.0.1", port=1, pid=other.pid, slots=2, incarnation="word")
            announce.write(site.paths, stale)
            with self.backend(site) as backend:
                assert backend.agents() == []
                backend.request_agents(1)
                assert self.wait_for_agents(site, backend, 1)[0].node == "node0"
            assert other.poll() is None, "release must not touch what is not ours"
            other.kill()

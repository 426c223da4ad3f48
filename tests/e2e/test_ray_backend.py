"""The contract of backends on a real Ray cluster of several nodes, embedded in this machine."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.paths import RunPaths
from launcher.backend import AgentAddress, Backend
from launcher.embedded import EmbeddedCluster, members
from launcher.host import process
from launcher.ray_backend import RayBackend
from launcher.ray_placement import run_key
from strategies.errors import ClusterError
from strategies.specs import ClusterSpec
from tests.contract.backend_contract import BackendContract, Site, ancestors
from tests.support.agents import FAKE, Watcher

pytestmark = pytest.mark.timeout(180)
CLUSTER = ClusterSpec(name="test", kind="local", nodes=2, slots_per_node=2, spares=2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedCluster]:
    """Four nodes of two slots; tests may kill one of them."""
    started = EmbeddedCluster.start(tmp_path_factory.mktemp("ray"), nodes=4, slots_per_node=2, keep_s=1200.0)
    try:
        yield started
    finally:
        started.stop()
        assert started.processes() == set()


@pytest.fixture
def paths(cluster: EmbeddedCluster, tmp_path: Path) -> RunPaths:
    """The directory of a run on the shared cluster."""
    found = RunPaths(tmp_path / "run")
    found.root.mkdir()
    shutil.copy(RunPaths(cluster.run_dir).cluster, found.cluster)
    found.secret.write_text("5" * 64)
    return found


def connect(paths: RunPaths, root: Path, spec: ClusterSpec = CLUSTER) -> Backend:
    """A backend whose agents start fake ranks."""
    options = {"warm": f"{FAKE}:warm", "target": f"{FAKE}:main", "log_parent": str(root), "grace_s": 0.5}
    return RayBackend(paths.root, spec, agent_options=options)


def nodes_up(cluster: EmbeddedCluster) -> list[int]:
    """Indices of the nodes with slots that were not killed."""
    return [
        int(node["index"])
        for node in cluster.record()["nodes"]
        if node["index"] != "head" and process.is_running(node["pid"])
    ]


def index_of(cluster: EmbeddedCluster, agent: AgentAddress) -> int:
    """The embedded node on which an agent runs."""
    marks = {node["index"]: node["marker"] for node in cluster.record()["nodes"]}
    return next(index for index in nodes_up(cluster) if agent.pid in members(marks[index]))


def groups(paths: RunPaths) -> list[dict[str, Any]]:
    """What Ray tells of the placement groups of a run."""
    from ray.util.placement_group import placement_group_table

    mine = [table for table in placement_group_table().values() if f"-{run_key(paths.root)}-" in table["name"]]
    return [table for table in mine if table["state"] != "REMOVED"]


class TestRayBackend(BackendContract):
    """The contract, and what is special about Ray."""

    @pytest.fixture
    def site(self, cluster: EmbeddedCluster, paths: RunPaths, tmp_path: Path) -> Site:
        def kill_node(agent: AgentAddress) -> None:
            cluster.kill_node(index_of(cluster, agent))

        return Site(
            paths=paths,
            nodes=len(nodes_up(cluster)),
            slots=2,
            connect=lambda: connect(paths, tmp_path),
            kill_node=kill_node,
            patience_s=60.0,
        )

    def test_agents_are_where_the_placement_group_put_them(self, site: Site, cluster: EmbeddedCluster) -> None:
        """From each rank up to an agent, from the agent up to the raylet of the node of its bundle."""
        import ray

        with self.backend(site) as backend:
            backend.request_agents(2)
            agents = self.wait_for_agents(site, backend, 2)
            (table,) = groups(site.paths)
            assert table["strategy"] == "STRICT_SPREAD"
            assert all(bundle == {"CPU": 2.0} for bundle in table["bundles"].values())
            assert set(table["bundles_to_node_id"].values()) == {agent.node for agent in agents}
            named = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
            with self.watch(site, agents) as watcher:
                placement = {agent.node: [2 * i, 2 * i + 1] for i, agent in enumerate(agents)}
                pids = watcher.spawn(1, placement, FAKE="step=1,wait")
                for agent in agents:
                    index = index_of(cluster, agent)
                    assert named[agent.node] == f"phalanx-{index}"
                    root = next(n["pid"] for n in cluster.record()["nodes"] if n["index"] == index)
                    for rank in placement[agent.node]:
                        assert {agent.pid, root} <= ancestors(pids[rank])

    def test_nodes_are_whole(self, site: Site, tmp_path: Path, cluster: EmbeddedCluster) -> None:
        """A second run gets none of the first one's nodes, although it asks for one slot only, and is told why."""
        other = RunPaths(tmp_path / "other")
        shutil.copytree(site.paths.root, other.root)
        with self.backend(site) as backend:
            backend.request_agents(site.nodes)
            self.wait_for_agents(site, backend, site.nodes)
            spec = ClusterSpec(name="other", kind="local", nodes=2, slots_per_node=1)
            second = connect(other, tmp_path, spec)
            second.request_agents(2)
            time.sleep(4.0)
            second.request_agents(2)
            assert second.agents() == []
            assert second.why_missing() == (
                "the cluster has 0 nodes with >= 1 free CPUs for this run "
                f"({site.nodes} of that size are up), the run asks for 2"
            )
            try:
                backend.release()  # the second one comes off the queue, onto whole nodes
                assert process.wait_until(lambda: len(second.agents()) == 2, 60.0), second.why_missing()
                (table,) = groups(other)
                assert table["bundles"] == {0: {"CPU": 2.0}, 1: {"CPU": 2.0}}
                assert set(table["bundles_to_node_id"].values()) == {agent.node for agent in second.agents()}
            finally:
                second.release()

    def test_folders_where_the_user_stands_shadow_nothing(
        self, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ray puts the driver's folder on the import path of its workers, before everything else."""
        for name in ("jobs", "launcher", "strategies", "conf"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise ImportError('shadowed')")
        monkeypatch.chdir(tmp_path)
        with self.backend(site) as backend:
            assert Path.cwd() == tmp_path
            backend.request_agents(1)
            self.wait_for_agents(site, backend, 1)

    def test_no_port_is_open_to_the_network(self, cluster: EmbeddedCluster) -> None:
        import psutil

        ours = cluster.processes()
        listening = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in ours]
        assert len(listening) > 10
        assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}

    def test_wrong_token_is_refused(self, cluster: EmbeddedCluster, paths: RunPaths, tmp_path: Path) -> None:
        wrong = tmp_path / "token"
        wrong.write_text("0" * 64)
        record = paths.cluster.read_text().replace(str(cluster.token_path), str(wrong))
        paths.cluster.write_text(record)
        with pytest.raises(ClusterError, match="authentication failed") as refused:
            connect(paths, tmp_path)
        assert "RAY_AUTH_TOKEN" in refused.value.hint


def test_the_head_does_not_look_for_a_lost_node_without_a_pause(tmp_path: Path) -> None:
    """Nothing is free to take its place: Ray would try as fast as it can, with a whole processor of the head."""
    import ray

    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    paths.secret.write_text("5" * 64)
    cluster = EmbeddedCluster.start(paths.root, nodes=3, slots_per_node=1)
    backend = connect(paths, tmp_path, ClusterSpec(name="test", kind="local", nodes=2, slots_per_node=1, spares=1))
    try:
        backend.request_agents(3)
        assert process.wait_until(lambda: len(backend.agents()) == 3, 60.0), backend.why_missing()
        (gang,) = [table for table in groups(paths) if len(table["bundles"]) == 2]
        lost = next(agent for agent in backend.agents() if agent.node in gang["bundles_to_node_id"].values())
        cluster.kill_node(index_of(cluster, lost))
        backend.forget(lost)
        assert process.wait_until(lambda: lost.node not in {n["NodeID"] for n in ray.nodes() if n["Alive"]}, 60.0)
        for _ in range(4):
            time.sleep(0.5)
            backend.request_agents(3)
        after = {table["placement_group_id"]: table for table in groups(paths)}
        assert after[gang["placement_group_id"]]["state"] == "RESCHEDULING"
        assert max(table["stats"]["scheduling_attempt"] for table in after.values()) < 20
        assert len(backend.agents()) == 2
    finally:
        backend.release()
        backend.close()
        cluster.stop()


def test_kill_9_of_the_keeper_ends_everything(tmp_path: Path) -> None:
    """Ray's helpers, the agent, its pool and its ranks: all of it goes, and no other cluster is touched."""
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    paths.secret.write_text("5" * 64)
    cluster = EmbeddedCluster.start(paths.root, nodes=1, slots_per_node=2)
    try:
        backend = connect(paths, tmp_path)
        backend.request_agents(1)
        assert process.wait_until(lambda: len(backend.agents()) == 1, 60.0), backend.why_missing()
        (agent,) = backend.agents()
        watcher = Watcher(paths, 1)
        watcher.gang.connect([agent])
        watcher.until_kind("agent_up")
        pids = watcher.spawn(1, {agent.node: [0, 1]}, FAKE="stubborn,step=1,wait")
        watcher.gang.close()
        backend.close()
        before = cluster.processes()
        assert {agent.pid, *pids.values()} <= before
        os.kill(cluster.record()["keeper"]["pid"], signal.SIGKILL)
        assert process.wait_until(lambda: all(is_helper(pid) for pid in before if process.is_running(pid)), 20.0)
        new = {pid: process.command_line(pid) for pid in cluster.processes() - before}
        assert not new, "helpers may try for a minute to report to the head, but nothing is new"
    finally:
        cluster.stop()
    assert not any(process.is_running(pid) for pid in before)
    assert cluster.processes() == set()
    assert not Path(cluster.record()["temp_dir"]).exists()


def is_helper(pid: int) -> bool:
    """Whether a process is one of the two that Ray starts beside each raylet, which end by themselves."""
    return " ".join(process.command_line(pid)).startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))

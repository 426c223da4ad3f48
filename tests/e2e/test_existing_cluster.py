"""A Ray cluster that phalanx did not start: three machines with addresses of their own, made of network namespaces.

The test's own process is a fourth machine of that network, and no node of the cluster.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from jobs.paths import RunPaths
from jobs.spec import DataSpec, SourceSpec
from launcher import ray_client, supervise
from launcher.host import process
from launcher.launch import create
from launcher.ray_map import OnRay
from launcher.run import EventKind, RunState
from launcher.ship import survey
from launcher.store import RunStore, read_json
from strategies.errors import ClusterError, ConfigError, ResumeRefused, StorageError
from strategies.specs import ClusterSpec
from tests.contract.backend_contract import ancestors
from tests.support import netns
from tests.support.agents import FAKE, Watcher
from tests.support.runs import configuration

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not netns.available(), reason="needs root and ip netns"),
]
TOKEN, WRONG = "ab" * 32, "cd" * 32
SCRIPT = """
import os, sys, time
steps, pause = int(sys.argv[1]), float(sys.argv[2])
start = int(os.path.basename(os.environ["PHALANX_RESUME_FROM"]) or 0) if os.environ["PHALANX_RESUME_FROM"] else 0
for step in range(start + 1, steps + 1):
    time.sleep(pause)
    folder = os.path.join(os.environ["PHALANX_CKPT_DIR"], str(step))
    if os.environ["RANK"] == "0":
        os.makedirs(folder, exist_ok=True)
        open(os.path.join(folder, "COMMIT"), "w").close()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[netns.RayCluster]:
    """Three nodes of two CPUs that ask for a token, a dashboard on the head, and a machine that has not joined yet."""
    with netns.network(4) as net:
        made = netns.RayCluster(net, token=TOKEN, dashboard=True)
        try:
            made.start(nodes=3)
            yield made
        finally:
            made.close()
    assert not [line for line in netns.listing() if net.name in line]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user knows the cluster's token, by the environment alone."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


def make_run(
    cluster: netns.RayCluster, folder: Path, *arguments: object, address: str = "", size: tuple[int, int] = (3, 0)
) -> RunStore:
    """The run directory of a script job on the cluster, as submit makes it; ``size`` is nodes and spares."""
    project = folder / "project"
    project.mkdir()
    (project / "train.py").write_text(SCRIPT)
    command = shlex.join([sys.executable, "train.py", *map(str, arguments)])
    words = ["job=script", f"job.command='{command}'", f"job.workdir={project}", "tracking=none"]
    words += ["cluster=existing", f"cluster.address='{address or cluster.address}'"]
    words += [
        f"cluster.nodes={size[0]}",
        f"cluster.spares={size[1]}",
        "cluster.slots_per_node=2",
        "recovery.lease_s=30",
    ]
    from launcher import build

    config = configuration(folder / "runs", "run", words)
    return create(build.build_request(config, words), config, survey(project, limit_mb=1))


def wait(condition: Callable[[], bool], patience_s: float, store: RunStore) -> None:
    """Wait for something to become true of a run."""
    assert process.wait_until(condition, patience_s), [f"{event.kind} {dict(event.data)}" for event in store.events()]


def ours(cluster: netns.RayCluster, nodes: int = 3) -> list[int]:
    """Processes of ours on the nodes."""
    pids = [pid for index in range(nodes) for pid in cluster.net.pids(index)]
    return [
        pid
        for pid in pids
        if "Actor" in " ".join(process.command_line(pid)) or process.environment(pid).get("PHALANX_HOST")
    ]


def words_of(pid: int) -> list[str]:
    """What a process was started with, options of Ray's helpers in one spelling."""
    return [word.replace("node_ip_address", "node-ip-address") for word in process.command_line(pid)]


def quiet(cluster: netns.RayCluster) -> bool:
    """Whether nothing of ours is left on any node."""
    return not ours(cluster)


def test_nodes_and_slots_are_what_ray_reports(cluster: netns.RayCluster) -> None:
    for address in (cluster.address, cluster.dashboard_url):
        found = ray_client.describe(address)
        assert sorted(node.address for node in found) == cluster.net.addresses[:3]
        assert {node.slots for node in found} == {2}
        assert ray_client.measure(address) == (3, 2)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_mixture_is_tokenized_on_the_nodes(cluster: netns.RayCluster, tmp_path: Path) -> None:
    """By processes of several nodes, into what processes here would have made."""
    from jobs.data import prepare_mixture, sources
    from jobs.data.work import Answer, Processes, Request, Runner

    class Watched(OnRay):
        nodes: ClassVar[set[int]] = set()

        def __call__(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer]]:
            for index, answer in super().__call__(requests):
                self.nodes.update(node for node in range(3) if answer["worker"] in cluster.net.pids(node))
                yield index, answer

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} words {n * n} " * 9}) + "\n" for n in range(6000)))
    data = DataSpec(kind="mixture", validation=0.1, sources=(SourceSpec(path=str(text), weight=1),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", 50_000)
        runners: dict[str, Runner] = {"there": Watched(cluster.address, tmp_path / "there"), "here": Processes(1)}
        made = {
            name: prepare_mixture(data, tmp_path / name, 300, seq=16, samples=10, runner=runner)
            for name, runner in runners.items()
        }
        damaged = Path(made["there"].sources[0].store, "00001.train.bin")
        good = damaged.read_bytes()
        damaged.write_bytes(bytes(9) + good[9:])
        again = prepare_mixture(data, tmp_path / "there", 300, seq=16, samples=10, runner=runners["there"])
        assert (again, damaged.read_bytes()) == (made["there"], good), "read on the nodes, and made anew"
    assert made["there"].digest == made["here"].digest
    assert len(Watched.nodes) >= 2, "the work is spread"
    gone = dataclasses.replace(data, sources=(SourceSpec(path=str(tmp_path / "gone"), weight=1),))
    with pytest.raises(ConfigError, match="there is no such file"):
        prepare_mixture(gone, tmp_path / "x", 300, seq=16, samples=10, runner=runners["there"])
    unit = {"kind": "jsonl", "field": "text", "parts": [{"path": str(tmp_path / "gone.jsonl")}], "size": 1}
    ((_, answer),) = runners["there"]([{"verb": "survey", "unit": unit}])
    assert "gone.jsonl: cannot be read" in answer["parts"][0]["damage"], "a file is told with all else that is wrong"
    shard = {"folder": str(tmp_path), "number": 0, "end_id": 0, "width": 2, "validation": 0.0}
    tokenizer = f"{made['here'].store}/tokenizer.json"
    with pytest.raises(StorageError, match=r"gone\.jsonl"):
        list(runners["there"]([{"verb": "tokenize", "unit": unit, "tokenizer": tokenizer} | shard]))
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    nothing = dataclasses.replace(data, sources=(SourceSpec(path=str(empty), weight=1),))
    new = tmp_path / "new" / "cache"
    with pytest.raises(ConfigError, match="no documents"):
        prepare_mixture(nothing, new, 300, seq=16, samples=10, runner=Watched(cluster.address, new))
    assert not new.parent.exists(), "what is refused when it was read leaves nothing, our code neither"
    assert not list((tmp_path / "there").glob(".*")), "nor does what was made"


@pytest.mark.parametrize("given", [WRONG, ""], ids=["wrong", "none"])
def test_a_token_that_is_not_the_clusters_is_refused(
    cluster: netns.RayCluster, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", given)
    for address in (cluster.address, cluster.dashboard_url):
        with pytest.raises(ClusterError, match="authentication failed") as refused:
            ray_client.describe(address)
        assert "RAY_AUTH_TOKEN" in refused.value.hint
        assert refused.value.exit_code == 4


def test_addresses_where_no_cluster_is_are_explained_shortly(cluster: netns.RayCluster) -> None:
    head = cluster.net.addresses[0]
    absent = f"{cluster.net.host_address.rpartition('.')[0]}.99"
    for address in (
        "nonsense",
        f"{head}:1",
        f"{absent}:6379",
        f"{head}:8265",
        f"http://{head}:1",
        f"http://{cluster.address}",
    ):
        started = time.monotonic()
        with pytest.raises(ClusterError) as failed:
            ray_client.describe(address)
        assert time.monotonic() - started < 20.0
        assert len(str(failed.value).splitlines()) <= 3
        assert address.removeprefix("http://") in failed.value.what
        assert failed.value.hint


def test_agents_and_ranks_are_where_the_placement_group_put_them(cluster: netns.RayCluster, tmp_path: Path) -> None:
    from ray.util.placement_group import placement_group_table

    from launcher.ray_backend import RayBackend

    paths = RunPaths(tmp_path / "placed")
    paths.root.mkdir()
    paths.secret.write_text("5" * 64)
    spec = ClusterSpec(name="test", kind="existing", nodes=3, slots_per_node=2, address=cluster.address)
    options = {"warm": f"{FAKE}:warm", "target": f"{FAKE}:main", "log_parent": str(tmp_path)}
    backend = RayBackend(paths.root, spec, agent_options=options)
    try:
        addresses = {node.node: node.address for node in backend.nodes()}
        assert sorted(addresses.values()) == cluster.net.addresses[:3]
        backend.request_agents(3)
        assert process.wait_until(lambda: len(backend.agents()) == 3, 60.0), backend.why_missing()
        agents = backend.agents()
        (table,) = [table for table in placement_group_table().values() if table["state"] == "CREATED"]
        assert set(table["bundles_to_node_id"].values()) == {agent.node for agent in agents}
        watcher = Watcher(paths, 1)
        watcher.gang.connect(agents)
        for agent in agents:
            watcher.until(lambda seen, node=agent.node: seen.kind == "agent_up" and seen.node == node)  # type: ignore[misc]
        placement = {agent.node: [2 * index, 2 * index + 1] for index, agent in enumerate(agents)}
        pids = watcher.spawn(1, placement, FAKE="step=1,wait")
        for agent in agents:
            assert agent.host == addresses[agent.node]
            there = cluster.net.pids(cluster.net.addresses.index(agent.host))
            assert agent.pid in there
            for rank in placement[agent.node]:
                assert pids[rank] in there
                assert agent.pid in ancestors(pids[rank])
        watcher.gang.close()
    finally:
        backend.release()
        backend.close()
    assert process.wait_until(lambda: quiet(cluster), 10.0)


def controller_is_at_the_head(cluster: netns.RayCluster, store: RunStore) -> bool:
    """Whether the first controller runs on the head's node; looks as soon as it controls."""
    record = store.paths.controllers / "1.json"
    wait(record.exists, 90.0, store)
    return bool(read_json(record)["pid"] in cluster.net.pids(0))


@pytest.mark.parametrize("by", [pytest.param("head", marks=pytest.mark.full), "dashboard"])
def test_the_client_can_go_away(cluster: netns.RayCluster, tmp_path: Path, by: str) -> None:
    """The controller is on the cluster: this process only looks at the run directory."""
    address = cluster.address if by == "head" else cluster.dashboard_url
    store = make_run(cluster, tmp_path, 3, 0.2, address=address)
    with ThreadPoolExecutor() as beside:  # a run this short may be over before its client knows that it has begun
        at_the_head = beside.submit(controller_is_at_the_head, cluster, store)
        assert ray_client.start_controller(store.paths.root, address) == 1
        assert at_the_head.result()  # one that falls with a worker is missed late
    wait(lambda: store.run().state.terminal, 90.0, store)
    assert store.run().state is RunState.SUCCEEDED
    assert store.run().step == 3
    assert len(store.run().attempts[0].nodes) == 3
    assert process.wait_until(lambda: quiet(cluster), 20.0)


def test_actors_that_need_nothing_do_not_go_to_a_clients_node(cluster: netns.RayCluster, tmp_path: Path) -> None:
    """Such a node leaves within seconds, and whoever is on it dies."""
    import ray

    from launcher import ray_backend

    with ray_backend.connected(tmp_path, cluster.address):
        labels = {node["NodeManagerAddress"]: node["Labels"] for node in ray.nodes() if node["Alive"]}
        assert {address: "phalanx-visitor" in kinds for address, kinds in labels.items()} == dict.fromkeys(
            cluster.net.addresses[:3], False
        ) | {cluster.net.host_address: True}

        class Anywhere:
            def where(self) -> str:
                return str(ray.util.get_node_ip_address())

        actors = [ray.remote(Anywhere).options(**ray_backend.STEADY).remote() for _ in range(6)]
        where = ray.get([actor.where.remote() for actor in actors], timeout=60.0)
        assert set(where) <= set(cluster.net.addresses[:3])
        for actor in actors:
            ray_backend.kill(actor)


def wait_adopted(store: RunStore, times: int) -> None:
    """Wait until so many controllers have adopted the gang."""

    def adopted() -> bool:
        started = [event for event in store.events() if event.kind is EventKind.CONTROLLER_STARTED]
        return [bool(event.data["adopted"]) for event in started] == [False] + [True] * times

    wait(adopted, 60.0, store)


@pytest.mark.full
def test_a_killed_or_interrupted_controller_is_restarted_and_adopts_the_gang(
    cluster: netns.RayCluster, tmp_path: Path
) -> None:
    store = make_run(cluster, tmp_path, 1000, 0.3)
    ray_client.start_controller(store.paths.root, cluster.address)
    wait(lambda: (store.paths.checkpoint_dir / "2" / "COMMIT").exists(), 90.0, store)
    with pytest.raises(ResumeRefused):
        ray_client.start_controller(store.paths.root, cluster.address)
    for times, number in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), start=1):
        os.kill(read_json(store.paths.controllers / f"{times}.json")["pid"], number)
        wait_adopted(store, times)
    assert (len(store.run().attempts), store.run().steps_lost) == (1, 0)
    supervise.request_cancel(store, by="test")
    wait(lambda: store.run().state is RunState.CANCELLED, 60.0, store)
    assert process.wait_until(lambda: quiet(cluster), 20.0)
    wish: dict[str, list[str]] = {"overrides": [], "changes": []}
    ray_client.start_controller(store.paths.root, cluster.address, resume=wish)
    before = len(list(store.paths.checkpoint_dir.iterdir()))
    wait(lambda: len(list(store.paths.checkpoint_dir.iterdir())) > before, 60.0, store)
    assert [event.kind for event in store.events()].count(EventKind.RESUME_REQUESTED) == 1
    assert int(Path(store.run().attempts[1].resume_from).name) > 1
    supervise.request_cancel(store, by="test")
    wait(lambda: store.run().state is RunState.CANCELLED, 60.0, store)
    assert process.wait_until(lambda: quiet(cluster), 20.0)


@pytest.mark.full  # tests/e2e/test_departure.py has a notice on processes
def test_sigterm_at_an_agent_gives_its_node_up_and_the_spare_takes_over(
    cluster: netns.RayCluster, tmp_path: Path
) -> None:
    store = make_run(cluster, tmp_path, 1000, 0.3, size=(2, 1))
    ray_client.start_controller(store.paths.root, cluster.address)
    wait(lambda: (store.paths.checkpoint_dir / "2" / "COMMIT").exists(), 90.0, store)
    rows = read_json(store.paths.ranks(1))
    first = store.run().attempts[0].nodes
    agent = read_json(store.paths.agents / f"{first[1]}.json")["pid"]
    os.kill(agent, signal.SIGTERM)
    wait(lambda: len(store.run().attempts) == 2 and store.run().state is RunState.RUNNING, 60.0, store)
    assert not any(process.is_running(row["pid"]) for row in rows)
    assert not process.is_running(agent)
    second = store.run().attempts[1].nodes
    assert second[0] == first[0]
    assert second[1] not in first
    failures = [event.data["failure"] for event in store.events() if event.kind is EventKind.FAILURE_DETECTED]
    assert [(failure["kind"], failure["node"]) for failure in failures] == [("preempted", first[1])]
    assert "SIGTERM" in failures[0]["detail"]
    supervise.request_cancel(store, by="test")
    wait(lambda: store.run().state is RunState.CANCELLED, 60.0, store)
    assert process.wait_until(lambda: quiet(cluster), 20.0)


@pytest.mark.full
def test_an_orphan_is_cancelled_by_the_address_of_a_dashboard(cluster: netns.RayCluster, tmp_path: Path) -> None:
    """Its controller is gone for good, its ranks are not; this machine can reach nothing but the dashboard's port."""
    from launcher import orphan, ray_backend
    from launcher.ray_placement import run_key

    store = make_run(cluster, tmp_path, 1000, 0.3, address=cluster.dashboard_url, size=(2, 0))
    ray_client.start_controller(store.paths.root, cluster.dashboard_url)
    wait(lambda: (store.paths.checkpoint_dir / "2" / "COMMIT").exists(), 90.0, store)
    with ray_backend.connected(tmp_path, cluster.address):
        ray_backend.kill(ray_backend.find_actor(f"phalanx-{run_key(store.paths.root)}-controller"))
    pid = read_json(store.paths.controllers / "1.json")["pid"]
    assert process.wait_until(lambda: not process.is_running(pid), 20.0)
    supervise.request_cancel(store, by="test")
    assert orphan.cancel(store) is RunState.CANCELLED
    assert len(store.run().attempts) == 1
    assert process.wait_until(lambda: quiet(cluster), 20.0)


@pytest.mark.full
def test_a_controller_that_starts_too_slowly_is_taken_back(cluster: netns.RayCluster, tmp_path: Path) -> None:
    """The client goes and is told that nothing came of it, so nothing may, then or later."""
    store = make_run(cluster, tmp_path, 1000, 0.3, size=(2, 0))
    code, late = store.paths.code / "launcher" / "ray_backend.py", tmp_path / "late"
    slow = f"open({str(late)!r}, 'w').write(str(os.getpid())); __import__('time').sleep(1000)"
    code.write_text(code.read_text().replace("on_termination(die)", slow))
    over = threading.Event()

    def interrupt() -> None:
        came = process.wait_until(lambda: over.is_set() or (late.exists() and bool(late.read_text())), 60.0)
        if came and not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            ray_client.start_controller(store.paths.root, cluster.address)
    finally:
        over.set()
        thread.join()
    pid = int(late.read_text())
    assert process.wait_until(lambda: not process.is_running(pid), 20.0), "the actor has been killed"
    assert not list(store.paths.controllers.glob("*.json"))
    assert quiet(cluster)
    visitors = [pid for pid in process.all_pids() if f"--node-ip-address={cluster.net.host_address}" in words_of(pid)]
    assert not visitors, "no node is left on this machine"


@pytest.mark.full
def test_a_cut_cable_is_a_cut_cable(cluster: netns.RayCluster) -> None:
    """The tool that tests of partitions build on."""
    target = (cluster.net.addresses[0], 6379)
    socket.create_connection(target, timeout=2.0).close()
    cluster.net.cut(0)
    try:
        with pytest.raises(OSError, match=r"timed out|No route|unreachable"):
            socket.create_connection(target, timeout=1.0)
    finally:
        cluster.net.mend(0)
    socket.create_connection(target, timeout=5.0).close()


def test_a_run_directory_that_is_not_shared_is_named_with_the_node(cluster: netns.RayCluster, tmp_path: Path) -> None:
    """Last: the fourth machine joins, without the file system of the others."""
    store = make_run(cluster, tmp_path, 1, 0.1)
    cluster.start_node(3, hide=tmp_path)
    try:
        with pytest.raises(StorageError, match=f"not shared with the node {cluster.net.addresses[3]}") as failed:
            ray_client.start_controller(store.paths.root, cluster.address)
        assert "No such file" in failed.value.why
        assert "run.dir" in failed.value.hint
        assert not store.run().attempts
        assert quiet(cluster)
    finally:
        cluster.net.kill(3)


@pytest.mark.full  # a sibling runs by default
def test_a_cluster_without_authentication(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Found as it is, whether or not the user has a token for another one."""
    from launcher.ray_backend import RayBackend

    paths = RunPaths(tmp_path / "open")
    paths.root.mkdir()
    paths.secret.write_text("5" * 64)
    with netns.network(1) as net:
        cluster = netns.RayCluster(net)
        try:
            cluster.start(nodes=1)
            assert ray_client.measure(cluster.address) == (1, 2)
            monkeypatch.delenv("RAY_AUTH_TOKEN")
            assert ray_client.measure(cluster.address) == (1, 2)
            spec = ClusterSpec(name="test", kind="existing", nodes=1, slots_per_node=2, address=cluster.address)
            backend = RayBackend(paths.root, spec, agent_options={"warm": f"{FAKE}:warm", "log_parent": str(tmp_path)})
            backend.request_agents(2)
            assert process.wait_until(lambda: len(backend.agents()) == 1, 60.0), backend.why_missing()
            time.sleep(4.0)
            assert "the cluster has 1 node with >= 2 free CPUs" in backend.why_missing()
            backend.release()
            backend.close()
            store = make_run(cluster, tmp_path, 3, 0.2, size=(1, 0))
            assert ray_client.start_controller(store.paths.root, cluster.address) == 1
            wait(lambda: store.run().state.terminal, 90.0, store)
            assert (store.run().state, store.run().step) == (RunState.SUCCEEDED, 3)
            assert process.wait_until(lambda: not ours(cluster, 1), 20.0)
        finally:
            cluster.close()

"""The main job through the command line on real Ray clusters: a node dies, the ranks close, the weights are the same.

The yardstick is an undisturbed run on plain processes: neither the cluster nor the fault may change one bit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.run import EventKind, RunState
from launcher.store import RunStore, read_json
from tests.support import cli, netns, redis

pytestmark = pytest.mark.timeout(420)

TOKEN = "ef" * 32
EMBEDDED = ("cluster=local", "cluster.nodes=2", "cluster.slots_per_node=2", "cluster.spares=1")
LONG = ("train.steps=60", "recovery.lease_s=20")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main-job")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunStore:
    done = cli.phalanx(*cli.tiny(folder, "undisturbed"), cwd=folder)
    assert done.code == 0, done.err
    return cli.store(folder, "undisturbed")


@pytest.fixture(scope="module")
def undisturbed_60(folder: Path) -> RunStore:
    done = cli.phalanx(*cli.tiny(folder, "undisturbed60", *LONG), cwd=folder)
    assert done.code == 0, done.err
    return cli.store(folder, "undisturbed60")


def assert_same(run: RunStore, other: RunStore) -> None:
    assert run.run().state is RunState.SUCCEEDED
    cli.assert_forked(run)
    assert cli.curve(run) == cli.curve(other)
    assert run.run().weights_digest == other.run().weights_digest is not None


def submit(folder: Path, name: str, *words: str) -> tuple[str, ...]:
    fixed = (f"run.dir={folder / 'runs'}", f"run.name={name}", "data=text", cli.corpus(folder))
    return ("submit", *cli.TINY, *cli.TP2_PP2, *fixed, *words)


@pytest.mark.full
def test_a_killed_ray_node_changes_nothing(folder: Path, undisturbed: RunStore) -> None:
    words = submit(
        folder, "embedded", *EMBEDDED, 'faults=["node_kill@node=1,step=8"]', "experiment.require_faults=true"
    )
    done = cli.phalanx(*words, "tracking=wandb", cwd=folder)
    assert done.code == 0, done.err
    run = cli.store(folder, "embedded")
    assert_same(run, undisturbed)
    (fired,) = [event.data["record"] for event in run.events() if event.kind is EventKind.FAULT_FIRED]
    assert fired["victims"]
    first, second = run.run().attempts
    assert "was lost" in str(first.cause)
    assert (first.nodes[0], len({*first.nodes, *second.nodes})) == (second.nodes[0], 3)
    assert read_json(run.paths.tracking)
    for text in ("steps lost", "time to recover", "productive", "phalanx logs"):
        assert text in done.out
    cli.assert_nothing_left(run.paths.root)


@pytest.mark.full  # tests/launcher/test_proof.py has the rule
def test_a_fault_that_does_not_fire_fails_the_experiment(folder: Path, undisturbed: RunStore) -> None:
    """Nothing is ever restored in a quiet run; a drill that did not happen must not look passed."""
    words = cli.tiny(folder, "silent", 'faults=["rank_kill@rank=0,phase=restore"]')
    done = cli.phalanx(*words, "experiment.require_faults=true", cwd=folder)
    assert done.code == 100, done.err
    assert "rank_kill@rank=0,phase=restore" in done.err
    assert cli.store(folder, "silent").run().state is RunState.SUCCEEDED


def test_the_whole_ray_cluster_gone_then_resume(folder: Path, undisturbed_60: RunStore) -> None:
    process = cli.start(*submit(folder, "gone", *EMBEDDED, *LONG), cwd=folder)
    root = folder / "runs" / "gone"
    cli.wait_for(lambda: max(cli.curve(RunStore(root)), default=0) >= 7, "step 7")
    process.kill()
    cluster = read_json(root / "cluster.json")
    for pid in [cluster["keeper"]["pid"], *(pid for pid, _ in cli.processes_of(root))]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    cli.end(process)
    status = cli.phalanx("status", "gone", "--json", "--dir", str(root.parent), cwd=folder).document
    assert status["orphaned"] is True
    assert status["step"] >= 7
    resumed = cli.phalanx("resume", "gone", "--dir", str(root.parent), "--yes", cwd=folder)
    assert resumed.code == 0, resumed.err
    assert_same(RunStore(root), undisturbed_60)
    cli.assert_nothing_left(root)


@pytest.mark.full  # the next test adopts one, too, after worse
def test_a_live_gang_on_ray_is_adopted(folder: Path, undisturbed_60: RunStore) -> None:
    process = cli.start(*submit(folder, "orphan", *EMBEDDED, *LONG), cwd=folder)
    root = folder / "runs" / "orphan"
    cli.wait_for(lambda: max(cli.curve(RunStore(root)), default=0) >= 4, "step 4")
    process.kill()
    cli.end(process)
    resumed = cli.phalanx("resume", "orphan", "--dir", str(root.parent), "--yes", cwd=folder)
    assert resumed.code == 0, resumed.err
    run = RunStore(root)
    started = [event.data["adopted"] for event in run.events() if event.kind is EventKind.CONTROLLER_STARTED]
    assert started == [False, True]
    assert (len(run.run().attempts), run.run().steps_lost) == (1, 0)
    assert_same(run, undisturbed_60)
    cli.assert_nothing_left(root)


@pytest.mark.full  # a sibling runs by default
def test_a_gang_that_took_the_spare_is_adopted_on_what_is_left(folder: Path, undisturbed_60: RunStore) -> None:
    """One of three nodes is dead for good: the cluster is smaller than it was, and still the gang's."""
    words = submit(folder, "fewer", *EMBEDDED, *LONG, 'faults=["node_kill@node=1,step=8"]')
    process = cli.start(*words, cwd=folder)
    root = folder / "runs" / "fewer"
    run = RunStore(root)

    def goes_on() -> bool:
        lines = list(run.metrics()) if root.exists() else []
        return any(int(line["attempt"]) == 2 and int(line["step"]) >= 12 for line in lines)

    cli.wait_for(goes_on, "step 12 of the second attempt")
    process.kill()
    cli.end(process)
    keeper, before = read_json(root / "cluster.json")["keeper"], run.run()
    resumed = cli.phalanx("resume", "fewer", "--dir", str(root.parent), "--yes", cwd=folder)
    assert resumed.code == 0, resumed.err
    assert read_json(root / "cluster.json")["keeper"] == keeper
    started = [event.data["adopted"] for event in run.events() if event.kind is EventKind.CONTROLLER_STARTED]
    assert started == [False, True]
    after = run.run()
    assert (len(after.attempts), after.steps_lost) == (2, before.steps_lost)
    assert_same(run, undisturbed_60)
    cli.assert_nothing_left(root)


# --- somebody else's cluster --------------------------------------------------------------------------------------

TORCH_SCRIPT = """
import os, pathlib, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank, attempt = dist.get_rank(), int(os.environ["PHALANX_ATTEMPT"])
folder = pathlib.Path(os.environ["PHALANX_CKPT_DIR"])
start = os.environ["PHALANX_RESUME_FROM"]
total = float((pathlib.Path(start) / "total").read_text()) if start else 0.0
first = int(pathlib.Path(start).name) + 1 if start else 1
for step in range(first, 7):
    value = torch.tensor([float(step * (rank + 1))])
    dist.all_reduce(value)
    total += value.item()
    if rank == 0:
        (folder / str(step)).mkdir(parents=True, exist_ok=True)
        (folder / str(step) / "total").write_text(str(total))
        (folder / str(step) / "COMMIT").touch()
    dist.barrier()
    if step == 4 and attempt == 1 and rank == 2:
        os.kill(os.getpid(), 9)
"""

needs_namespaces = pytest.mark.skipif(not netns.available(), reason="needs root and ip netns")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[netns.RayCluster]:
    """A head and three nodes in namespaces of their own, with token authentication and without a dashboard.

    The head keeps its tables in a Redis, which only the test that kills it needs.
    """
    with netns.network(4) as net, contextlib.ExitStack() as stack:
        logs = tmp_path_factory.mktemp("redis")
        store = stack.enter_context(redis.server(net.host_address, logs)) if redis.binary() else ""
        made = netns.RayCluster(net, token=TOKEN, head_cpus=0, redis=store)
        try:
            made.start(nodes=4)
            yield made
        finally:
            made.close()


def on_cluster(cluster: netns.RayCluster, folder: Path) -> dict[str, str]:
    """Environment of a client that knows the token."""
    return {"RAY_AUTH_TOKEN": cluster.token, "RAY_AUTH_MODE": "token", "HOME": str(folder)}


@pytest.mark.full
@needs_namespaces
def test_the_same_on_somebody_elses_cluster(cluster: netns.RayCluster, folder: Path, undisturbed: RunStore) -> None:
    """The controller runs there, our code is shipped, a node that is not ours to restart dies, and nothing differs."""
    words = submit(folder, "existing", "cluster=existing", f"cluster.address={cluster.address}", "cluster.nodes=2")
    more = ("cluster.slots_per_node=2", "cluster.spares=1", 'faults=["rank_kill@rank=1,step=5"]')
    done = cli.phalanx(*words, *more, cwd=folder, env=on_cluster(cluster, folder))
    assert done.code == 0, done.err
    run = cli.store(folder, "existing")
    assert_same(run, undisturbed)
    assert len(run.run().attempts) == 2

    def gone() -> bool:  # the client need not wait until the controller has given everything back
        inside = {pid for index in range(4) for pid in cluster.net.pids(index)}
        return not [pid for pid, _ in cli.processes_of(run.paths.root) if pid in inside]

    cli.wait_for(gone, "nothing of the run is left on the cluster", 30.0)


@pytest.mark.full  # a sibling runs by default
@needs_namespaces
def test_a_torch_script_on_somebody_elses_cluster(cluster: netns.RayCluster, tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("jobs", "conf", "launcher", "strategies"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text("raise ImportError('the user did not ask for this')\n")
    (project / "train.py").write_text(TORCH_SCRIPT)
    words = ["submit", "job=script", "job.command=python train.py", "strategy.dp=4", "tracking=none"]
    words += ["cluster=existing", f"cluster.address={cluster.address}", "cluster.nodes=2", "cluster.slots_per_node=2"]
    words += [f"run.dir={tmp_path / 'runs'}", "run.name=script"]
    done = cli.phalanx(*words, cwd=project, env=on_cluster(cluster, tmp_path))
    assert done.code == 0, done.err
    run = RunStore(tmp_path / "runs" / "script")
    first, second = run.run().attempts
    assert "signal 9" in str(first.cause)
    assert int(Path(second.resume_from).name) == 4
    assert float((run.paths.checkpoint_dir / "6" / "total").read_text()) == sum(10.0 * step for step in range(1, 7))


@needs_namespaces
@redis.needed
def test_a_head_that_comes_back_with_its_store_has_cost_nothing(
    cluster: netns.RayCluster, folder: Path, undisturbed_60: RunStore
) -> None:
    """The controller falls with the head; Ray, once back, starts it again, and it adopts ranks that never stopped."""
    words = submit(folder, "head", "cluster=existing", f"cluster.address={cluster.address}", "cluster.nodes=2")
    more = ("cluster.slots_per_node=2", "cluster.spares=1", "train.steps=60", "recovery.lease_s=60")
    process = cli.start(*words, *more, cwd=folder, env=on_cluster(cluster, folder))
    root = folder / "runs" / "head"
    run = RunStore(root)
    cli.wait_for(lambda: root.exists() and max(cli.curve(run), default=0) >= 5, "step 5")
    holder = read_json(root / "controllers" / "1.json")["pid"]
    ranks = {row["pid"] for row in read_json(root / "attempts" / "1" / "ranks.json")}
    there = set(cluster.net.pids(0))
    assert holder in there
    assert not ranks & there
    cluster.net.kill(0)
    killed_at = time.time()
    cluster.start_node(0)
    done = cli.end(process)
    assert done.code == 0, done.err
    assert_same(run, undisturbed_60)
    started = [event for event in run.events() if event.kind is EventKind.CONTROLLER_STARTED]
    assert [event.data["adopted"] for event in started] == [False, True]
    assert sum(killed_at < float(line["time"]) < started[1].time for line in run.metrics()) > 0
    assert (len(run.run().attempts), run.run().steps_lost) == (1, 0)
    assert EventKind.FAILURE_DETECTED not in {event.kind for event in run.events()}


@pytest.mark.full
@needs_namespaces
def test_a_node_that_loses_its_power_on_somebody_elses_cluster(
    cluster: netns.RayCluster, folder: Path, undisturbed: RunStore
) -> None:
    """Last in this file: the cluster has one node less afterwards."""
    words = submit(folder, "power", "cluster=existing", f"cluster.address={cluster.address}", "cluster.nodes=2")
    more = ("cluster.slots_per_node=2", "cluster.spares=1", "train.steps=12")
    process = cli.start(*words, *more, cwd=folder, env=on_cluster(cluster, folder))
    root = folder / "runs" / "power"
    cli.wait_for(lambda: (root / "attempts" / "1" / "ranks.json").exists(), "ranks")
    pids = {row["pid"] for row in read_json(root / "attempts" / "1" / "ranks.json")}
    holder = read_json(root / "controllers" / "1.json")["pid"]
    assert holder in cluster.net.pids(0)  # with the head, which must live on
    victim = next(i for i in (3, 2, 1) if pids & set(cluster.net.pids(i)))
    cluster.net.kill(victim)
    done = cli.end(process)
    assert done.code == 0, done.err
    run = RunStore(root)
    assert_same(run, undisturbed)
    assert len(run.run().attempts) == 2

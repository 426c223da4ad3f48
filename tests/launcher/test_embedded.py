"""The embedded cluster's keeper, with nodes that are not Ray; the real ones are in tests/e2e/test_ray_backend.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.paths import RunPaths
from launcher import keeper
from launcher.embedded import EmbeddedCluster, kill_members, members, node_mark
from launcher.host import process
from launcher.lock import process_started
from launcher.run import EventKind
from launcher.store import RunStore
from strategies.errors import ClusterError

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[2]


class FakeCluster(EmbeddedCluster):
    """An embedded cluster of fake nodes."""

    _keeper = "tests.support.fake_nodes"


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run directory, with the proof that nothing is left of its cluster."""
    folder = tmp_path / "run"
    folder.mkdir()
    yield folder
    FakeCluster(folder).stop()
    assert members(node_mark(folder, "")) == set()


def start(run_dir: Path, *, nodes: int = 2, keep_s: float = 60.0) -> FakeCluster:
    return FakeCluster.start(run_dir, nodes=nodes, slots_per_node=2, keep_s=keep_s)


def ended(cluster: EmbeddedCluster) -> Callable[[], bool]:
    """Whether the keeper has gone and has said why."""
    return lambda: not cluster.alive() and cluster.record()["state"] == "ended"


def test_start_counts_up_and_describes_the_cluster(run_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    cluster = FakeCluster.start(
        run_dir, nodes=3, slots_per_node=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (4, 4)
    assert seen == sorted(set(seen))
    record = cluster.record()
    assert [(node["index"], node["slots"]) for node in record["nodes"]] == [("head", 0), (0, 2), (1, 2), (2, 2)]
    assert cluster.address.startswith("127.0.0.1:")
    assert cluster.token_path.stat().st_mode & 0o777 == 0o600
    assert len(cluster.token_path.read_text()) == 64
    assert cluster.token_path.parent.stat().st_mode & 0o777 == 0o700
    assert len(cluster.processes()) == 8  # a node and its child, four times
    found = FakeCluster.find(run_dir)
    assert found is not None
    assert found.address == cluster.address


def test_stop_leaves_no_process_and_no_file(run_dir: Path) -> None:
    cluster = start(run_dir)
    before, temp = cluster.processes(), Path(cluster.record()["temp_dir"])
    assert len(before) == 6
    cluster.stop()
    assert not any(process.is_running(pid) for pid in before)
    assert not temp.exists()
    assert cluster.record()["state"] == "ended"
    assert FakeCluster.find(run_dir) is None
    cluster.stop()


def test_a_killed_node_disturbs_nobody_and_stays_dead(run_dir: Path) -> None:
    cluster = start(run_dir, nodes=3)
    victims = members(node_mark(run_dir, 1))
    others = cluster.processes() - victims
    assert len(victims) == 2
    cluster.kill_node(1)
    assert not any(process.is_running(pid) for pid in victims)
    time.sleep(1.0)
    assert cluster.processes() == others
    assert cluster.alive()


def test_start_again_returns_the_same_cluster_unless_too_little_of_it_is_left(run_dir: Path) -> None:
    first = start(run_dir, nodes=3)
    processes = first.processes()
    assert start(run_dir, nodes=3).processes() == processes
    first.kill_node(0)
    left = first.processes()
    assert FakeCluster.start(run_dir, nodes=3, slots_per_node=2, enough=2).processes() == left, "a gang may live on it"
    again = start(run_dir, nodes=3)
    assert len(again.processes()) == 8
    assert not any(process.is_running(pid) for pid in processes)


def test_start_again_replaces_a_cluster_of_other_slots_or_without_a_head(run_dir: Path) -> None:
    first = start(run_dir)
    before = first.processes()
    second = FakeCluster.start(run_dir, nodes=2, slots_per_node=1, enough=1)
    assert not second.processes() & before
    before = second.processes()
    head = next(node["pid"] for node in second.record()["nodes"] if node["index"] == "head")
    os.kill(head, signal.SIGKILL)
    assert process.wait_until(lambda: not process.is_running(head), 5.0)
    third = FakeCluster.start(run_dir, nodes=2, slots_per_node=1, enough=1)
    assert not third.processes() & before


def test_the_cluster_outlives_kill_9_of_its_client(run_dir: Path) -> None:
    code = (
        "import sys, time\n"
        "from tests.launcher.test_embedded import *\n"
        "start(Path(sys.argv[1]))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        client.kill()
    cluster = FakeCluster.find(run_dir)
    assert cluster is not None
    assert len(cluster.processes()) == 6


def test_it_ends_itself_without_controller_and_steps(run_dir: Path) -> None:
    cluster = start(run_dir, keep_s=1.5)
    paths = RunPaths(run_dir)
    paths.controllers.mkdir()
    for beat in range(6):
        (paths.controllers / "1.beat").write_text(str(beat))
        time.sleep(0.5)
    for step in range(6):
        with paths.metrics.open("a") as file:
            file.write(f"{step}\n")
        time.sleep(0.5)
    assert cluster.alive(), "a controller, then steps, were seen all the time"
    assert process.wait_until(ended(cluster), 15.0)
    assert cluster.record()["reason"] == "no controller and no step for 2 s"
    assert cluster.processes() == set()


def test_it_ends_itself_when_the_run_is_over_and_nobody_controls_it(run_dir: Path) -> None:
    cluster = start(run_dir)
    store = RunStore(run_dir)
    store.append(EventKind.RUN_SUBMITTED)
    time.sleep(1.5)
    assert cluster.alive(), "the run has not ended"
    store.append(EventKind.RUN_CANCELLED)
    assert process.wait_until(ended(cluster), 15.0)
    assert cluster.record()["reason"] == "the run is over"


def test_it_ends_itself_when_the_run_directory_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    cluster = start(folder)
    left = cluster.processes()
    assert left
    folder.rename(tmp_path / "elsewhere")
    assert process.wait_until(lambda: not any(process.is_running(pid) for pid in left), 15.0)


def test_kill_9_of_the_keeper_ends_its_nodes(run_dir: Path) -> None:
    """The kernel ends the direct children; what is below them is Ray's to end, which the end-to-end test counts."""
    cluster = start(run_dir)
    nodes = [node["pid"] for node in cluster.record()["nodes"]]
    keeper_pid = cluster.record()["keeper"]["pid"]
    os.kill(keeper_pid, signal.SIGKILL)
    assert process.wait_until(lambda: not any(process.is_running(pid) for pid in nodes), 5.0)
    assert FakeCluster.find(run_dir) is None
    for pid in process.all_pids():  # orphans of fake nodes
        if process.command_line(pid) == ["sleep", "600", f"0.000{keeper_pid}"]:
            process.send(pid, signal.SIGKILL)


def test_a_node_that_does_not_start_is_explained_and_nothing_is_left(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NODES", "broken")
    with pytest.raises(ClusterError) as failed:
        start(run_dir)
    assert "no such luck" in failed.value.why
    assert str(run_dir / "cluster.log") in failed.value.hint
    assert members(node_mark(run_dir, "")) == set()
    assert FakeCluster(run_dir).record()["state"] == "failed"


def test_patience_ends_and_nothing_is_left(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NODES", "slow")
    with pytest.raises(ClusterError, match="did not start") as failed:
        FakeCluster.start(run_dir, nodes=1, slots_per_node=1, timeout_s=3.0)
    assert "only 1 of 2" in failed.value.why
    assert members(node_mark(run_dir, "")) == set()


def test_marks_tell_runs_of_the_same_name_apart(tmp_path: Path) -> None:
    assert node_mark(tmp_path / "a" / "run", 0) != node_mark(tmp_path / "b" / "run", 0)
    assert node_mark(tmp_path / "run", 0).startswith("run-")


def test_members_of_node_1_are_not_those_of_node_11(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"], env={"PHALANX_NODE": node_mark(tmp_path, 11)}, start_new_session=True) as it:
        assert members(node_mark(tmp_path, 1)) == set()
        assert members(node_mark(tmp_path, 11)) == {it.pid}
        assert members(node_mark(tmp_path, "")) == {it.pid}
        assert kill_members(node_mark(tmp_path, 11)) == set()
        assert it.wait() == -signal.SIGKILL


def test_a_temp_dir_that_is_too_deep_for_sockets_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    made = keeper._make_temp_dir()
    made.rmdir()
    assert made.parent == Path("/tmp")


def test_folders_of_dead_keepers_are_swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    dead, living = (Path(tempfile.mkdtemp(prefix="phx-", dir="/tmp")) for _ in range(2))
    (dead / "owner").write_text("1 5")
    (living / "owner").write_text(f"{os.getpid()} {process_started(os.getpid())}")
    made = keeper._make_temp_dir()
    try:
        assert not dead.exists()
        assert living.exists()
    finally:
        (living / "owner").unlink()
        living.rmdir()
        made.rmdir()

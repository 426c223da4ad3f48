"""The head of somebody else's Ray cluster dies, and the controller of the run with it: at the start, in training, and
in the middle of a recovery. With an external store the run goes on by itself, without one by ``phalanx resume``.

``test_main_job.py`` has the plainest case; these cost minutes each.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.host import process as processes
from launcher.run import EventKind
from launcher.store import RunStore, read_json
from tests.e2e.test_main_job import LONG, TOKEN, assert_same, needs_namespaces, on_cluster, submit
from tests.support import cli, netns, redis

pytestmark = [pytest.mark.full, pytest.mark.timeout(600), needs_namespaces]

GONE_S = 60.0


class Impatient(netns.RayCluster):
    """Ray gives a head 60 s to come back before it ends what runs elsewhere; here 5 s."""

    def environment(self, token: str | None = None) -> dict[str, str]:
        """As everywhere, but for that."""
        return super().environment(token) | {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("head-loss")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunStore:
    done = cli.phalanx(*cli.tiny(folder, "undisturbed", *LONG), cwd=folder)
    assert done.code == 0, done.err
    return cli.store(folder, "undisturbed")


@contextlib.contextmanager
def cluster(folder: Path, *, store: bool) -> Iterator[netns.RayCluster]:
    """A head and three nodes, with or without a Redis beside them."""
    with netns.network(4) as net, contextlib.ExitStack() as stack:
        address = stack.enter_context(redis.server(net.host_address, folder)) if store else ""
        made = (netns.RayCluster if store else Impatient)(net, token=TOKEN, head_cpus=0, redis=address)
        try:
            made.start(nodes=4)
            yield made
        finally:
            made.close()


def seen(run: RunStore, kind: EventKind) -> bool:
    """Whether the log of a run has an event of a kind."""
    return run.paths.events.exists() and any(event.kind is kind for event in run.events())


def ours(made: netns.RayCluster, run: RunStore) -> list[int]:
    """Processes of a run on the nodes of the cluster."""
    inside = {pid for index in range(4) for pid in made.net.pids(index)}
    return [pid for pid, _ in cli.processes_of(run.paths.root) if pid in inside]


MOMENTS: dict[str, Callable[[RunStore], bool]] = {
    "start": lambda run: seen(run, EventKind.ATTEMPT_PLANNED),
    "training": lambda run: max(cli.curve(run), default=0) >= 7,
    "recovery": lambda run: seen(run, EventKind.FAILURE_DETECTED),
}


def begin(made: netns.RayCluster, folder: Path, name: str, *more: str) -> tuple[RunStore, Callable[[], cli.Result]]:
    """Submit; returns the run and what waits for the end of the command."""
    words = submit(folder, name, "cluster=existing", f"cluster.address={made.address}", "cluster.nodes=2")
    fixed = ("cluster.slots_per_node=2", "cluster.spares=1", "train.steps=60", "recovery.lease_s=60")
    started = cli.start(*words, *fixed, *more, cwd=folder, env=on_cluster(made, folder))
    return RunStore(folder / "runs" / name), lambda: cli.end(started)


@pytest.mark.parametrize("moment", sorted(MOMENTS))
def test_without_a_store_the_cluster_ends_and_resume_goes_on(
    folder: Path, undisturbed: RunStore, moment: str, tmp_path: Path
) -> None:
    with cluster(tmp_path, store=False) as made:
        fault = 'faults=["rank_kill@rank=1,step=8"]'
        run, end = begin(made, folder, f"gone-{moment}", *([fault] if moment == "recovery" else []))
        cli.wait_for(lambda: MOMENTS[moment](run), moment)
        made.net.kill(0)
        cli.wait_for(lambda: not ours(made, run), "the end of agents and ranks", GONE_S)
        status = cli.phalanx("status", run.name, "--json", "--dir", str(run.paths.root.parent), cwd=folder).document
        assert status["orphaned"] is True
        for index in (1, 2, 3):
            made.net.kill(index)  # what Ray has left of itself there
        made.start(nodes=4)
        words = ("resume", run.name, "--dir", str(run.paths.root.parent), "--yes")
        resumed = cli.phalanx(*words, cwd=folder, env=on_cluster(made, folder))
        assert resumed.code == 0, resumed.err
        end()
        assert_same(run, undisturbed)
        last = run.run().attempt
        assert last is not None
        assert last.reason == "resume"


@redis.needed
@pytest.mark.parametrize("moment", ["recovery", "start"])
def test_with_a_store_the_run_goes_on_by_itself(
    folder: Path, undisturbed: RunStore, moment: str, tmp_path: Path
) -> None:
    with cluster(tmp_path, store=True) as made:
        fault = 'faults=["rank_kill@rank=1,step=8"]'
        run, end = begin(made, folder, f"kept-{moment}", *([fault] if moment == "recovery" else []))
        cli.wait_for(lambda: MOMENTS[moment](run), moment)
        made.net.kill(0)
        made.start_node(0)
        done = end()
        assert done.code == 0, done.err
        assert_same(run, undisturbed)


@redis.needed
def test_a_rank_that_dies_while_the_head_is_away_is_recovered_from_afterwards(
    folder: Path, undisturbed: RunStore, tmp_path: Path
) -> None:
    with cluster(tmp_path, store=True) as made:
        run, end = begin(made, folder, "away")
        cli.wait_for(lambda: MOMENTS["training"](run), "step 7")
        made.net.kill(0)
        victim = read_json(run.paths.ranks(1))[3]["pid"]
        os.kill(victim, signal.SIGKILL)
        assert processes.wait_until(lambda: not processes.is_running(victim), 10.0)
        made.start_node(0)
        done = end()
        assert done.code == 0, done.err
        assert_same(run, undisturbed)
        # What is seen first may be a peer that lost the connection; who it was is judged when all have ended.
        stopped = [event.data for event in run.events() if event.kind is EventKind.GANG_STOPPED]
        assert [(one["failure"], one["rank"]) for one in stopped] == [("rank_killed", 3)]
        assert len(run.run().attempts) == 2

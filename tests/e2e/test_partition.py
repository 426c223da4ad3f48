"""A link goes down and nothing is closed: real ranks on nodes of their own address, and the cable is pulled.

Both sides live on: the survivors must decide within the bound, the node that is cut off must end by itself, and what
it does when the cable is back must count for nothing. The oracle is that of tests/e2e/test_recovery.py.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.checkpoint.layout import Place, Token, manifests, writers
from launcher.host import process
from launcher.lock import ControllerLock
from launcher.run import EventKind, RunEvent, RunState
from launcher.store import RunStore, read_json
from launcher.supervise import control
from tests.support import cli, netgang, netns

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not netns.available(), reason="needs root and ip netns"),
]
BOUND_S = 5.0  # from the cut to the decision, by the event log
STEPS = 40
LEASE_S = 12.0  # more than three agents and a controller take to start on a machine that is busy
ENDING_S = 4.0  # to kill what it has, and to end: 2.2 s were seen on two cores that had fourteen processes to run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("partition")


@pytest.fixture
def net() -> Iterator[netns.Network]:
    with netns.network(3) as made:
        yield made


def undisturbed(folder: Path, steps: int) -> RunStore:
    """A run of so many steps on plain processes; made once."""
    name = f"undisturbed-{steps}"
    if not (folder / "runs" / name).exists():
        done = cli.phalanx(*cli.tiny(folder, name, f"train.steps={steps}"), cwd=folder)
        assert done.code == 0, done.err
    return cli.store(folder, name)


def assert_same(run: RunStore, other: RunStore) -> None:
    assert run.run().state is RunState.SUCCEEDED
    assert cli.curve(run) == cli.curve(other)
    assert run.run().weights_digest == other.run().weights_digest


def events_of(run: RunStore, kind: EventKind) -> list[RunEvent]:
    return [event for event in run.events() if event.kind is kind]


class Meanwhile(threading.Thread):
    """Does something to a run while this process controls it; tells what went wrong."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._act = act
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self.error = error

    def finish(self) -> None:
        self.join(60.0)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def at_step(run: RunStore, step: int) -> None:
    cli.wait_for(lambda: max(cli.curve(run), default=0) >= step, f"step {step}", 120.0)


def persister_log(net: netns.Network, index: int) -> str:
    """What the persister of a node has printed: its processes stand in the folder where that is."""
    found = (Path(f"/proc/{pid}/cwd/persister.log") for pid in net.pids(index))
    return next(path for path in found if path.exists()).read_text()


def ruled_here(run: RunStore) -> RunState:
    """Control the run in this process, on the host, to its end."""
    lock = ControllerLock.acquire(run.paths)
    return control(run, netgang.NetBackend(run.paths), lock)


def test_survivors_decide_in_time_and_the_cut_off_node_ends_by_itself(folder: Path, net: netns.Network) -> None:
    run = netgang.make_run(folder, "cut", f"train.steps={STEPS}", f"recovery.lease_s={LEASE_S}")
    agents = [netgang.start_agent(net, run, index, lease_s=LEASE_S) for index in range(3)]
    cut_at = [0.0]

    def cut() -> None:
        at_step(run, 4)
        cut_at[0] = time.time()
        net.cut(1)
        assert agents[1].wait(LEASE_S + ENDING_S) == 0
        assert net.pids(1) == []  # its ranks went with its lease

    meanwhile = Meanwhile(cut)
    assert ruled_here(run) is RunState.SUCCEEDED
    meanwhile.finish()
    (failure,) = events_of(run, EventKind.FAILURE_DETECTED)
    assert failure.data["failure"]["kind"] == "partitioned"
    assert failure.data["failure"]["node"] == "n1"
    decided = events_of(run, EventKind.DECISION)
    assert [event.data["action"] for event in decided] == ["restart", "swap"]
    assert 0 < decided[0].time - cut_at[0] <= BOUND_S
    assert run.run().steps_lost <= 1
    assert "n2 takes the place of n1" in decided[1].data["reason"]
    assert "ended: lease" in netgang.agent_log(run, 1).read_text()
    assert_same(run, undisturbed(folder, STEPS))


@pytest.mark.full
def test_what_a_cut_off_rank_writes_is_named_by_no_manifest(folder: Path, net: netns.Network) -> None:
    """The cable is back in the middle of a checkpoint: the shard is there, its rank wakes up and wants it committed.

    The gang that has taken over is held back meanwhile: it has written nothing, nor made a step. That the commit was
    tried says the log of the persister that coordinates it, on the node that was not cut off.
    """
    fault = "rank_stop@rank=3,step=6,phase=shards_written"
    run = netgang.make_run(folder, "healed", "train.steps=60", f'faults=["{fault}"]', "checkpoint.keep=1000")
    for index in range(3):
        netgang.start_agent(net, run, index, lease_s=120.0)
    written = [False]
    refusal = "step 6 of e0001-a0001 is not committed: The gang e0001-a0001 may not commit step 6"

    def spawned() -> bool:
        return any(event.attempt == 2 for event in events_of(run, EventKind.RANKS_SPAWNED))

    def committed_late() -> bool:
        return any((one.step, one.token.attempt) == (6, 1) for one in manifests(run.paths.checkpoint_dir))

    def cut_and_heal() -> None:
        cli.wait_for(lambda: run.paths.faults.is_dir() and any(run.paths.faults.glob("rank_stop*.json")), "the stop")
        zombie = next(row["pid"] for row in read_json(run.paths.ranks(1)) if row["rank"] == 3)
        shard = Place(run.paths.checkpoint_dir, 6, Token(1, 1)).shard(3)
        written[0] = shard.exists()
        assert refusal not in persister_log(net, 0)
        net.cut(1)
        cli.wait_for(spawned, "attempt 2")
        held = next(row["pid"] for row in read_json(run.paths.ranks(2)) if row["rank"] == 0)
        os.kill(held, signal.SIGSTOP)
        try:
            net.mend(1)
            os.kill(zombie, signal.SIGCONT)
            cli.wait_for(lambda: not process.is_running(zombie), "the end of the rank that was cut off")
            cli.wait_for(lambda: refusal in persister_log(net, 0), "the commit that is refused")
            assert not process.wait_until(committed_late, 2.0)
            assert {one.token.attempt for one in writers(run.paths.checkpoint_dir)} == {1}, "the other has not begun"
        finally:
            os.kill(held, signal.SIGCONT)

    meanwhile = Meanwhile(cut_and_heal)
    assert ruled_here(run) is RunState.SUCCEEDED
    meanwhile.finish()
    assert written[0]
    committed = manifests(run.paths.checkpoint_dir)
    assert [one.step for one in committed if one.token.attempt == 1] == [3]
    assert {6} | {one.step for one in committed if one.token.attempt == 2} == set(range(6, 61, 3))
    for one in committed:
        assert read_json(one.manifest)["attempt"] == one.token.attempt
    assert_same(run, undisturbed(folder, 60))


@pytest.mark.full
def test_a_controller_that_is_cut_off_waits_for_its_nodes(folder: Path, net: netns.Network) -> None:
    """The cable of the controller's own machine is out for longer than a silent node is given; the ranks train on."""
    run = netgang.make_run(folder, "deaf", "train.steps=300")
    for index in range(2):
        netgang.start_agent(net, run, index, lease_s=60.0)
    controller = netgang.start_controller_on(net, run, 2)
    at_step(run, 4)
    net.cut(2)
    cut_at = max(cli.curve(run))
    cli.wait_for(lambda: bool(events_of(run, EventKind.CUT_OFF)), "the controller to notice", 30.0)
    time.sleep(BOUND_S)
    assert max(cli.curve(run)) > cut_at, "the ranks train on"
    net.mend(2)
    assert controller.wait(250.0) == 0
    state = run.run()
    assert (len(state.attempts), state.steps_lost, state.restarts, state.epoch) == (1, 0, 0, 1)
    assert events_of(run, EventKind.FAILURE_DETECTED) == []
    assert_same(run, undisturbed(folder, 300))


@pytest.mark.full
def test_of_two_controllers_at_once_the_old_one_does_nothing(folder: Path, net: netns.Network) -> None:
    """One that was stopped wakes up and finds another in its place: it writes nothing that counts and kills nobody."""
    run = netgang.make_run(folder, "two", "train.steps=300", "checkpoint.every=50")
    for index in range(3):
        netgang.start_agent(net, run, index, lease_s=60.0)
    controllers = [netgang.start_controller(run)]
    try:
        at_step(run, 4)
        old = netgang.pid_of(controllers[0])
        os.kill(old, signal.SIGSTOP)
        controllers.append(netgang.start_controller(run))
        cli.wait_for(lambda: run.run().epoch == 2, "a second controller", 60.0)
        ranks = read_json(run.paths.ranks(1))
        os.kill(old, signal.SIGCONT)
        assert controllers[0].wait(30.0) == netgang.FENCED
        assert all(process.is_running(row["pid"]) for row in ranks)
        assert controllers[1].wait(200.0) == 0
    finally:
        netgang.kill(controllers)
    log = run.events()
    second = next(place for place, event in enumerate(log) if event.epoch == 2)
    assert [event.kind for event in log[second:] if event.epoch == 1] == []
    state = run.run()
    assert (len(state.attempts), state.steps_lost, state.restarts, state.epoch) == (1, 0, 0, 2)
    assert [event.data["action"] for event in events_of(run, EventKind.DECISION)] == ["adopt"]
    assert_same(run, undisturbed(folder, 300))

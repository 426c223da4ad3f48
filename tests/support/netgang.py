"""Runs whose nodes are namespaces of :mod:`tests.support.netns`, without Ray: agents there, the controller on the host.

As a program it is a controller on a machine of its own: ``unshare --pid --fork --mount-proc python -m
tests.support.netgang RUN_DIR`` has process ids that mean nothing to anybody else, so that its life is judged by its
heartbeat, as on another host. It ends with 0 when the run has succeeded and with :data:`FENCED` when a later one rules.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.paths import RunPaths
from launcher import build
from launcher.backend import AgentAddress, NodeInfo
from launcher.host import announce, process
from launcher.host.environment import packages_root
from launcher.launch import create
from launcher.lock import ControllerLock
from launcher.logbook import Fenced
from launcher.preparation import prepare_data
from launcher.run import RunState
from launcher.store import RunStore
from launcher.supervise import control
from tests.support import cli, netns
from tests.support.runs import configuration

FENCED = 42
SLOTS = 2


class NetBackend:
    """See :class:`launcher.backend.Backend`: the nodes that the test has started; no more are to be had.

    Args:
        paths: The run directory.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._forgotten: set[str] = set()

    def nodes(self) -> list[NodeInfo]:
        """The nodes that answer."""
        return [NodeInfo(node=a.node, address=a.host, slots=SLOTS) for a in self.agents()]

    def request_agents(self, count: int) -> None:
        """Nobody to ask."""

    def agents(self) -> list[AgentAddress]:
        """The agents that have announced themselves."""
        return [found for found in announce.read_all(self._paths) if found.incarnation not in self._forgotten]

    def forget(self, agent: AgentAddress) -> None:
        """A node that cannot be reached cannot be ended either."""
        self._forgotten.add(agent.incarnation)

    def why_missing(self) -> str:
        """Why there are no more."""
        return "a cable is out"

    def release(self) -> None:
        """The agents were told by their controller."""

    def close(self) -> None:
        """Nothing to close."""


def make_run(folder: Path, name: str, *words: str) -> RunStore:
    """The run directory of the tiny model, as submit makes it, data included."""
    more = cli.tiny(folder, name, *words)[1:]
    config = configuration(folder / "runs", name, list(more))
    from launcher.follow import Screen

    with open(os.devnull, "w") as nowhere:
        request = prepare_data(config, build.build_request(config, list(more)), Screen(nowhere))
    return create(request, config, None)


def start_agent(net: netns.Network, store: RunStore, index: int, *, lease_s: float) -> subprocess.Popen[bytes]:
    """An agent in a namespace; returns when it has announced itself."""
    command = [sys.executable, "-P", "-m", "launcher.host.agent", "--run-dir", str(store.paths.root)]
    command += ["--node", node_of(index), "--bind", net.addresses[index], "--slots", str(SLOTS)]
    command += ["--lease-s", str(lease_s), "--grace-s", "1"]
    environment = os.environ | {"PYTHONPATH": str(packages_root()), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    started = net.popen(index, command, log=agent_log(store, index), env=environment)
    path = announce.path_of(store.paths, node_of(index))
    assert process.wait_until(path.exists, 60.0), agent_log(store, index).read_text()
    return started


def node_of(index: int) -> str:
    """Name of the node in a namespace."""
    return f"n{index}"


def agent_log(store: RunStore, index: int) -> Path:
    """What the agent of a namespace prints."""
    return store.paths.root / f"agent-{index}.log"


def start_controller(store: RunStore) -> subprocess.Popen[bytes]:
    """A controller on a machine of its own."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-P", "-m"]
    command += ["tests.support.netgang", str(store.paths.root)]
    with open(store.paths.root / "controller.log", "ab") as log:
        return subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(packages_root()), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def start_controller_on(net: netns.Network, store: RunStore, index: int) -> subprocess.Popen[bytes]:
    """A controller in a namespace."""
    command = [sys.executable, "-P", "-m", "tests.support.netgang", str(store.paths.root)]
    environment = os.environ | {"PYTHONPATH": str(packages_root()), "OMP_NUM_THREADS": "1"}
    return net.popen(index, command, log=store.paths.root / "controller.log", env=environment)


def pid_of(controller: subprocess.Popen[bytes]) -> int:
    """The controller itself, as the host knows it."""
    found = [pid for pid in process.all_pids() if process.parent_and_session(pid)[0] == controller.pid]
    return found[0]


def kill(controllers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End controllers that a test has left."""
    for controller in controllers:
        if controller.poll() is None:
            os.killpg(controller.pid, signal.SIGKILL)
            controller.wait()


def main(root: str) -> int:
    """Control a run to its end."""
    store = RunStore.open(Path(root))
    lock = ControllerLock.acquire(store.paths)
    try:
        state = control(store, NetBackend(store.paths), lock)
    except Fenced:
        return FENCED
    return 0 if state is RunState.SUCCEEDED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

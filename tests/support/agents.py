"""A run directory with host agents of fake ranks, a gang connected to them, and the proof that nothing is left over."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths
from jobs.spec import RankEnv
from launcher.backend import AgentAddress
from launcher.gang import EnvOf, Gang, Observation
from launcher.host import announce, process, wire
from launcher.host.environment import packages_root

FAKE = "tests.support.fakejob"
PATIENCE_S = 60.0


def fake_env(paths: RunPaths, attempt: int, world: int, epoch: int = 1, **variables: str) -> EnvOf:
    """Environments of fake ranks; ``variables`` go to all of them."""

    def env_of(rank: int, node_rank: int, local_rank: int, local_world: int, addr: str, port: int) -> dict[str, str]:
        env = RankEnv(
            rank=rank,
            local_rank=local_rank,
            world_size=world,
            local_world_size=local_world,
            node_rank=node_rank,
            master_addr=addr,
            master_port=port,
            run_id=paths.root.name,
            run_dir=str(paths.root),
            epoch=epoch,
            attempt=attempt,
        )
        return env.variables() | variables

    return env_of


class Watcher:
    """A gang that remembers all it has observed."""

    def __init__(self, paths: RunPaths, epoch: int = 1, **options: Any) -> None:
        self.paths = paths
        self.epoch = epoch
        self.gang = Gang(wire.read_secret(paths.secret), epoch, **options)
        self.seen: list[Observation] = []

    def until(self, holds: Callable[[Observation], bool]) -> Observation:
        """Poll until an observation, the earlier ones included, satisfies ``holds``."""
        deadline = time.monotonic() + PATIENCE_S
        for observation in self.seen:
            if holds(observation):
                return observation
        while time.monotonic() < deadline:
            fresh = self.gang.poll(0.1)
            self.seen += fresh
            for observation in fresh:
                if holds(observation):
                    return observation
        raise AssertionError(f"not seen within {PATIENCE_S} s; seen: {self.seen}")

    def until_kind(self, kind: str, **data: Any) -> Observation:
        """Poll until an observation of ``kind`` whose data contains ``data``."""
        return self.until(lambda o: o.kind == kind and all(o.data.get(k) == v for k, v in data.items()))

    def report(self, kind: str, **data: Any) -> Observation:
        """Poll until a rank reports ``kind``."""
        return self.until(lambda o: o.kind == "report" and o.data | data == o.data and o.data["kind"] == kind)

    def listen(self, seconds: float) -> list[Observation]:
        """Poll for a while and return what was new."""
        deadline, before = time.monotonic() + seconds, len(self.seen)
        while time.monotonic() < deadline:
            self.seen += self.gang.poll(0.05)
        return self.seen[before:]

    def connect(self, *nodes: str) -> None:
        """Connect to announced agents and wait until they are up."""
        assert process.wait_until(lambda: {a.node for a in announce.read_all(self.paths)} >= set(nodes), PATIENCE_S)
        self.gang.connect(announce.read_all(self.paths))
        for node in nodes:
            self.until(lambda o, node=node: o.kind == "agent_up" and o.node == node)  # type: ignore[misc]

    def spawn(self, attempt: int, placement: Mapping[str, list[int]], **variables: str) -> dict[int, int]:
        """Spawn fake ranks and wait until all of them run; returns rank -> pid."""
        world = sum(len(ranks) for ranks in placement.values())
        self.gang.spawn(attempt, placement, fake_env(self.paths, attempt, world, self.epoch, **variables))
        return self.pids(attempt, placement)

    def pids(self, attempt: int, placement: Mapping[str, list[int]]) -> dict[int, int]:
        """Wait until all nodes have told the process ids of an attempt; returns rank -> pid."""
        pids: dict[int, int] = {}
        for node in placement:
            event = self.until(
                lambda o, node=node: o.kind == "spawned" and o.node == node and o.data["attempt"] == attempt  # type: ignore[misc]
            )
            pids |= {entry["rank"]: entry["pid"] for entry in event.data["ranks"]}
        return pids


class Agents:
    """Starts agents as processes of their own.

    Args:
        root: A fresh folder for the run directory.
    """

    def __init__(self, root: Path) -> None:
        self.paths = RunPaths(root / "run")
        self.paths.root.mkdir(parents=True)
        wire.make_secret(self.paths.secret)
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        self.incarnations: dict[str, str] = {}
        self.watchers: list[Watcher] = []
        self.enter: tuple[str, ...] = ()  # a command that runs the agent somewhere else
        self.environment: dict[str, str] = {}  # what agents are told more than others
        self._tmp = root / "logs"
        self._tmp.mkdir()

    def start(self, node: str = "n0", **options: Any) -> subprocess.Popen[bytes]:
        """Start an agent; ``options`` become its options."""
        self.incarnations[node] = secrets.token_hex(8)
        given = {"warm": f"{FAKE}:warm", "target": f"{FAKE}:main", "log_parent": self._tmp, "grace_s": 1.0} | options
        command = [sys.executable, "-P", "-m", "launcher.host.agent", "--run-dir", str(self.paths.root)]
        command += ["--node", node, "--bind", "127.0.0.1", "--slots", "2", "--incarnation", self.incarnations[node]]
        for name, value in given.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        root = str(packages_root())
        with open(self.paths.root / f"{node}.log", "ab") as log:
            environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | self.environment
            self.started[node] = subprocess.Popen(
                [*self.enter, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.started[node]

    def watch(self, *nodes: str, epoch: int = 1, **options: Any) -> Watcher:
        """A gang connected to ``nodes``."""
        watcher = Watcher(self.paths, epoch, **options)
        self.watchers.append(watcher)
        watcher.connect(*nodes)
        return watcher

    def address(self, node: str = "n0") -> AgentAddress:
        """Where the agent of a node is, once it has said so."""
        path = announce.path_of(self.paths, node)
        assert process.wait_until(lambda: announce.read(path) is not None, PATIENCE_S)
        found = announce.read(path)
        assert found is not None
        return found

    def alive(self, node: str = "n0") -> list[int]:
        """Every living process below the agent of a node, wherever it has got to."""
        return process.marked(f"{self.incarnations[node]}.")

    def ranks_and_pool(self, node: str = "n0") -> list[int]:
        """What :meth:`alive` finds, without the persister."""
        return [pid for pid in self.alive(node) if "launcher.host.persist.main" not in process.command_line(pid)]

    def none_left(self, node: str = "n0") -> bool:
        """Wait until nothing below the agent of a node is alive."""
        return process.wait_until(lambda: not self.alive(node), PATIENCE_S)

    def close(self) -> None:
        """End everything; fails if an agent that ended by itself had left a process behind."""
        orphans = {node: self.alive(node) for node, popen in self.started.items() if popen.poll() is not None}
        for watcher in self.watchers:
            watcher.gang.close()
        for node, popen in self.started.items():
            popen.kill()
            popen.wait()
            process.kill_marked(f"{self.incarnations[node]}.")
        assert not any(orphans.values()), f"processes that survived their agent: {orphans}"


@contextmanager
def agents_in(root: Path) -> Iterator[Agents]:
    """Agents that are gone at the end."""
    agents = Agents(root)
    try:
        yield agents
    finally:
        agents.close()

"""``cluster=local``: a Ray cluster of several nodes on this machine, started and ended by phalanx.

A *keeper* process (``python -P -m launcher.embedded RUN_DIR ...``, its own session) starts a Ray head without slots and
the nodes, each a ``ray start --block`` in a session of its own with a mark in its environment. The keeper outlives
a killed client, so that a running gang can be adopted, and ends everything that it started when it is told to, when the
run is over and nobody controls it, or when neither a controller nor a step has been seen for ``keep_s``. When the
keeper itself is killed, the kernel ends its children. How to reach the cluster is in ``<run dir>/cluster.json``.

Everything is bound to 127.0.0.1 and asks for a token that is made for this cluster.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import launcher
from jobs.paths import RunPaths
from launcher.host import process
from launcher.lock import process_started
from launcher.store import read_json
from strategies.errors import ClusterError, StorageError

NODE_MARK = "PHALANX_NODE"
"""Environment variable of every process of a node: ``<run>/<index>``, or ``<run>/head``."""

LOG_NAME = "cluster.log"
TEMP_PREFIX = "phx-"
_POLL_S = 0.1


def node_mark(run_dir: Path, index: int | str) -> str:
    """Mark of one node. Contains a digest of the path, since two runs in different folders may share a name."""
    digest = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
    return f"{run_dir.name}-{digest}/{index}"


def members(mark: str, home: str = "") -> set[int]:
    """Living processes of one node, or of all nodes of a run.

    Those that carry the mark or stand below the node's folder, their sessions and all of their descendants: a process
    that sets its title may overwrite its environment.

    Args:
        mark: From :func:`node_mark`; for all nodes it ends in ``/``.
        home: Folder of the node, or of all nodes.
    """
    rows = _processes()
    found = {pid for pid in rows if _carries(pid, mark) or (home and _stands_below(pid, home))}
    # A session belongs to the node if the process that made it does, or is gone.
    sessions = {session for pid in found if (session := rows[pid][1]) in found or session not in rows} - {0, 1}
    found |= {pid for pid, (_, session) in rows.items() if session in sessions}
    return (found | _below(found, rows)) - {os.getpid()}


def _stands_below(pid: int, home: str) -> bool:
    try:
        folder = os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)")
    except OSError:
        return False
    return folder == home or folder.startswith(home + "/")


def descendants(pid: int) -> set[int]:
    """Living processes below ``pid``."""
    return _below({pid}, _processes())


def _processes() -> dict[int, tuple[int, int]]:
    """Living processes: process id -> parent, session."""
    return {pid: process.parent_and_session(pid) for pid in process.all_pids() if process.is_running(pid)}


def _below(found: set[int], rows: Mapping[int, tuple[int, int]]) -> set[int]:
    above, below = set(found), set[int]()
    while more := {pid for pid, (parent, _) in rows.items() if parent in above} - above:
        above |= more
        below |= more
    return below


def _carries(pid: int, mark: str) -> bool:
    value = process.environment(pid).get(NODE_MARK, "")
    return value.startswith(mark) if mark.endswith("/") else value == mark


def kill_members(mark: str, home: str = "", *, timeout_s: float = 10.0) -> set[int]:
    """SIGKILL every process of a node, again and again until none is left; returns those that would not go."""
    deadline = time.monotonic() + timeout_s
    seen: set[int] = set()
    while True:
        seen = {pid for pid in seen if process.is_running(pid)} | members(mark, home)
        if not seen or time.monotonic() > deadline:
            return seen
        for pid in seen:
            process.send(pid, signal.SIGKILL)
        time.sleep(0.02)


class EmbeddedCluster:
    """The client's view of an embedded cluster; many may look at the same one.

    Args:
        run_dir: The run directory that the cluster serves.
    """

    _keeper = "launcher.embedded"  # the keeper's main module

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir.resolve()
        self._paths = RunPaths(self.run_dir)

    @classmethod
    def find(cls, run_dir: Path) -> Self | None:
        """The cluster that serves a run, if its keeper lives and it is ready."""
        cluster = cls(run_dir)
        return cluster if cluster.alive() and cluster.record().get("state") == "ready" else None

    @classmethod
    def start(
        cls,
        run_dir: Path,
        *,
        nodes: int,
        slots_per_node: int,
        enough: int | None = None,
        keep_s: float = 120.0,
        progress: Callable[[int, int], None] = lambda done, total: None,
        timeout_s: float = 240.0,
    ) -> Self:
        """Start a cluster, or return the one that serves the run already, if it is of the right size.

        A node that was lost is not missed as long as enough are left: a gang may live on them.

        Args:
            run_dir: An existing run directory.
            nodes: Nodes with slots, spares included.
            slots_per_node: CPUs that each node offers.
            enough: Nodes that the gang needs; all of them if not given.
            keep_s: Without a controller and without a step for so long, the cluster ends itself.
            progress: Called with (nodes that are up, nodes to come up); the head counts as one.
            timeout_s: Patience.

        Raises:
            ClusterError: It did not come up; nothing is left of it.
        """
        found = cls.find(run_dir)
        if found is not None and found._serves(nodes if enough is None else enough, slots_per_node):
            return found
        cluster = cls(run_dir)
        cluster.stop()
        command = [sys.executable, "-P", "-m", cls._keeper, str(cluster.run_dir)]
        command += [str(nodes), str(slots_per_node), str(keep_s)]
        with open(cluster.run_dir / LOG_NAME, "ab") as log:
            keeper = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_own_environment(),
            )
        try:
            cluster._wait_ready(keeper, nodes + 1, progress, timeout_s)
        except BaseException:
            cluster._end_keeper(keeper.pid)
            keeper.wait()
            raise
        keeper.returncode = 0  # it lives on without us: nobody waits for it here
        return cluster

    def record(self) -> dict[str, Any]:
        """Content of ``cluster.json``; empty when there is none."""
        try:
            value = read_json(self._paths.cluster)
        except StorageError:
            return {}
        return value if isinstance(value, dict) and value.get("kind") == "local" else {}

    @property
    def address(self) -> str:
        """``IP:PORT`` of the head."""
        return str(self.record()["address"])

    @property
    def token_path(self) -> Path:
        """File with the token of this cluster."""
        return Path(self.record()["token_path"])

    def alive(self) -> bool:
        """Whether the keeper lives."""
        keeper = self.record().get("keeper", {})
        return bool(keeper) and process_started(int(keeper["pid"])) == int(keeper["started"])

    def processes(self) -> set[int]:
        """Living processes of the cluster, without the keeper."""
        return members(node_mark(self.run_dir, ""), str(self.record().get("temp_dir", "")))

    def kill_node(self, index: int) -> None:
        """SIGKILL everything on one node, as a power cut would."""
        left = kill_members(node_mark(self.run_dir, index), str(Path(self.record()["temp_dir"]) / str(index)))
        if left:
            raise ClusterError(f"Processes {sorted(left)} of node {index} cannot be killed.")

    def stop(self, *, timeout_s: float = 30.0) -> None:
        """End the cluster and wait until nothing of it is left. Safe to call twice.

        Raises:
            ClusterError: Processes are left.
        """
        if self.alive():
            self._end_keeper(int(self.record()["keeper"]["pid"]), timeout_s)
        left = kill_members(node_mark(self.run_dir, ""), str(self.record().get("temp_dir", "")))
        if left:
            raise ClusterError(f"Processes {sorted(left)} of the local cluster of '{self.run_dir.name}' will not end.")
        temp = Path(self.record().get("temp_dir", ""))
        if temp.name.startswith(TEMP_PREFIX):  # a keeper that was killed has left it
            shutil.rmtree(temp, ignore_errors=True)

    def _end_keeper(self, pid: int, timeout_s: float = 30.0) -> None:
        process.send(pid, signal.SIGTERM)
        if not process.wait_until(lambda: not process.is_running(pid), timeout_s):
            process.send(pid, signal.SIGKILL)
            process.wait_until(lambda: not process.is_running(pid), 5.0)

    def _serves(self, nodes: int, slots: int) -> bool:
        """Whether the head lives and enough nodes with it, all of the right size."""
        living = [
            node for node in self.record().get("nodes", []) if process_started(int(node["pid"])) == int(node["started"])
        ]
        sizes = [int(node["slots"]) for node in living if node["index"] != "head"]
        return len(sizes) < len(living) and len(sizes) >= nodes and set(sizes) == {slots}

    def _wait_ready(
        self, keeper: subprocess.Popen[bytes], total: int, progress: Callable[[int, int], None], timeout_s: float
    ) -> None:
        deadline, shown = time.monotonic() + timeout_s, -1
        while True:
            record = self.record()
            mine = record.get("keeper", {}).get("pid") == keeper.pid
            up = sum(bool(node["ready"]) for node in record["nodes"]) if mine else 0
            if up != shown:
                shown = up
                progress(up, total)
            if mine and record["state"] == "ready":
                return
            ended = keeper.poll() is not None
            if ended or time.monotonic() > deadline:
                reason = self.record().get("reason") or f"only {up} of {total} Ray nodes came up in {timeout_s:.0f} s"
                raise ClusterError(
                    "The local Ray cluster did not start.",
                    why=str(reason),
                    hint=f"See {self.run_dir / LOG_NAME}; fewer nodes (cluster.nodes) need less memory and time.",
                )
            time.sleep(_POLL_S)


def _own_environment() -> dict[str, str]:
    """For the keeper and its nodes: our packages first, so that no folder of the user's shadows them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    root = str(Path(str(launcher.__file__)).resolve().parents[1])
    kept = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", root)]
    return environment | {"PYTHONPATH": os.pathsep.join([root, *kept])}


if __name__ == "__main__":
    from launcher.keeper import Keeper

    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(Keeper(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])).run())

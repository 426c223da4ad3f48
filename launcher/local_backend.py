"""A cluster of plain processes on this machine: every node is one host agent on the loopback interface, without Ray.

The agents are detached from the client that started them: they live in sessions of their own, survive its death, and
are found again by their announcements in the run directory. A node is lost when its agent is; its name is not used
again unless lost nodes are to be replaced. In a rehearsal a node may be elsewhere (:mod:`launcher.sites`).
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jobs.paths import RunPaths
from launcher import sites
from launcher.backend import AgentAddress, NodeInfo
from launcher.host import announce, process, wire
from launcher.host.agent import AgentOptions
from launcher.host.environment import packages_root
from launcher.host.logs import tail
from launcher.lock import displaced
from strategies.errors import ClusterError
from strategies.specs import ClusterSpec

_AGENT_MODULE = "launcher.host.agent"
_LOOPBACK = "127.0.0.1"
_RELEASE_S = 15.0


class LocalBackend:
    """See :class:`launcher.backend.Backend`.

    Args:
        paths: The run directory.
        cluster: How many nodes, spares and slots per node.
        options: How agents behave; their ``incarnation`` is ignored.
        replace_lost: A lost node may be started again by ``request_agents``.

    Raises:
        StorageError: The run's secret can be neither read nor made.
    """

    def __init__(
        self,
        paths: RunPaths,
        cluster: ClusterSpec,
        *,
        options: AgentOptions | None = None,
        replace_lost: bool = False,
    ) -> None:
        self._secret = wire.make_secret(paths.secret)
        self._paths = paths
        self._slots = cluster.slots_per_node
        self._names = [f"node{index}" for index in range(cluster.nodes + cluster.spares)]
        self._options = options or AgentOptions()
        self._replace_lost = replace_lost
        self._sites = sites.read(paths)
        self._started: dict[str, tuple[str, int]] = {}
        self._lost: set[str] = set()
        self._forgotten: set[str] = set()
        self._wanted = 0
        # Announcements of processes that are gone belong to an earlier life of the run: those nodes are new again.
        for address in announce.read_all(paths):
            if not _is_agent(address.pid, address.incarnation):
                announce.remove(paths, address)

    def nodes(self) -> list[NodeInfo]:
        """The nodes of the configuration; a lost one is not alive."""
        self._note_deaths()
        return [
            NodeInfo(node=name, address=self._address(name), slots=self._slots, alive=name not in self._lost)
            for name in self._names
        ]

    def request_agents(self, count: int) -> None:
        """Start agents until ``count`` of them live or start, in the order of the nodes' names."""
        self._note_deaths()
        self._wanted = count
        if self._replace_lost:
            self._lost.clear()
        taken = {address.node for address in self._living()} | set(self._started)
        for name in self._names:
            if len(taken) >= count:
                return
            if name not in taken and name not in self._lost:
                self._start(name)
                taken.add(name)

    def agents(self) -> list[AgentAddress]:
        """The agents that live and have announced themselves."""
        self._note_deaths()
        return self._living()

    def _living(self) -> list[AgentAddress]:
        return [
            address
            for address in announce.read_all(self._paths)
            if address.incarnation not in self._forgotten and _is_agent(address.pid, address.incarnation)
        ]

    def forget(self, agent: AgentAddress) -> None:
        """The agent is of no use: kill it if it still lives and is here, and count its node as lost."""
        self._forgotten.add(agent.incarnation)
        self._lost.add(agent.node)
        if agent.node not in self._sites:
            self._end(agent.pid, agent.incarnation)
        announce.remove(self._paths, agent)
        self._note_deaths()

    def why_missing(self) -> str:
        """Which nodes have no agent, and the last words of those that ended."""
        self._note_deaths()
        reasons = []
        present = {address.node for address in self.agents()}
        for name in self._names:
            if name in self._lost:
                last_words = tail(self._log(name), 300).strip().replace("\n", " | ")
                reasons.append(f"{name} was lost" + (f" (its agent said: {last_words})" if last_words else ""))
            elif name in self._started and name not in present:
                reasons.append(f"{name} is starting")
        usable = len(self._names) - len(self._lost)
        if self._wanted > usable:
            reasons.append(f"{self._wanted} agents are wanted, {usable} nodes are left")
        return "; ".join(reasons) if reasons else "no agent is missing"

    def release(self) -> None:
        """End every agent with everything below it, and wait until all of it is gone."""
        for incarnation, pid in self._started.values():
            process.wait_until(partial(_can_be_told, pid, incarnation), 5.0)
        living = {address.incarnation: address.pid for address in self._announced()}
        living |= dict(self._started.values())
        living = {incarnation: pid for incarnation, pid in living.items() if _is_agent(pid, incarnation)}
        for pid in living.values():
            process.send(pid, signal.SIGTERM)
        patience_s = self._options.grace_s + _RELEASE_S
        process.wait_until(lambda: not any(_is_agent(pid, word) for word, pid in living.items()), patience_s)
        for incarnation, pid in living.items():
            self._end(pid, incarnation)
        for _, pid in self._started.values():
            _has_ended(pid, wait=True)
        self._started.clear()
        for address in self._announced():
            announce.remove(self._paths, address)

    def _announced(self) -> Sequence[AgentAddress]:
        """Agents of this run: none of those of another that was begun where its directory has been."""
        return () if displaced(self._paths, self._secret) else announce.read_all(self._paths)

    def close(self) -> None:
        """Leave the agents as they are."""
        self._note_deaths()

    def _log(self, node: str) -> Path:
        return self._paths.agents / f"{node}.log"

    def _address(self, node: str) -> str:
        return self._sites[node].address if node in self._sites else _LOOPBACK

    def _start(self, node: str) -> None:
        incarnation = secrets.token_hex(8)
        options = self._options
        enter = self._sites[node].enter if node in self._sites else ()
        command = [*enter, sys.executable, "-P", "-m", _AGENT_MODULE, "--incarnation", incarnation]
        command += ["--run-dir", str(self._paths.root), "--node", node]
        command += ["--bind", self._address(node), "--slots", str(self._slots)]
        command += ["--detect-s", str(options.detect_s), "--lease-s", str(options.lease_s)]
        command += ["--grace-s", str(options.grace_s), "--preempt-grace-s", str(options.preempt_grace_s)]
        command += ["--kill-patience-s", str(options.kill_patience_s)]
        command += ["--max-log-bytes", str(options.max_log_bytes)]
        command += ["--warm", options.warm, "--target", options.target, "--log-parent", options.log_parent]
        path = os.pathsep.join(filter(None, [str(packages_root()), os.environ.get("PYTHONPATH", "")]))
        self._paths.agents.mkdir(parents=True, exist_ok=True)
        environment = os.environ | options.env | {"PYTHONPATH": path}
        try:
            with open(self._log(node), "ab") as log, open(os.devnull, "rb") as nothing:
                # Not subprocess: the agents may outlive this object, which a Popen object would complain about.
                streams = [(os.POSIX_SPAWN_DUP2, file.fileno(), fd) for fd, file in enumerate((nothing, log, log))]
                pid = os.posix_spawnp(command[0], command, environment, file_actions=streams, setsid=True)
        except OSError as error:
            raise ClusterError(f"Cannot start an agent for {node}.", why=str(error)) from error
        self._started[node] = (incarnation, pid)

    def _note_deaths(self) -> None:
        """Reap the agents that ended, and count nodes whose agent is gone as lost."""
        for node, (_, pid) in list(self._started.items()):
            if _has_ended(pid):
                del self._started[node]
                self._lost.add(node)
        for address in announce.read_all(self._paths):
            if not _is_agent(address.pid, address.incarnation):
                if self._started.get(address.node) == (address.incarnation, address.pid):
                    del self._started[address.node]
                    _has_ended(address.pid, wait=True)  # dying processes lose their name before they can be reaped
                self._lost.add(address.node)
                announce.remove(self._paths, address)

    def _end(self, pid: int, incarnation: str) -> None:
        if _is_agent(pid, incarnation):
            process.send(pid, signal.SIGKILL)
            process.wait_until(lambda: not _is_agent(pid, incarnation), 5.0)
        process.kill_marked(f"{incarnation}.")


def _is_agent(pid: int, incarnation: str) -> bool:
    """Whether ``pid`` is this very agent, and no later process that was given the same number."""
    return incarnation in process.command_line(pid) and process.is_running(pid)


def _can_be_told(pid: int, incarnation: str) -> bool:
    """False in the moment after a start in which the kernel does not show the new program's arguments yet."""
    return _is_agent(pid, incarnation) or _has_ended(pid)


def _has_ended(pid: int, *, wait: bool = False) -> bool:
    """Whether a child of ours has ended; reaps it."""
    try:
        return os.waitpid(pid, 0 if wait else os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True

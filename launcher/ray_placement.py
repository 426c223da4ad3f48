"""Where the agents of a run go on a Ray cluster: the arithmetic of :mod:`launcher.ray_backend`, without Ray.

Agents are started wherever a bundle has been placed (:mod:`launcher.ray_reservations`) and no agent lives. Actors are
named after run and node: any controller, this one or its successor, finds them again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths
from launcher.backend import AgentAddress, NodeInfo
from launcher.host import announce
from launcher.ray_reservations import RESERVING_S, Bundle, Ray, RayNode, Reservations, device, device_count
from strategies.specs import ClusterSpec

RESTART_AGENT_AFTER_S = 5.0  # an agent that dies at once must not be started over and over
SHUN_S = 30.0  # the node of a lost agent: any other one is better for so long
LEAVE_S = 10.0  # beyond the grace for ranks, for an agent that was told to leave


class AgentPlacement:
    """Agents on the nodes of a Ray cluster; all of :class:`launcher.backend.Backend` except ``close``.

    Args:
        run_dir: The run directory.
        cluster: What the run needs.
        ray: The cluster.
        agent_options: Fields of :class:`launcher.host.agent.AgentOptions`.
        clock: Monotonic seconds.
        sleep: Lets time pass.
    """

    def __init__(
        self,
        run_dir: Path,
        cluster: ClusterSpec,
        ray: Ray,
        *,
        agent_options: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._paths = RunPaths(run_dir.resolve())
        self._spec, self._ray, self._clock, self._sleep = cluster, ray, clock, sleep
        self._options = dict(agent_options or {})
        self._prefix = f"phalanx-{run_key(self._paths.root)}-"
        self._need = max(1, cluster.slots_per_node)
        self._wanted = 0
        self._reservations = Reservations(ray, self._prefix, self._need, clock)
        self._shunned: dict[str, float] = {}  # node -> until when
        self._leaving: dict[str, float] = {}  # actor that was told to leave -> when it is killed
        self._starts: dict[str, tuple[float, object]] = {}  # node -> when its agent was last started, its handle

    # --- nodes ----------------------------------------------------------------------------------------------------

    def nodes(self) -> list[NodeInfo]:
        """Every node that is up and has a device."""
        return [
            NodeInfo(node=node.node, address=node.address, slots=self._slots(node))
            for node in self._ray.nodes()
            if device_count(node.total)
        ]

    def _slots(self, node: RayNode) -> int:
        devices, cap = device_count(node.total), self._spec.slots_per_node
        return min(devices, cap) if cap else devices

    # --- agents ---------------------------------------------------------------------------------------------------

    def request_agents(self, count: int) -> None:
        """Reserve what is missing and start agents where bundles are; returns at once."""
        self._wanted = count
        self._advance({node.node: node for node in self._ray.nodes()})

    @property
    def starting(self) -> int:
        """How many agents this object has started."""
        return len(self._starts)

    def complaint(self) -> str:
        """Why an agent that this object has started has ended, as far as it is known; empty when none has."""
        return next(filter(None, (self._ray.complaint(handle) for _, handle in self._starts.values())), "")

    def _advance(self, nodes: Mapping[str, RayNode]) -> None:
        gang = min(self._wanted, self._spec.nodes)
        living = self._actors()
        staying = living - self._leaving.keys()
        shunned = {node for node in self._shunned if self._is_shunned(node) and self._agent_name(node) not in staying}
        held = self._reservations.advance(nodes, gang=gang, wanted=self._wanted, shunned=shunned)
        self._start_agents(nodes, held, living)

    def _is_shunned(self, node: str) -> bool:
        return self._clock() < self._shunned.get(node, float("-inf"))

    def _start_agents(self, nodes: Mapping[str, RayNode], bundles: Sequence[Bundle], living: set[str]) -> None:
        """Start an agent in as many placed bundles as are wanted; on nodes that lost one only if there is no other."""
        now, staying = self._clock(), living - self._leaving.keys()
        room = self._wanted - sum(self._agent_name(node) in staying for node in nodes)
        placed = [bundle for bundle in bundles if bundle.node in nodes]
        for bundle in sorted(placed, key=lambda bundle: self._is_shunned(bundle.node)):
            name, last = self._agent_name(bundle.node), self._starts.get(bundle.node, (float("-inf"), None))[0]
            if room <= 0 or name in living or now - last < RESTART_AGENT_AFTER_S:
                continue
            node = nodes[bundle.node]
            arguments = (str(self._paths.root), node.node, node.address, self._slots(node), self._options)
            self._starts[node.node] = (now, self._ray.start_agent(name, bundle, arguments, self._paths.root))
            room -= 1

    def _actors(self) -> set[str]:
        """Names of the agents that live or start; those that were told to leave and do not are killed here."""
        living = self._ray.actors(f"{self._prefix}agent-")
        for name, deadline in list(self._leaving.items()):
            if name not in living:
                del self._leaving[name]
            elif self._clock() > deadline:
                self._ray.kill(name)
        return living

    def _agent_name(self, node: str) -> str:
        return f"{self._prefix}agent-{node}"

    def agents(self) -> list[AgentAddress]:
        """Announced agents whose actor and node Ray does not know to be dead. Goes on with what was requested."""
        nodes, staying = {node.node: node for node in self._ray.nodes()}, self._actors() - self._leaving.keys()
        found = [
            agent
            for agent in announce.read_all(self._paths)
            if agent.node in nodes and self._agent_name(agent.node) in staying
        ]
        if len(found) < self._wanted or self._reservations.waits:
            self._advance(nodes)
        return found

    def forget(self, agent: AgentAddress) -> None:
        """Tell the agent to leave, and kill it later if it does not; ``request_agents`` will look for another node."""
        announce.remove(self._paths, agent)
        self._shunned[agent.node] = self._clock() + SHUN_S
        self._stop(self._agent_name(agent.node), "forgotten by the controller")

    def _stop(self, name: str, reason: str) -> None:
        self._leaving[name] = self._clock() + float(self._options.get("grace_s", 5.0)) + LEAVE_S
        self._ray.stop(name, reason)

    def why_missing(self) -> str:
        """What went wrong on nodes that have a place; else the nodes that exist against those that are needed."""
        nodes, bundles, living = self._ray.nodes(), self._reservations.placed(), self._actors()
        up = {node.node: node for node in nodes}
        for name, (_, handle) in self._starts.items():
            complaint = self._ray.complaint(handle) if name in up and self._agent_name(name) not in living else ""
            if complaint:
                return f"the agent on {up[name].address} ended: {complaint}"
        placed = [up[bundle.node] for bundle in bundles if bundle.node in up]
        if len(placed) >= self._wanted:
            where = [node.address for node in placed if self._agent_name(node.node) in living]
            return f"agents are starting on {', '.join(where) or 'their nodes'}"
        if self._reservations.age_s < RESERVING_S / 3:
            return f"{_count(self._wanted)} are being reserved"
        usable = len(placed) + len(self._reservations.free(nodes, {bundle.node for bundle in bundles}))
        large = sum(device_count(node.total) >= self._need for node in nodes)
        return (
            f"the cluster has {_count(usable)} with >= {self._need} free {device(nodes, self._need)}s for this run "
            f"({large} of that size {'is' if large == 1 else 'are'} up), the run asks for {self._wanted}"
        )

    # --- the end --------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """End every agent of the run with its ranks, and give back what was reserved."""
        announced = {self._agent_name(agent.node) for agent in announce.read_all(self._paths)}
        for name in self._ray.actors(f"{self._prefix}agent-"):
            if name in announced or name in self._leaving:
                self._stop(name, "the run is released")
            else:
                self._ray.kill(name)  # it has nothing yet that would outlive it
        while self._actors():
            self._sleep(0.05)
        self._reservations.give_back()
        self._wanted = 0
        for agent in announce.read_all(self._paths):
            announce.remove(self._paths, agent)
        self._starts.clear()


def run_key(run_dir: Path) -> str:
    """Name of a run that is unique in a cluster: runs in different folders may be called the same."""
    return f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"


def _count(number: int) -> str:
    return f"{number} node" if number == 1 else f"{number} nodes"

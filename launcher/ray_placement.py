"""Where the agents of a run go on a Ray cluster: the arithmetic of :class:`launcher.ray_backend.RayBackend`, without Ray.

The gang is one placement group, so that it is reserved at once or not at all: two runs that each hold half of a cluster
would wait for each other for ever. It is spread strictly, one bundle per node, and a bundle takes all devices that are
free there, so nodes are whole. Nodes beyond the gang (spares) are groups of one bundle, made only when a node is free,
so that a missing spare holds nothing up. Ray moves the bundle of a lost node to a free one; agents are started wherever
a bundle has been placed and no agent lives. Actors are named after run and node: any controller, this one or its
successor, finds them again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jobs.paths import RunPaths
from launcher.backend import AgentAddress, NodeInfo
from launcher.host import announce
from strategies.specs import ClusterSpec

RESTART_AGENT_AFTER_S = 5.0  # an agent that dies at once must not be started over and over
RESERVING_S = 3.0

Resources = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class RayNode:
    """A living node, as Ray reports it.

    Attributes:
        node: Ray's identity of it.
        address: Its address in the cluster.
        total: All of its resources.
        free: What of them nobody has reserved.
    """

    node: str
    address: str
    total: Resources
    free: Resources


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """One place of a placement group.

    Attributes:
        group: Name of the group.
        index: Number of the bundle in it.
        resources: What it reserves.
        node: Where it has been placed; empty while it is not.
    """

    group: str
    index: int
    resources: Resources
    node: str


class Ray(Protocol):
    """The few calls that placing agents takes. All return at once."""

    def nodes(self) -> list[RayNode]:
        """The living nodes."""

    def bundles(self, prefix: str) -> list[Bundle]:
        """Bundles of every placement group whose name begins with ``prefix``."""

    def reserve(self, group: str, bundles: Sequence[Resources]) -> None:
        """Ask for a detached group, spread strictly."""

    def unreserve(self, prefix: str) -> None:
        """Remove groups."""

    def start_agent(self, name: str, bundle: Bundle, arguments: tuple[Any, ...], run_dir: Path) -> object:
        """Start a named, detached agent in a bundle; returns a handle for :meth:`complaint`."""

    def complaint(self, started: object) -> str:
        """Why a started agent has ended, as far as it is known; empty when it has not."""

    def actors(self, prefix: str) -> set[str]:
        """Names of the actors that live or start."""

    def kill(self, name: str) -> None:
        """Kill an actor for good; none of that name is no error."""


class AgentPlacement:
    """Agents on the nodes of a Ray cluster; all of :class:`launcher.backend.Backend` except ``close``.

    Args:
        run_dir: The run directory.
        cluster: What the run needs.
        ray: The cluster.
        agent_options: Fields of :class:`launcher.host.agent.AgentOptions`.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        cluster: ClusterSpec,
        ray: Ray,
        *,
        agent_options: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = RunPaths(run_dir.resolve())
        self._spec, self._ray, self._clock = cluster, ray, clock
        self._options = dict(agent_options or {})
        self._prefix = f"phalanx-{run_key(self._paths.root)}-"
        self._need = max(1, cluster.slots_per_node)
        self._wanted = 0
        self._reserved_at = float("-inf")
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
        nodes, bundles = self._ray.nodes(), self._ray.bundles(self._prefix)
        if not bundles:
            gang = min(count, self._spec.nodes)
            self._reserve("gang", [self._bundle(nodes, gang)] * gang)
            bundles = self._ray.bundles(self._prefix)
        spares = self._free(nodes, bundles)[: max(0, count - len(bundles))]
        groups = len({bundle.group for bundle in bundles})
        # The gang takes its nodes first: while it waits for its place, what is free is not spare.
        if spares and all(bundle.node for bundle in bundles if bundle.group.endswith("gang")):
            for number, _ in enumerate(spares, start=groups):
                self._reserve(f"more{number}", [self._bundle(spares, 1)])
            bundles = self._ray.bundles(self._prefix)
        self._start_agents(nodes, bundles)

    def _reserve(self, suffix: str, bundles: Sequence[Resources]) -> None:
        self._reserved_at = self._clock()
        self._ray.reserve(self._prefix + suffix, bundles)

    def _bundle(self, nodes: Sequence[RayNode], count: int) -> Resources:
        """All that is free on each of the ``count`` best nodes, so that nobody else fits there."""
        free = sorted((node.free for node in self._free(nodes, ())), key=device_count, reverse=True)[:count]
        if len(free) < count:
            return {"CPU": float(self._need)}
        least = {kind: min(int(have.get(kind, 0.0)) for have in free) for kind in ("CPU", "GPU")}
        return {kind: float(number) for kind, number in least.items() if number}

    def _free(self, nodes: Sequence[RayNode], bundles: Sequence[Bundle]) -> list[RayNode]:
        """Nodes that could carry an agent and carry none of our bundles."""
        taken = {bundle.node for bundle in bundles}
        return [node for node in nodes if node.node not in taken and device_count(node.free) >= self._need]

    def _start_agents(self, nodes: Sequence[RayNode], bundles: Sequence[Bundle]) -> None:
        up = {node.node: node for node in nodes}
        living, now = self._ray.actors(self._prefix), self._clock()
        for bundle in bundles:
            node = up.get(bundle.node)
            if node is None or self._agent_name(node.node) in living:
                continue
            if now - self._starts.get(node.node, (float("-inf"), None))[0] >= RESTART_AGENT_AFTER_S:
                arguments = (str(self._paths.root), node.node, node.address, self._slots(node), self._options)
                handle = self._ray.start_agent(self._agent_name(node.node), bundle, arguments, self._paths.root)
                self._starts[node.node] = (now, handle)

    def _agent_name(self, node: str) -> str:
        return f"{self._prefix}agent-{node}"

    def agents(self) -> list[AgentAddress]:
        """Announced agents whose actor and node Ray does not know to be dead."""
        announced = announce.read_all(self._paths)
        if not announced:
            return []
        up = {node.node for node in self._ray.nodes()}
        living = self._ray.actors(self._prefix)
        return [agent for agent in announced if agent.node in up and self._agent_name(agent.node) in living]

    def forget(self, agent: AgentAddress) -> None:
        """Kill what is left of the agent; ``request_agents`` will start another where its bundle then is."""
        announce.remove(self._paths, agent)
        self._ray.kill(self._agent_name(agent.node))

    def why_missing(self) -> str:
        """What went wrong on nodes that have a place; else the nodes that exist against those that are needed."""
        nodes, bundles, living = self._ray.nodes(), self._ray.bundles(self._prefix), self._ray.actors(self._prefix)
        for node, (_, handle) in self._starts.items():
            complaint = self._ray.complaint(handle)
            if complaint and self._agent_name(node) not in living:
                return f"the agent on node {node} ended: {complaint}"
        up = {node.node: node for node in nodes}
        placed = [up[bundle.node] for bundle in bundles if bundle.node in up]
        if len(placed) >= self._wanted:
            where = [node.address for node in placed if self._agent_name(node.node) in living]
            return f"agents are starting on {', '.join(where) or 'their nodes'}"
        if self._clock() - self._reserved_at < RESERVING_S:
            return "nodes are being reserved"
        device = "GPUs" if any(node.total.get("GPU") for node in nodes) else "CPUs"
        usable = len(placed) + len(self._free(nodes, bundles))
        large = sum(device_count(node.total) >= self._need for node in nodes)
        return (
            f"the cluster has {_count(usable)} with >= {self._need} free {device} for this run "
            f"({large} of that size {'is' if large == 1 else 'are'} up), the run asks for {self._wanted}"
        )

    # --- the end --------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Kill every agent of the run and give back what was reserved."""
        for name in self._ray.actors(f"{self._prefix}agent-"):
            self._ray.kill(name)
        self._ray.unreserve(self._prefix)
        for agent in announce.read_all(self._paths):
            announce.remove(self._paths, agent)
        self._starts.clear()


def run_key(run_dir: Path) -> str:
    """Name of a run that is unique in a cluster: runs in different folders may be called the same."""
    return f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"


def device_count(resources: Resources) -> int:
    """Number of devices that ranks can use: GPUs where there are any, else CPUs."""
    return int(resources.get("GPU", 0)) or int(resources.get("CPU", 0))


def _count(number: int) -> str:
    return f"{number} node" if number == 1 else f"{number} nodes"

"""Where the agents of a run go on a Ray cluster: the arithmetic of :mod:`launcher.ray_backend`, without Ray.

The gang is one placement group, so that it is reserved at once or not at all: two runs that each hold half of a cluster
would wait for each other for ever. A bundle takes all devices that are free on its node, so nodes are whole. Nodes
beyond the gang (spares, and what takes the place of a lost node) are groups of one bundle, made only when a node is
free, so that a missing spare holds nothing up. Agents are started wherever a bundle has been placed and no agent lives.
Actors are named after run and node: any controller, this one or its successor, finds them again.

Every bundle is bound to its node. One that may go anywhere is moved by Ray when its node is lost, and while there is no
free node for it the head tries that without a pause, with a whole processor (``OnPlacementGroupCreationFailed`` of
gcs_placement_group_manager.cc puts it in front of the queue again; ray-project/ray#65007). A bundle that is bound to a
node which is gone waits quietly. So a run that finds too few free nodes queues with a group that is bound to nothing,
which Ray grants in its turn and an autoscaler sees, and changes it for a bound one as soon as it is granted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from jobs.paths import RunPaths
from launcher.backend import AgentAddress, NodeInfo
from launcher.host import announce
from strategies.specs import ClusterSpec

RESTART_AGENT_AFTER_S = 5.0  # an agent that dies at once must not be started over and over
RESERVING_S = 10.0  # a free node that Ray has not given us by then has gone to somebody else
SHUN_S = 30.0  # the node of a lost agent: any other one is better for so long
LEAVE_S = 10.0  # beyond the grace for ranks, for an agent that was told to leave

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

    @property
    def free_devices(self) -> int:
        """How many of its devices are free: of a node with GPUs the GPUs, even where only processors are left."""
        return int(self.free.get("GPU" if int(self.total.get("GPU", 0)) else "CPU", 0.0))


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

    def reserve(self, group: str, bundles: Sequence[Resources], nodes: Sequence[str] = ()) -> None:
        """Ask for a detached group, spread strictly; with ``nodes`` each bundle on its own one, or nowhere."""

    def unreserve(self, prefix: str) -> None:
        """Remove groups."""

    def start_agent(self, name: str, bundle: Bundle, arguments: tuple[Any, ...], run_dir: Path) -> object:
        """Start a named, detached agent in a bundle; returns a handle for :meth:`complaint`."""

    def complaint(self, started: object) -> str:
        """Why a started agent has ended, as far as it is known; empty when it has not."""

    def actors(self, prefix: str) -> set[str]:
        """Names of the actors that live or start."""

    def stop(self, name: str, reason: str) -> None:
        """Tell an agent to end its ranks and itself; one that does not listen is no error."""

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
        self._reserved: dict[str, float] = {}  # group -> when
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
        """The next of: reserve the gang, reserve spares once it has its place, start agents."""
        bundles, queued = self._bundles()
        if not any(bundle.node in nodes for bundle in bundles):
            self._gather(nodes, bundles, queued)
            bundles, queued = self._bundles()
        # The gang takes its nodes first: while it waits for its place, what is free is not spare.
        if any(bundle.node in nodes for bundle in bundles):
            self._unreserve(queued)
            self._top_up(nodes, bundles)
            self._start_agents(nodes, self._bundles()[0])

    def _bundles(self) -> tuple[list[Bundle], list[Bundle]]:
        """What is ours to start agents in, and what only stands in the queue."""
        bundles = self._ray.bundles(self._prefix)
        queued = [bundle for bundle in bundles if bundle.group.startswith(f"{self._prefix}queued-")]
        return [bundle for bundle in bundles if bundle not in queued], queued

    def _gather(self, nodes: Mapping[str, RayNode], bundles: Sequence[Bundle], queued: Sequence[Bundle]) -> None:
        """Reserve the gang where the queue has granted it, else on free nodes; where they are too few, queue."""
        if self._drop_stale(bundles):
            return
        gang = min(self._wanted, self._spec.nodes)
        granted = [_given_back(nodes[bundle.node], bundle) for bundle in queued if bundle.node in nodes]
        free = sorted(self._free(nodes.values(), bundles), key=lambda node: -node.free_devices)
        places = granted or free[:gang]
        if len(places) == gang and (granted or not queued):
            self._reserve("gang", places)  # before what stands in the queue is given back, so that it is next
            self._unreserve(queued)
        elif granted:  # and half lost again
            self._unreserve(queued)
        elif not queued:
            device = "GPU" if any(node.total.get("GPU") for node in nodes.values()) else "CPU"
            self._ray.reserve(self._new_group("queued"), [{device: float(self._need)}] * gang)

    def _new_group(self, kind: str) -> str:
        name = f"{self._prefix}{kind}-{int(self._clock() * 1000):x}"
        self._reserved[name] = self._clock()
        return name

    def _reserve(self, kind: str, places: Sequence[RayNode]) -> None:
        """A group of one bundle on each of the nodes: all that is free there, so that nobody else fits in."""
        free = [{kind: float(int(node.free.get(kind, 0.0))) for kind in ("CPU", "GPU")} for node in places]
        bundles = [{kind: number for kind, number in bundle.items() if number} for bundle in free]
        self._ray.reserve(self._new_group(kind), bundles, [node.node for node in places])

    def _unreserve(self, bundles: Sequence[Bundle]) -> None:
        for group in {bundle.group for bundle in bundles}:
            self._ray.unreserve(group)

    def _drop_stale(self, bundles: Sequence[Bundle]) -> list[Bundle]:
        """Those of the unplaced bundles that are still on their way; the other groups are given back.

        A group of which any bundle is placed is kept: agents live in it.
        """
        placed = {bundle.group for bundle in bundles if bundle.node}
        pending, now = [bundle for bundle in bundles if bundle.group not in placed], self._clock()
        coming = [b for b in pending if now - self._reserved.get(b.group, float("-inf")) < RESERVING_S]
        self._unreserve([bundle for bundle in pending if bundle not in coming])
        return coming

    def _top_up(self, nodes: Mapping[str, RayNode], bundles: Sequence[Bundle]) -> None:
        """One more group for every bundle that is missing, as far as nodes are free."""
        coming = self._drop_stale(bundles)
        usable = [bundle for bundle in bundles if bundle.node in nodes and not self._is_shunned(bundle.node)]
        free = self._free(nodes.values(), bundles)
        for node in free[: max(0, self._wanted - len(usable) - len(coming))]:
            self._reserve(f"more-{node.node[:12]}", [node])

    def _is_shunned(self, node: str) -> bool:
        return self._clock() < self._shunned.get(node, float("-inf"))

    def _free(self, nodes: Collection[RayNode], bundles: Collection[Bundle]) -> list[RayNode]:
        """Nodes that could carry an agent and carry none of our bundles."""
        taken = {bundle.node for bundle in bundles}
        return [node for node in nodes if node.node not in taken and node.free_devices >= self._need]

    def _start_agents(self, nodes: Mapping[str, RayNode], bundles: Sequence[Bundle]) -> None:
        """Start an agent in as many placed bundles as are wanted; on nodes that lost one only if there is no other."""
        now, living = self._clock(), self._actors()
        room = self._wanted - sum(self._agent_name(node) in living - set(self._leaving) for node in nodes)
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
        nodes, living = {node.node: node for node in self._ray.nodes()}, self._actors()
        found = [
            agent
            for agent in announce.read_all(self._paths)
            if agent.node in nodes and self._agent_name(agent.node) in living - set(self._leaving)
        ]
        if len(found) < self._wanted:
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
        nodes, bundles, living = self._ray.nodes(), self._ray.bundles(self._prefix), self._actors()
        up = {node.node: node for node in nodes}
        for name, (_, handle) in self._starts.items():
            complaint = self._ray.complaint(handle) if name in up and self._agent_name(name) not in living else ""
            if complaint:
                return f"the agent on {up[name].address} ended: {complaint}"
        placed = [up[bundle.node] for bundle in bundles if bundle.node in up]
        if len(placed) >= self._wanted:
            where = [node.address for node in placed if self._agent_name(node.node) in living]
            return f"agents are starting on {', '.join(where) or 'their nodes'}"
        if self._clock() - max(self._reserved.values(), default=float("-inf")) < RESERVING_S / 3:
            return f"{_count(self._wanted)} are being reserved"
        device = "GPUs" if any(node.total.get("GPU") for node in nodes) else "CPUs"
        usable = len(placed) + len(self._free(nodes, bundles))
        large = sum(device_count(node.total) >= self._need for node in nodes)
        return (
            f"the cluster has {_count(usable)} with >= {self._need} free {device} for this run "
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
        self._ray.unreserve(self._prefix)
        self._wanted = 0
        for agent in announce.read_all(self._paths):
            announce.remove(self._paths, agent)
        self._starts.clear()


def run_key(run_dir: Path) -> str:
    """Name of a run that is unique in a cluster: runs in different folders may be called the same."""
    return f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"


def device_count(resources: Resources) -> int:
    """Number of devices that ranks can use: GPUs where there are any, else CPUs."""
    return int(resources.get("GPU", 0)) or int(resources.get("CPU", 0))


def _given_back(node: RayNode, bundle: Bundle) -> RayNode:
    """The node as it will be when the bundle is given back; what Ray tells of it may be older than the bundle."""
    free = {kind: node.free.get(kind, 0.0) + bundle.resources.get(kind, 0.0) for kind in ("CPU", "GPU")}
    return replace(node, free={kind: min(number, node.total.get(kind, 0.0)) for kind, number in free.items()})


def _count(number: int) -> str:
    return f"{number} node" if number == 1 else f"{number} nodes"

"""What a run holds of a Ray cluster: its placement groups, one bundle per node; the arithmetic, without Ray.

A gang is reserved at once or not at all: two runs that each hold half of a cluster would wait for each other for ever.
When it has its nodes, spares come one by one, so that a missing one holds nothing up, and so do nodes in the place of
lost ones: the gang may train on fewer. A bundle takes all devices that are free on its node, so that nobody else fits.

Bundles of ours are bound to their nodes. One that may go anywhere is moved by Ray when its node is lost, and while no
free node is large enough the head tries that without a pause, with a whole processor (what could not be moved goes to
the front of the queue again, in gcs_placement_group_manager.cc; ray-project/ray#65007 would have added the pause). A
bundle that is bound to a node which is gone waits quietly. So where too few nodes are free, or Ray does not give those
that look free, the run queues: with a group that is bound to nothing, which Ray grants where it likes and an autoscaler
sees. One of several bundles is changed for a bound one when it is granted, within a tenth of a second in which another
that waits may be first; one of a single bundle is kept, and given back as soon as its node is lost.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

RESERVING_S = 10.0  # a node that looks free and that Ray has not given us by then is not to be had
REFUSED_S = 30.0  # for so long only Ray knows whether it is to be had after all: it is asked for through the queue

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
        moving: A node of its group was lost, and Ray looks for another one.
    """

    group: str
    index: int
    resources: Resources
    node: str
    moving: bool = False


class Ray(Protocol):
    """The few calls that placing agents takes. All return at once."""

    def nodes(self) -> list[RayNode]:
        """The living nodes."""

    def bundles(self, prefix: str) -> list[Bundle]:
        """Bundles of every placement group whose name begins with ``prefix``."""

    def reserve(self, group: str, bundles: Sequence[Resources], nodes: Sequence[str] = ()) -> None:
        """Ask for a detached group, spread strictly; with ``nodes`` each bundle on its own one, or nowhere."""

    def unreserve(self, prefix: str) -> None:
        """Remove every group whose name begins with ``prefix``."""

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


class Reservations:
    """The placement groups of one run.

    Args:
        ray: The cluster.
        prefix: Of the names of the groups: any controller of the run, this one or its successor, finds them again.
        need: Devices that a node must have free.
        clock: Monotonic seconds.
    """

    def __init__(self, ray: Ray, prefix: str, need: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._ray, self._prefix, self._need, self._clock = ray, prefix, need, clock
        self._made: dict[str, tuple[float, tuple[str, ...]]] = {}  # group -> when, and its nodes; none in the queue
        self._refused: dict[str, float] = {}  # node -> until when
        self._number = itertools.count()

    @property
    def queues(self) -> bool:
        """Whether this object stands in the queue: only :meth:`advance` makes use of what is granted there."""
        return any(self._queues(name) for name in self._made)

    @property
    def age_s(self) -> float:
        """Seconds since anything was asked for."""
        return self._clock() - max((when for when, _ in self._made.values()), default=-math.inf)

    def placed(self) -> list[Bundle]:
        """The bundles that have a node and may have an agent."""
        ours, _ = self._groups()
        return [bundle for group in ours.values() for bundle in group if bundle.node]

    def give_back(self) -> None:
        """Everything."""
        self._ray.unreserve(self._prefix)

    def free(self, nodes: Iterable[RayNode], taken: Collection[str]) -> list[RayNode]:
        """Nodes that could carry an agent, are not taken and were not refused lately; the largest first."""
        now = self._clock()
        found = [
            node
            for node in nodes
            if node.node not in taken and node.free_devices >= self._need and self._refused.get(node.node, now) <= now
        ]
        return sorted(found, key=lambda node: -node.free_devices)

    def advance(
        self, nodes: Mapping[str, RayNode], *, gang: int, wanted: int, shunned: Collection[str] = ()
    ) -> list[Bundle]:
        """Reserve the gang, then what is missing of all that is wanted. Returns at once.

        Args:
            nodes: The living nodes.
            gang: Nodes of the gang.
            wanted: Nodes of the gang and spares.
            shunned: Nodes whose bundles do not count.

        Returns:
            See :meth:`placed`.
        """
        groups, tickets = self._groups()
        ours = [bundle for group in groups.values() for bundle in group if bundle.node]
        coming = self._coming(groups, nodes)
        taken = {bundle.node for bundle in ours} | coming
        there = len({b.node for b in ours if b.node in nodes and b.node not in shunned}) + len(coming)
        # A gang that was lost whole begins anew, all at once, although a spare is left.
        whole = any(b.node in nodes and not b.group.startswith(f"{self._prefix}more-") for b in ours)
        kind, lacking = ("more", wanted - there) if whole else ("gang", gang - there)
        granted = self._change_granted(lacking, kind, tickets, nodes, taken)
        free = [] if granted else self.free(nodes.values(), taken)
        bundle = _least(ours) if whole else {self._device(nodes): float(self._need)}
        self._ask(max(0, lacking - granted), kind, free, tickets, bundle)
        return self.placed()

    def _groups(self) -> tuple[dict[str, list[Bundle]], dict[str, list[Bundle]]]:
        """By their names: what is ours, or will be; and what stands in the queue, or has to be changed."""
        groups: dict[str, list[Bundle]] = {}
        for bundle in self._ray.bundles(self._prefix):
            groups.setdefault(bundle.group, []).append(bundle)
        queued = {name for name in groups if self._queues(name)}
        tickets = {name: groups.pop(name) for name in queued if len(groups[name]) > 1 or not groups[name][0].node}
        for name in groups:
            if any(bundle.node for bundle in groups[name]):
                self._made.pop(name, None)
        return groups, tickets

    def _queues(self, group: str) -> bool:
        return group.startswith(f"{self._prefix}queued-")

    def _coming(self, groups: Mapping[str, Sequence[Bundle]], nodes: Mapping[str, RayNode]) -> set[str]:
        """Nodes of groups that are on their way; of the others those that have no node are given back.

        Where any bundle has one agents live in the group.
        """
        now, coming = self._clock(), set[str]()
        for name, group in groups.items():
            if any(bundle.node for bundle in group):
                continue
            when, bound = self._made.get(name, (-math.inf, ()))
            if now - when >= RESERVING_S:
                self._refused.update(dict.fromkeys(bound, now + REFUSED_S))
            elif not group[0].moving and nodes.keys() >= {*bound}:
                coming.update(bound)
                continue
            self._drop([name])
        return coming

    def _change_granted(
        self,
        lacking: int,
        kind: str,
        tickets: dict[str, list[Bundle]],
        nodes: Mapping[str, RayNode],
        taken: Collection[str],
    ) -> int:
        """Bind what the queue has granted and leave it; how many nodes. Tickets that are of no use are given back."""
        granted = 0
        for name, ticket in list(tickets.items()):
            if not ticket[0].moving and not all(bundle.node in nodes for bundle in ticket):
                continue  # it waits, or was granted after we have looked which nodes there are
            places = [_given_back(nodes[bundle.node], bundle) for bundle in ticket if bundle.node in nodes]
            fit = all(place.free_devices >= self._need and place.node not in taken for place in places)
            if len(places) == len(ticket) <= lacking - granted and fit:
                self._bind(kind, places)  # before the ticket is given back, so that it is tried soon
                granted += len(places)
            self._drop([name])
            del tickets[name]
        return granted

    def _ask(
        self,
        lacking: int,
        kind: str,
        free: Sequence[RayNode],
        tickets: Mapping[str, Sequence[Bundle]],
        bundle: Resources,
    ) -> None:
        """Bind free nodes, and queue for the rest: a gang as a whole, all else one by one."""
        # A young ticket is granted what is free; where it is not, Ray does not think that it fits.
        if all(self._made.get(name, (-math.inf,))[0] <= self._clock() - RESERVING_S for name in tickets):
            if kind == "more":
                for node in free[:lacking]:
                    self._bind(kind, [node])
                lacking = max(0, lacking - len(free))
            elif 0 < lacking <= len(free):
                self._bind(kind, free[:lacking])
                lacking = 0
        sizes = [1] * lacking if kind == "more" or not lacking else [lacking]
        wanted = Counter(sizes)
        for name, ticket in tickets.items():
            if wanted[len(ticket)] and all(one.resources == bundle for one in ticket):
                wanted[len(ticket)] -= 1
            else:
                self._drop([name])
        for size in wanted.elements():
            self._ray.reserve(self._name("queued", ()), [bundle] * size)

    def _device(self, nodes: Mapping[str, RayNode]) -> str:
        """What ranks run on: GPUs, unless most of the nodes that are large enough have none."""
        large = [node.total for node in nodes.values() if device_count(node.total) >= self._need]
        return "GPU" if 2 * sum(int(total.get("GPU", 0)) > 0 for total in large) > len(large) else "CPU"

    def _bind(self, kind: str, places: Sequence[RayNode]) -> None:
        """A group of one bundle on each of the nodes: all that is free there, so that nobody else fits in."""
        where = tuple(node.node for node in places)
        whole = [{k: float(int(node.free[k])) for k in ("CPU", "GPU") if node.free.get(k, 0.0) >= 1} for node in places]
        self._ray.reserve(self._name(kind, where), whole, where)

    def _name(self, kind: str, nodes: tuple[str, ...]) -> str:
        now = self._clock()
        name = f"{self._prefix}{kind}-{int(now * 1000):x}-{next(self._number)}"
        self._made[name] = (now, nodes)
        return name

    def _drop(self, groups: Iterable[str]) -> None:
        for name in groups:
            self._made.pop(name, None)
            self._ray.unreserve(name)


def _least(bundles: Sequence[Bundle]) -> Resources:
    """What any of them has: a node that is taken for another's place is to be as whole as theirs."""
    least = {kind: min(bundle.resources.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}
    return {kind: number for kind, number in least.items() if number}


def device_count(resources: Resources) -> int:
    """Number of devices that ranks can use: GPUs where there are any, else CPUs."""
    return int(resources.get("GPU", 0)) or int(resources.get("CPU", 0))


def _given_back(node: RayNode, bundle: Bundle) -> RayNode:
    """The node as it will be when the bundle is given back; capped, as what is known of it may be older than that."""
    free = {kind: node.free.get(kind, 0.0) + bundle.resources.get(kind, 0.0) for kind in ("CPU", "GPU")}
    return replace(node, free={kind: min(number, node.total.get(kind, 0.0)) for kind, number in free.items()})

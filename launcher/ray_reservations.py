"""What a run holds of a Ray cluster: its placement groups, one bundle per node; the arithmetic, without Ray.

A gang is reserved at once or not at all: two runs that each hold half of a cluster would wait for each other for ever.
All else comes one by one, in the place of lost nodes and as spares: what is left of a gang may train on fewer, and a
missing spare holds nothing up. A bundle takes all devices that are free on its node, so that nobody else fits.

Every bundle of ours is bound to its node. One that may go anywhere is moved by Ray when its node is lost, and while no
free node is large enough the head tries that without a pause, with a whole processor (what could not be moved goes to
the front of the queue again, in gcs_placement_group_manager.cc; ray-project/ray#65007 would have added the pause). A
bundle that is bound to a node which is gone waits quietly. So a gang for which too few nodes are free, or to which Ray
does not give those that look free, queues: with a ticket, a group that is bound to nothing, which Ray grants where it
likes and an autoscaler sees. It is changed for a bound one when it is granted, within a tenth of a second in which
another that waits may be first.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

RESERVING_S = 10.0  # a node that looks free and that Ray has not given us by then is not to be had
REFUSED_S = 30.0  # and is not tried again for so long, but what Ray grants to a ticket is taken

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
        self._made: dict[str, tuple[float, tuple[str, ...]]] = {}  # group -> when, and its nodes; a ticket has none
        self._refused: dict[str, float] = {}  # node -> until when
        self._seen: set[str] = set()  # tickets that are granted
        self._again_s = -math.inf  # before that there is no new ticket
        self._number = itertools.count()

    @property
    def waits(self) -> bool:
        """Whether anything was asked for and not given yet: only :meth:`advance` makes use of it, or gives it back."""
        return bool(self._made)

    @property
    def age_s(self) -> float:
        """Seconds since the newest group was asked for of those that have not been given yet."""
        return self._clock() - max((when for when, _ in self._made.values()), default=-math.inf)

    def placed(self) -> list[Bundle]:
        """The bundles that have a node and may have an agent."""
        return [
            bundle for bundle in self._ray.bundles(self._prefix) if bundle.node and not self._is_ticket(bundle.group)
        ]

    def give_back(self) -> None:
        """Everything."""
        self._made.clear()
        self._ray.unreserve(self._prefix)

    def free(self, nodes: Iterable[RayNode], taken: Collection[str]) -> list[RayNode]:
        """Nodes that could carry an agent, are not taken and were not refused lately; the best first."""
        now = self._clock()
        found = [
            node
            for node in nodes
            if node.node not in taken and node.free_devices >= self._need and self._refused.get(node.node, now) <= now
        ]
        return sorted(found, key=lambda node: (node.node in self._refused, -node.free_devices))

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
        groups: dict[str, list[Bundle]] = {}
        for bundle in self._ray.bundles(self._prefix):
            groups.setdefault(bundle.group, []).append(bundle)
        tickets = {name: groups.pop(name) for name in list(groups) if self._is_ticket(name)}
        held = {bundle.node for group in groups.values() for bundle in group if bundle.node}
        pending = self._pending(groups, nodes)
        coming = {node for bound in pending.values() for node in bound}
        here = {node for node in held if node in nodes and node not in shunned}
        free = self.free(nodes.values(), held | coming)
        if here:
            self._drop(tickets)
            if len(here) >= wanted:  # it would be taken when nobody looks any more
                self._drop(pending)
            for node in free[: max(0, wanted - len(here | coming))]:
                self._bind("more", [node])
        else:
            self._gather(gang - len(here | coming), free, tickets, nodes, held | coming)
        return self.placed()

    def _is_ticket(self, group: str) -> bool:
        return group.startswith(f"{self._prefix}ticket-")

    def _pending(
        self, groups: Mapping[str, Sequence[Bundle]], nodes: Mapping[str, RayNode]
    ) -> dict[str, tuple[str, ...]]:
        """Groups that are on their way, and their nodes; of the others those that have no node are given back.

        Where any bundle has one agents live in the group.
        """
        now, pending = self._clock(), dict[str, tuple[str, ...]]()
        for name, group in groups.items():
            if any(bundle.node for bundle in group):
                self._made.pop(name, None)
                continue
            when, bound = self._made.get(name, (-math.inf, ()))
            if now - when >= RESERVING_S:
                self._refused.update(dict.fromkeys(bound, now + REFUSED_S))
            elif not group[0].moving and nodes.keys() >= {*bound}:
                pending[name] = bound
                continue
            self._drop([name])
        return pending

    def _gather(
        self,
        lacking: int,
        free: Sequence[RayNode],
        tickets: Mapping[str, Sequence[Bundle]],
        nodes: Mapping[str, RayNode],
        taken: Collection[str],
    ) -> None:
        """Reserve a gang: where its ticket is granted, else on free nodes; where they are too few get a ticket."""
        now, bundles = self._clock(), [{device(nodes.values(), self._need): float(self._need)}] * lacking
        kept = next((name for name, ticket in tickets.items() if [one.resources for one in ticket] == bundles), "")
        self._drop(tickets.keys() - {kept})
        ticket, (made_s, _) = tickets.get(kept, ()), self._made.get(kept, (-math.inf, ()))
        if ticket and (ticket[0].moving or all(one.node for one in ticket)):
            self._change(ticket, nodes, taken)
        elif 0 < lacking <= len(free) and now - made_s >= RESERVING_S:  # a younger ticket is granted them, if they fit
            self._bind("gang", free[:lacking])
            self._drop(tickets.keys() & {kept})
        elif lacking > 0 and not ticket and now >= self._again_s:
            self._ray.reserve(self._name("ticket", ()), bundles)

    def _change(self, ticket: Sequence[Bundle], nodes: Mapping[str, RayNode], taken: Collection[str]) -> None:
        """Bind what a ticket was granted and give the ticket back; only that, where it is of no use."""
        name, lost = ticket[0].group, ticket[0].moving
        if not lost and name not in self._seen:  # what is known of the nodes may be older
            self._seen.add(name)
            return
        places = [_given_back(nodes[bundle.node], bundle) for bundle in ticket if bundle.node in nodes]
        for place in places:
            self._refused.pop(place.node, None)
        fit = [place for place in places if place.free_devices >= self._need and place.node not in taken]
        if len(fit) == len(ticket):
            self._bind("gang", fit)  # before the ticket is given back, so that it is tried soon
        elif not lost:
            self._again_s = self._clock() + RESERVING_S  # the same would be granted again, and again
        self._drop([name])

    def _bind(self, kind: str, places: Sequence[RayNode]) -> None:
        """A group of one bundle on each of the nodes: all that is free there, so that nobody else fits in."""
        where = tuple(node.node for node in places)
        whole = [{k: float(int(node.free[k])) for k in ("CPU", "GPU") if node.free.get(k, 0.0) >= 1} for node in places]
        self._ray.reserve(self._name(kind, where), whole, where)

    def _name(self, kind: str, nodes: tuple[str, ...]) -> str:
        now = self._clock()
        name = f"{self._prefix}{kind}-{int(now * 1000):x}-{next(self._number)}."  # no name begins another
        self._made[name] = (now, nodes)
        return name

    def _drop(self, groups: Iterable[str]) -> None:
        for name in list(groups):
            self._made.pop(name, None)
            self._seen.discard(name)
            self._ray.unreserve(name)


def device(nodes: Iterable[RayNode], need: int) -> str:
    """What ranks run on, ``GPU`` or ``CPU``: GPUs where most of the nodes that are large enough have some."""
    large = [node.total for node in nodes if device_count(node.total) >= need]
    return "GPU" if 2 * sum(int(total.get("GPU", 0)) > 0 for total in large) > len(large) else "CPU"


def device_count(resources: Resources) -> int:
    """Number of devices that ranks can use: GPUs where there are any, else CPUs."""
    return int(resources.get("GPU", 0)) or int(resources.get("CPU", 0))


def _given_back(node: RayNode, bundle: Bundle) -> RayNode:
    """The node as it will be when the bundle is given back; capped, as what is known of it may be older than that."""
    free = {kind: node.free.get(kind, 0.0) + bundle.resources.get(kind, 0.0) for kind in ("CPU", "GPU")}
    return replace(node, free={kind: min(number, node.total.get(kind, 0.0)) for kind, number in free.items()})

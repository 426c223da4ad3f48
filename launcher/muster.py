"""Which nodes are there for the gang: asks the cluster for those that are missing, and keeps the roll of those up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from launcher.backend import AgentAddress, Backend
from launcher.clock import Clock
from launcher.clocks import Clocks
from launcher.exclusion import usable
from launcher.observation import Observation
from launcher.quantities import span
from strategies.errors import ClusterError
from strategies.specs import ClusterSpec

REQUEST_EVERY_S = 0.3
SPARE_EVERY_S = 5.0  # while the gang runs
WARM_S = 60.0  # a node that has not said by then that its pool is warm is not waited for any more


class Gang(Protocol):
    """What is needed of :class:`launcher.gang.Gang`."""

    def connect(self, addresses: Sequence[AgentAddress]) -> None:
        """Begin to connect to the agents that are not linked yet."""


class Muster:
    """The nodes of one run.

    Args:
        backend: Where agents come from.
        cluster: How many are wanted, spares included.
        clock: Source of time.
        record: Writes an event.

    Attributes:
        up: Node to its agent, for every node that answers and stays.
        excluded: Nodes that carry no ranks for now, with the end of that (UTC seconds).
    """

    def __init__(
        self,
        backend: Backend,
        cluster: ClusterSpec,
        clock: Clock,
        record: Callable[..., None],
    ) -> None:
        self.up: dict[str, AgentAddress] = {}
        self.excluded: Mapping[str, float] = {}
        self._backend = backend
        self._wanted, self._slots = cluster.nodes + cluster.spares, cluster.slots_per_node
        self._clock = clock
        self.clocks = Clocks(record)
        self._asked = float("-inf")
        self._known: dict[str, AgentAddress] = {}  # all that have announced themselves, when we last looked
        self._cold: dict[str, float] = {}  # since when (monotonic)
        self._departing: dict[str, AgentAddress] = {}  # told that they will be taken away

    def call_up(self, gang: Gang, *, urgent: bool) -> None:
        """Ask for the nodes and spares that are missing, and connect to those that came.

        Args:
            gang: Connects to them.
            urgent: The gang waits for them; else they are spares.

        Raises:
            ClusterError: The cluster cannot be reached.
        """
        now, every_s = self._clock.monotonic(), REQUEST_EVERY_S if urgent else SPARE_EVERY_S
        out = self._left_out()
        if len(self.up) - len(out) < self._wanted and now - self._asked >= every_s:
            self._asked = now
            self._backend.request_agents(self._wanted + len(out) + len(self._departing))
            gang.connect(list(self.look().values()))

    def _left_out(self) -> set[str]:
        """Nodes that are up and carry no ranks for now."""
        return self.up.keys() & self._barred()

    def _barred(self) -> set[str]:
        now = self._clock.time()
        return {node for node, until in self.excluded.items() if until > now}

    def hopeless(self, gang: Collection[str]) -> bool:
        """Whether all that is missing of a gang carries no ranks for now, and the cluster has no other node.

        Args:
            gang: Nodes of the newest attempt, as many as are wanted.
        """
        barred = self._barred()
        away = set(gang) - (self.up.keys() - barred)
        if not away or away - barred:
            return False
        known = self.up.keys() | self._departing.keys() | barred
        with contextlib.suppress(ClusterError):
            others = (one for one in self._backend.nodes() if one.node not in known and one.slots >= self._slots)
            return not any(one.alive for one in others)
        return False

    def why_missing(self) -> str:
        """Why there are too few nodes: what the cluster says, and before it the nodes that are left out."""
        said, now, out = self._backend.why_missing(), self._clock.time(), len(self._left_out())
        barred = [f"{node} (for another {span(self.excluded[node] - now)})" for node in sorted(self._barred())]
        if not barred:
            return said
        words = f"no ranks are placed on {', '.join(barred)}, by recovery.exclude_for_s"
        return f"{words}, so {out} more {'is' if out == 1 else 'are'} asked for: {said}" if out else f"{words}; {said}"

    def choose(self, legal: Callable[[int], bool]) -> tuple[dict[str, AgentAddress], tuple[str, ...]]:
        """The nodes that may carry ranks, and those of them that are taken back although they are excluded.

        Args:
            legal: Whether so many nodes carry a plan.
        """
        nodes, back = usable(self.up, self.excluded, self._clock.time(), legal)
        return {node: agent for node, agent in self.up.items() if node in nodes}, back

    def warm(self, busy: Collection[str]) -> int:
        """How many nodes would start their ranks at once.

        Args:
            busy: Nodes that carry ranks.
        """
        late, out = self._clock.monotonic() - WARM_S, self._left_out()
        return sum(node in busy or (node not in out and self._cold.get(node, late) <= late) for node in self.up)

    def stands_by(self, busy: Collection[str]) -> bool:
        """Whether a node is there that carries no ranks and may.

        Args:
            busy: Nodes that carry ranks.
        """
        return bool(self.up.keys() - self._left_out() - set(busy))

    def note(self, seen: Observation) -> None:
        """A node has come, is about to go, or has gone."""
        if seen.kind == "agent_up":
            self._cold[seen.node] = self._clock.monotonic()
            self._add(seen.node, seen.data.get("incarnation"))
            self.clocks.note(seen)
        elif seen.kind == "pool":
            self._cold.pop(seen.node, None)
        elif seen.kind == "notice" and seen.node in self.up:
            self._departing[seen.node] = self.up.pop(seen.node)
        elif seen.kind in ("agent_lost", "leaving"):
            lost = self.up.pop(seen.node, None) or self._departing.pop(seen.node, None) or self._unmet(seen)
            if lost is not None:
                self._known.pop(seen.node, None)
                self._backend.forget(lost)

    def _unmet(self, seen: Observation) -> AgentAddress | None:
        """One that has announced itself and never answered: its place is to be freed, too."""
        known = self._known.get(seen.node)
        return known if known is not None and known.incarnation == seen.data.get("incarnation") else None

    def look(self) -> dict[str, AgentAddress]:
        """The agents that have announced themselves, by node. Asks the cluster, or a disk."""
        self._known = {agent.node: agent for agent in self._backend.agents()}
        return self._known

    def _add(self, node: str, incarnation: str | None) -> None:
        """An agent has answered. Looks again only for one that is not known: a look asks the cluster or a disk."""
        known = self._known.get(node)
        if known is None or known.incarnation != incarnation:
            known = self.look().get(node)
        if known is not None:
            self.up[node] = known

"""Which nodes are there for the gang: asks the cluster for those that are missing, and keeps the roll of those up."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from launcher.backend import AgentAddress, Backend
from launcher.clock import Clock
from launcher.observation import Observation
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

    Attributes:
        up: Node to its agent, for every node that can be used now.
    """

    def __init__(self, backend: Backend, cluster: ClusterSpec, clock: Clock) -> None:
        self.up: dict[str, AgentAddress] = {}
        self._backend = backend
        self._wanted = cluster.nodes + cluster.spares
        self._clock = clock
        self._asked = float("-inf")
        self._known: dict[str, AgentAddress] = {}  # all that have announced themselves, when we last looked
        self._cold: dict[str, float] = {}  # since when (monotonic)

    def call_up(self, gang: Gang, *, urgent: bool) -> None:
        """Ask for the nodes and spares that are missing, and connect to those that came.

        Args:
            gang: Connects to them.
            urgent: The gang waits for them; else they are spares.

        Raises:
            ClusterError: The cluster cannot be reached.
        """
        now, every_s = self._clock.monotonic(), REQUEST_EVERY_S if urgent else SPARE_EVERY_S
        if len(self.up) < self._wanted and now - self._asked >= every_s:
            self._asked = now
            self._backend.request_agents(self._wanted)
            gang.connect(list(self._look().values()))

    def warm(self, busy: Collection[str]) -> int:
        """How many nodes would start their ranks at once.

        Args:
            busy: Nodes that carry ranks.
        """
        late = self._clock.monotonic() - WARM_S
        return sum(node in busy or self._cold.get(node, late) <= late for node in self.up)

    def note(self, seen: Observation) -> None:
        """A node has come, or gone."""
        if seen.kind == "agent_up":
            self._cold[seen.node] = self._clock.monotonic()
            self._add(seen.node, seen.data.get("incarnation"))
        elif seen.kind == "pool":
            self._cold.pop(seen.node, None)
        elif seen.kind in ("agent_lost", "leaving"):
            lost = self.up.pop(seen.node, None)
            if lost is not None:
                self._backend.forget(lost)

    def _look(self) -> dict[str, AgentAddress]:
        self._known = {agent.node: agent for agent in self._backend.agents()}
        return self._known

    def _add(self, node: str, incarnation: str | None) -> None:
        """An agent has answered. Looks again only for one that is not known: a look asks the cluster or a disk."""
        known = self._known.get(node)
        if known is None or known.incarnation != incarnation:
            known = self._look().get(node)
        if known is not None:
            self.up[node] = known

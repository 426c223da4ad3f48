"""What the controller needs of a cluster: nodes, and an agent on each. Implementations are thin and hold no policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeInfo:
    """One node as the cluster reports it.

    Attributes:
        node: Stable identity of the node in this cluster (Ray's node id, or a name).
        address: Network address of the node.
        slots: Number of devices that ranks can use.
        alive: Whether the cluster believes that it is up.
    """

    node: str
    address: str
    slots: int
    alive: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentAddress:
    """Where a host agent listens; also the content of ``agents/<node>.json`` in the run directory.

    Attributes:
        node: The node's identity.
        host: Address to connect to.
        port: TCP port.
        pid: Process id of the agent on its node.
        slots: Number of devices on the node.
        incarnation: Random word made at each start of an agent, so that a restarted one is not taken for the old.
    """

    node: str
    host: str
    port: int
    pid: int
    slots: int
    incarnation: str


class Backend(Protocol):
    """A cluster on which agents can be placed. Every call returns quickly; nothing here waits for a node."""

    def nodes(self) -> list[NodeInfo]:
        """The nodes that exist now. Raises ClusterError when the cluster cannot be reached."""

    def request_agents(self, count: int) -> None:
        """Ask for agents on ``count`` whole nodes. Idempotent: tops up what is missing, never removes a live one."""

    def agents(self) -> list[AgentAddress]:
        """The agents that have announced themselves so far and are not known to be dead."""

    def forget(self, agent: AgentAddress) -> None:
        """An agent was found dead or unreachable: free its place, so that ``request_agents`` can fill it again."""

    def why_missing(self) -> str:
        """One sentence for people: why agents that were requested are not there."""

    def release(self) -> None:
        """Remove every agent and give back all that was reserved. Safe to call twice."""

    def close(self) -> None:
        """Leave the cluster as it is and drop the connection."""

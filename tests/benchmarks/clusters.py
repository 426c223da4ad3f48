"""A running Ray cluster for benchmarks: machines made of network namespaces, and both contenders on it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.benchmarks.contenders import OURS, PEER_ENVIRONMENT, RANKS, ROOT, Contender, phalanx
from tests.support import netns

TOKEN = "ab" * 32
SLOTS = 2
TUNED = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""Health checks that take a silent node for dead after about as long as phalanx does at its defaults."""


class Cluster(netns.RayCluster):
    """A cluster that asks for a token, with variables of its own on every node.

    Args:
        net: The network.
        extra: The variables.
    """

    def __init__(self, net: netns.Network, extra: Mapping[str, str]) -> None:
        super().__init__(net, token=TOKEN, cpus=SLOTS)
        self._extra = dict(extra)

    def environment(self, token: str | None = None) -> dict[str, str]:
        """The usual, and ours."""
        return super().environment(token) | self._extra

    def holder(self, pids: set[int]) -> int:
        """A node beside the head that holds one of these processes."""
        found = [index for index in range(1, len(self.net.addresses)) if pids & set(self.net.pids(index))]
        assert found, "no node beside the head holds a rank"
        return found[-1]


@contextlib.contextmanager
def cluster(nodes: int, extra: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """A cluster of ``nodes`` nodes, the head among them."""
    with netns.network(nodes) as net:
        made = Cluster(net, extra or {})
        try:
            made.start(nodes=nodes)
            yield made
        finally:
            made.close()


def phalanx_on(
    where: Cluster, job: Sequence[str], folder: Path, *more: str, spares: int = 0, name: str = OURS
) -> Contender:
    """phalanx as a client of the cluster, submitted on the head (elsewhere a Ray node joins first, for seconds).

    At its defaults, but for ``more``.
    """
    place = ["cluster=existing", f"cluster.address={where.address}", f"cluster.nodes={RANKS // SLOTS}"]
    place += [f"cluster.slots_per_node={SLOTS}", f"cluster.spares={spares}", *more]
    bare = phalanx(job, *place, name=name)
    environment = {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "token", "HOME": str(folder)}

    def command(run_dir: Path) -> list[str]:
        return ["ip", "netns", "exec", where.net.namespace(0), *bare.command(run_dir)]

    return Contender(name=bare.name, command=command, environment=environment, ours=True)


def ray_train_on(where: Cluster, name: str) -> Contender:
    """Ray Train with its driver on the head: a driver of Ray has to stand on a node.

    gloo has to be told the interface: the names of these machines resolve to loopback addresses.
    """

    def command(run_dir: Path) -> list[str]:
        inside = ["ip", "netns", "exec", where.net.namespace(0)]
        driver = [sys.executable, "-m", "tests.benchmarks.peers.ray_train", str(run_dir), str(RANKS), where.address]
        return [*inside, *driver]

    variables = where.environment() | PEER_ENVIRONMENT | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"}
    return Contender(name=name, command=command, environment=variables)

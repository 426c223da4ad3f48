"""Seconds of one collective operation on the link it really crosses: inside a domain (NVLink), or between nodes.

Rings, as NCCL runs them: an all-reduce of ``S`` bytes among ``n`` ranks moves ``2 (n-1)/n S`` through every link and
takes ``2 (n-1)`` messages one after the other; reduce-scatter, all-gather and all-to-all half of that (NCCL's
PERFORMANCE.md, "bus bandwidth").
"""

from __future__ import annotations

from typing import NamedTuple


class Link(NamedTuple):
    """What one rank of a group has towards the next one.

    Attributes:
        bandwidth: Bytes per second, one direction.
        latency_s: Of one message.
    """

    bandwidth: float
    latency_s: float


class Network(NamedTuple):
    """The links of a cluster as programs get them.

    Attributes:
        intra: Inside a domain, per device.
        inter: Between nodes, per device: its share of the node's cards.
        domain: Devices per domain.
        start_s: Until the ranks of a collective have met and its kernel runs.
        ring: Share of the bandwidth between nodes that rings over many nodes keep.
    """

    intra: Link
    inter: Link
    domain: int
    start_s: float = 0.0
    ring: float = 1.0


def ring_link(network: Network, ranks: int, stride: int = 1) -> Link:
    """The slowest link of a ring of ``ranks`` that are ``stride`` devices apart.

    A ring that leaves the domain uses the cards of all its members there: each of the ``domain / stride`` members of a
    domain adds one; the other groups of the same devices use the others.
    """
    if ranks * stride <= network.domain:
        return network.intra
    members = max(1, min(ranks, network.domain // stride))
    return Link(min(network.intra.bandwidth, members * network.inter.bandwidth * network.ring), network.inter.latency_s)


def all_reduce_s(network: Network, size_bytes: float, ranks: int, stride: int = 1) -> float:
    """Seconds to sum ``size_bytes`` over ``ranks``."""
    return 2.0 * gather_s(network, size_bytes, ranks, stride)


def gather_s(network: Network, size_bytes: float, ranks: int, stride: int = 1) -> float:
    """Seconds to gather ``size_bytes`` (the whole) on every rank, or to reduce and scatter as much.

    Latencies of a ring that crosses nodes: slow messages between the nodes, quick ones inside.
    """
    if ranks <= 1:
        return 0.0
    link = ring_link(network, ranks, stride)
    seconds = (ranks - 1) / ranks * size_bytes / link.bandwidth
    crossings = 0 if ranks * stride <= network.domain else -(-ranks * stride // network.domain)
    hops = min(ranks - 1, crossings)
    # NCCL turns to trees on many ranks, so latency stops growing with every rank (NCCL 2.4, "double binary trees")
    inside = min(ranks - 1 - hops, 64)
    return seconds + 0.5 * network.start_s + min(hops, 32) * network.inter.latency_s + inside * network.intra.latency_s


def all_to_all_s(network: Network, size_bytes: float, ranks: int, stride: int = 1, copies: float = 1.0) -> float:
    """Seconds in which every rank sends ``size_bytes``, an equal part to each of ``ranks``.

    Parts for the own domain cross the inner link, the others the own card; both at the same time. ``copies`` is the
    share of the latter that has to cross when equal parts for one domain cross once.
    """
    if ranks <= 1:
        return 0.0
    near = max(1, min(ranks, network.domain // stride))
    inside = (near - 1) / ranks * size_bytes / network.intra.bandwidth + (near - 1) * network.intra.latency_s
    if near >= ranks:
        return inside
    outside = copies * (ranks - near) / ranks * size_bytes / network.inter.bandwidth
    return max(inside, outside + min(ranks - near, 32) * network.inter.latency_s)


def send_s(network: Network, size_bytes: float, *, crosses: bool) -> float:
    """Seconds to hand ``size_bytes`` to one other rank."""
    link = network.inter if crosses else network.intra
    return size_bytes / link.bandwidth + link.latency_s

"""What a step moves of state that lives beside the device: over the link to the host, and to and from its disks.

DeepSpeed waits for the disks in its update: nothing of that hides behind the backward pass.
"""

from __future__ import annotations

from strategies.plan import ParallelPlan
from strategies.specs import ClusterSpec

Parts = list[tuple[str, float]]
"""(what, bytes per parameter of a rank in one step)."""

_HOST_UPDATE_BYTES = 28.0
"""Bytes per parameter that an update in host memory moves there, at about the speed of the link to the device."""

_DISK_UPDATE_BYTES = 32.0
"""Bytes per parameter of an update with state on disks: gradient, master weight and both moments are fp32, and each is
written once and read once (ZeRO-Infinity, arXiv 2104.07857)."""


def host_parts(plan: ParallelPlan, grad_bytes: float, itemsize: float) -> Parts:
    """What crosses the link to the host, or moves at about its speed there.

    Args:
        plan: A plan that offloads.
        grad_bytes: Bytes of an element of a gradient.
        itemsize: Bytes of an element of a weight.
    """
    parts = [("gradients", grad_bytes), ("parameters", itemsize), ("update", _HOST_UPDATE_BYTES)]
    if plan.offload == "optimizer+params":
        parts.append(("parameters per pass", 2.0 * plan.grad_accum * itemsize))
    return parts


def disk_parts(plan: ParallelPlan, itemsize: float) -> Parts:
    """What is read from disks and written to them; nothing where state is in host memory."""
    if plan.offload == "none" or not plan.offload_path:
        return []
    parts = [("state", _DISK_UPDATE_BYTES)]
    if plan.offload == "optimizer+params":
        parts += [("parameters", itemsize), ("parameters per pass", 2.0 * plan.grad_accum * itemsize)]
    return parts


def sharers(plan: ParallelPlan, cluster: ClusterSpec) -> int:
    """Ranks that share the disks of a node."""
    return min(plan.world_size, cluster.slots_per_node)

"""What a machine is made of, as the planner needs it: devices, links, storage, prices and failures. Values only."""

from __future__ import annotations

from dataclasses import dataclass

FROM_ZERO = (
    "flops_fp8",
    "intra_latency_s",
    "intra_domain",
    "inter_latency_s",
    "host_memory_bytes",
    "storage_total_bandwidth",
    "price_per_device_hour",
    "failures_per_node_day",
    "detect_s",
    "restart_s",
    "repair_s",
)
"""Figures of :class:`Hardware` that may be zero and never less; the other numbers are rates, and above zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One kind of node, and the network, storage and market around it.

    All bandwidths are bytes per second in one direction, as the data sheet promises them; what a program gets of them
    is the business of the calibration, unless they are ``measured``. Zero means "has none" unless an attribute says
    otherwise.

    Attributes:
        measured: Bandwidths and operations per second are what programs got here, as ``phalanx cluster probe`` writes
            them, not a data sheet's figures: no share is taken of them.
        flops_fp32: Dense fp32 (on tensor cores: TF32) operations per second of one device.
        flops_16: Dense fp16/bf16 operations per second of one device.
        flops_fp8: Dense fp8 operations per second of one device; 0 for devices without fp8.
        bf16: The device has bf16.
        processors: Streaming multiprocessors (compute units, cores) of one device: what a matmul's tiles are dealt to.
        memory_bandwidth: Of the device's memory.
        intra_bandwidth: Of one device to the others of its domain (NVLink, XGMI, shared memory).
        intra_latency_s: Of one message inside the domain.
        intra_domain: Devices that this link joins; 0 means those of one node (a GB200 rack joins 72).
        inter_bandwidth: Of one device to other nodes: the node's network cards shared by its devices.
        inter_latency_s: Of one message between nodes.
        host_bandwidth: Of one device to its host's memory (PCIe, C2C).
        host_memory_bytes: Memory of one host.
        disk_bandwidth: Of the local disks (NVMe) of one node, shared by its devices, reading or writing.
        storage_bandwidth: Of one node to the checkpoint storage.
        storage_total_bandwidth: Of the checkpoint storage as a whole; 0 means that it grows with the nodes.
        price_per_device_hour: US dollars.
        failures_per_node_day: Failures that stop the run, per node and day.
        detect_s: From a failure until it is noticed; of a configured run it is ``recovery.detect_s``, whatever is here.
        restart_s: From then until the ranks train again; a published range, not this machine's figure.
        repair_s: Until a broken node is back in the pool.
    """

    measured: bool = False
    flops_fp32: float
    flops_16: float
    flops_fp8: float = 0.0
    bf16: bool = True
    processors: int
    memory_bandwidth: float
    intra_bandwidth: float
    intra_latency_s: float
    intra_domain: int = 0
    inter_bandwidth: float
    inter_latency_s: float
    host_bandwidth: float = 25.0e9
    host_memory_bytes: int = 0
    disk_bandwidth: float = 3.0e9
    storage_bandwidth: float = 2.0e9
    storage_total_bandwidth: float = 0.0
    price_per_device_hour: float = 0.0
    failures_per_node_day: float = 0.0
    detect_s: float = 5.0
    restart_s: float = 120.0
    repair_s: float = 14400.0

"""From what the ranks of a probe have measured to the figures of a cluster, and how each of them came about. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from strategies.hardware import Hardware

Record = Mapping[str, Any]
"""What one rank has left; see :mod:`jobs.probe`."""

Source = Literal["measured", "configured", "assumed", "fill in", "missing"]

SLOW = 0.9
"""A node below this share of the median node's rate is a straggler."""

_GROWS = 0.8  # several nodes that reach this share of the sum of their single rates do not share a bottleneck
_DEFAULTS = {field.name: field.default for field in fields(Hardware)}
_UNITS = {"bandwidth": "bytes per second", "latency_s": "seconds"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One value of the cluster file.

    Attributes:
        value: The value; None when it is missing from the file.
        source: ``measured``; ``configured``: the user's own setting; ``assumed``: a published figure; ``fill in``: it
            cannot be measured and is zero; ``missing``: it could not be measured this time.
        note: How it was measured, or why not.
    """

    value: float | int | bool | None
    source: Source
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Rate of one matmul, the median of all devices.

    Attributes:
        dtype: Arithmetic.
        shape: (m, n, k).
        flops: Operations per second.
    """

    dtype: str
    shape: tuple[int, int, int]
    flops: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A link, seen by one pair of devices alone and by all pairs at once.

    Attributes:
        latency_s: Seconds of a message of eight bytes.
        curve: (bytes of a message, bytes per second) of one pair.
        shared: Bytes per second of each device while all talk.
        pairs: How many pairs that were.
    """

    latency_s: float
    curve: tuple[tuple[int, float], ...]
    shared: float
    pairs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """A node that is slower than the others.

    Attributes:
        host: Its name.
        node_rank: Its index in the gang.
        share: Its rate over the median node's.
    """

    host: str
    node_rank: int
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """What a probe found.

    Attributes:
        device: What the devices call themselves.
        device_memory_bytes: Memory of one.
        devices: Devices that torch sees on a node.
        backend: Communication backend.
        torch: Version of torch.
        nodes: Nodes that took part.
        slots: Devices of a node that took part.
        machines: Machines that these nodes are on.
        rates: Matmuls by arithmetic and shape.
        intra: Link inside a node; None when not measured.
        inter: Link between two nodes; None when not measured.
        stragglers: Slow nodes; None when they were not looked for.
        figures: Fields of :class:`strategies.hardware.Hardware`, all of them, in their order.
    """

    device: str
    device_memory_bytes: int
    devices: int
    backend: str
    torch: str
    nodes: int
    slots: int
    machines: int
    rates: tuple[Rate, ...]
    intra: Link | None
    inter: Link | None
    stragglers: tuple[Straggler, ...] | None
    figures: Mapping[str, Figure]

    @property
    def missing(self) -> list[str]:
        """Keys that the cluster file will lack."""
        return [key for key, figure in self.figures.items() if figure.source == "missing"]

    def of_source(self, source: Source) -> list[str]:
        """Keys whose figures come from there."""
        return [key for key, figure in self.figures.items() if figure.source == source]


def summarise(records: Sequence[Record], *, detect_s: float) -> Probed:
    """Put the records of all ranks together.

    Args:
        records: One of each rank.
        detect_s: How fast a failure is noticed, as configured (``recovery.detect_s``).
    """
    first = min(records, key=lambda record: int(record["rank"]))
    machines = {record["machine"] for record in records}
    nodes = {int(record["node_rank"]) for record in records}
    rates, intra, inter = _rates(records), _link(records, "intra"), _link(records, "inter")
    figures = {
        "measured": _measured(True, "rates are what programs get"),
        **_device(records, rates),
        **_link_figures("intra", intra, "there is one device per node only"),
        **_link_figures("inter", inter, "there is one node only"),
        **_storage(records),
        "disk_bandwidth": _local_disk(records),
        **_host(records),
        **_unmeasured(detect_s),
    }
    return Probed(
        device=str(first["device"]),
        device_memory_bytes=_memory(records),
        devices=min(int(record["devices"]) for record in records),
        backend=str(first["backend"]),
        torch=str(first["torch"]),
        nodes=len(nodes),
        slots=len(records) // len(nodes),
        machines=len(machines),
        rates=rates,
        intra=intra,
        inter=inter,
        stragglers=_stragglers(records) if len(machines) == len(nodes) > 1 else None,
        figures={key: figures[key] for key in _DEFAULTS},
    )


def device_key(reported: str, known: Collection[str]) -> str:
    """The known kind of device that a device's own name stands for, else that name.

    Args:
        reported: For example ``NVIDIA A100-SXM4-80GB``.
        known: For example ``A100-80GB``: every part of it must be in the reported name; the longest wins.
    """
    if reported in known:
        return reported
    name = reported.lower().replace(" ", "")
    fitting = [key for key in known if all(part in name for part in key.lower().split("-"))]
    return max(fitting, key=len, default=reported)


# ---- devices ----------------------------------------------------------------------------------------------------


def _rates(records: Sequence[Record]) -> tuple[Rate, ...]:
    found: dict[tuple[str, tuple[int, int, int]], list[float]] = {}
    for record in records:
        for one in record["matmul"]:
            m, n, k = one["shape"]
            found.setdefault((str(one["dtype"]), (m, n, k)), []).append(float(one["flops"]))
    return tuple(
        Rate(dtype=dtype, shape=shape, flops=statistics.median(rates)) for (dtype, shape), rates in found.items()
    )


def _device(records: Sequence[Record], rates: Sequence[Rate]) -> dict[str, Figure]:
    count = len(records)
    memory = statistics.median(float(record["memory_bandwidth"]) for record in records)
    copied = f"a large copy, bytes read and written, median of {_devices(count)} at work together"
    return {
        "flops_fp32": _best(rates, ("fp32",), count),
        "flops_16": _best(rates, ("bf16", "fp16"), count),
        "flops_fp8": _best(rates, ("fp8",), count),
        "bf16": _measured(all(record["bf16"] for record in records), "what the devices say"),
        "processors": _measured(min(int(record["processors"]) for record in records), "what torch says"),
        "memory_bandwidth": _measured(memory, copied),
    }


def _best(rates: Sequence[Rate], dtypes: Collection[str], count: int) -> Figure:
    fitting = [rate for rate in rates if rate.dtype in dtypes]
    if not fitting:
        return Figure(value=0.0, source="measured", note="these devices or this torch do not multiply in it")
    best = max(fitting, key=lambda rate: rate.flops)
    shape = " x ".join(map(str, best.shape))
    note = f"{best.dtype} matmul {shape}, the fastest of {len(fitting)}; median of {_devices(count)} at work together"
    return _measured(best.flops, note)


def _memory(records: Sequence[Record]) -> int:
    """Of one device; ranks on CPUs share that of their machine."""
    least = min(int(record["memory_bytes"]) for record in records)
    if least:
        return least
    sharing = [str(record["machine"]) for record in records]
    return min(int(record["host_memory_bytes"]) // sharing.count(str(record["machine"])) for record in records)


def _stragglers(records: Sequence[Record]) -> tuple[Straggler, ...]:
    """Nodes whose slowest device multiplies well below the median node's, in the largest product of 16 bits."""
    slowest: dict[int, tuple[float, str]] = {}
    for record in records:
        wide = [one for one in record["matmul"] if one["dtype"] in ("bf16", "fp16")] or record["matmul"]
        largest = max(wide, key=lambda one: int(one["shape"][0]) * int(one["shape"][1]) * int(one["shape"][2]))
        entry, node = (float(largest["flops"]), str(record["host"])), int(record["node_rank"])
        slowest[node] = min(slowest.get(node, entry), entry)
    usual = statistics.median(rate for rate, _ in slowest.values())
    return tuple(
        Straggler(host=host, node_rank=node, share=rate / usual)
        for node, (rate, host) in sorted(slowest.items())
        if rate < SLOW * usual
    )


# ---- links, disk, host ------------------------------------------------------------------------------------------


def _link(records: Sequence[Record], where: str) -> Link | None:
    seen = [record["links"][where] for record in records if record["links"].get(where)]
    alone = next((one for one in seen if "curve" in one), None)
    if alone is None:
        return None
    shared = [float(one["shared"]) for one in seen]
    return Link(
        latency_s=float(alone["latency_s"]),
        curve=tuple((int(size), float(rate)) for size, rate in alone["curve"]),
        shared=sum(shared) / len(shared),
        pairs=len(shared),
    )


def _link_figures(where: str, link: Link | None, why: str) -> dict[str, Figure]:
    keys = (f"{where}_bandwidth", f"{where}_latency_s")
    if link is None:
        return {key: Figure(value=None, source="missing", note=f"{why}; {_unit(key)}") for key in keys}
    pairs = "one pair" if link.pairs == 1 else f"{link.pairs} pairs at once"
    stream = f"a stream of {link.curve[-1][0] >> 20} MiB messages in one direction, {pairs}, of each device"
    return {
        keys[0]: _measured(link.shared, stream),
        keys[1]: _measured(link.latency_s, "half of a round trip of 8 bytes, one pair"),
    }


def _storage(records: Sequence[Record]) -> dict[str, Figure]:
    alone, writers, _ = _written(records, "disk_alone")
    found = {
        "storage_bandwidth": _measured(
            alone, f"write and fsync in run.dir, {_ranks(writers)} of one node{_read(records)}"
        ),
        "storage_total_bandwidth": Figure(value=0.0, source="assumed", note="not measured: grows with the nodes"),
    }
    total, _, nodes = _written(records, "disk_together")
    if nodes > 1:
        grows = total >= _GROWS * nodes * alone
        note = f"{nodes} nodes wrote {total / 1e9:.3g} GB/s together" + (": it grows with them" if grows else "")
        found["storage_total_bandwidth"] = _measured(0.0 if grows else total, note)
    return found


def _read(records: Sequence[Record]) -> str:
    """What is told of reading the checkpoints' storage; the planner has no key for it."""
    found = _folder(records, "store")
    return f"; read at {found.read / 1e9:.3g} GB/s, {found.how}" if isinstance(found, Folder) else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """Rates of a folder, of all ranks of one node together, in bytes per second.

    Attributes:
        write: Writing and syncing.
        read: Reading what was written.
        ranks: Ranks at work.
        how: Whether the page cache was in between.
    """

    write: float
    read: float
    ranks: int
    how: str


def _folder(records: Sequence[Record], name: str) -> Folder | str:
    """What was measured in a folder, or why nothing was."""
    rows = [record[name] for record in records if record.get(name)]
    wrong = next((str(row["error"]) for row in rows if "error" in row), "" if rows else "not tried")
    if wrong:
        return wrong
    total = sum(int(row["size"]) for row in rows)
    direct = all(row["direct"] for row in rows)
    return Folder(
        write=total / max(float(row["write_s"]) for row in rows),
        read=total / max(float(row["read_s"]) for row in rows),
        ranks=len(rows),
        how="past the page cache (O_DIRECT)" if direct else "after dropping it from the page cache",
    )


def _local_disk(records: Sequence[Record]) -> Figure:
    """State on disks is read as much as it is written: the rate of doing both in turn."""
    found, folder = _folder(records, "local"), next((str(one["local_folder"]) for one in records), "")
    if isinstance(found, str):
        default = float(_DEFAULTS["disk_bandwidth"])  # type: ignore[arg-type]
        return Figure(value=default, source="assumed", note=f"one NVMe disk; not measured: {found}")
    both = 2 / (1 / found.write + 1 / found.read)
    note = f"in {folder}, {_ranks(found.ranks)} of one node: write and fsync {found.write / 1e9:.3g} GB/s, read "
    return _measured(both, note + f"{found.read / 1e9:.3g} GB/s, {found.how}; as much of either")


def _written(records: Sequence[Record], key: str) -> tuple[float, int, int]:
    """Bytes per second of all writers of a phase, who began together; how many they were, and on how many nodes."""
    rows = [(record[key], record["node_rank"]) for record in records if record[key]]
    rate = sum(size for (size, _), _ in rows) / max(spent for (_, spent), _ in rows) if rows else 0.0
    return rate, len(rows), len({node for _, node in rows})


def _host(records: Sequence[Record]) -> dict[str, Figure]:
    total = min(int(record["host_memory_bytes"]) for record in records)
    rates = [float(record["host_bandwidth"]) for record in records if record["host_bandwidth"]]
    if rates:
        rate = _measured(statistics.median(rates), "copies from pinned memory, all devices at once")
    else:
        half = statistics.median(float(record["memory_bandwidth"]) for record in records) / 2
        rate = _measured(half, "the devices are the host: half of memory_bandwidth, which counts a copy twice")
    return {"host_bandwidth": rate, "host_memory_bytes": _measured(total, "what the system says")}


def _unmeasured(detect_s: float) -> dict[str, Figure]:
    fill_in = Figure(value=0.0, source="fill in", note="not measurable: fill in")
    assumed = {
        key: Figure(value=_DEFAULTS[key], source="assumed", note=f"not measured: {why}")  # type: ignore[arg-type]
        for key, why in {
            "restart_s": "a published figure of large jobs",
            "repair_s": "four hours, as with a person on call",
        }.items()
    }
    return {
        "intra_domain": Figure(value=0, source="assumed", note="not measured: the devices of one node"),
        "price_per_device_hour": fill_in,
        "failures_per_node_day": fill_in,
        "detect_s": Figure(value=detect_s, source="configured", note="recovery.detect_s"),
        **assumed,
    }


def _measured(value: float, note: str) -> Figure:
    return Figure(value=value, source="measured", note=note)


def _unit(key: str) -> str:
    return next((unit for ending, unit in _UNITS.items() if key.endswith(ending)), "")


def _devices(count: int) -> str:
    return f"{count} device{'s' if count > 1 else ''}"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"

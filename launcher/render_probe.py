"""A probe as text for people, as a document for programs, and as a file of ``conf/cluster``. Pure strings."""

from __future__ import annotations

from typing import Any

from launcher.probe_results import Figure, Link, Probed
from launcher.render import plural, size, table
from strategies.codec import to_json
from strategies.specs import ClusterSpec

SCHEMA_VERSION = 1


def cluster_yaml(found: Probed, cluster: ClusterSpec, *, name: str, device: str, when: str, quick: bool) -> str:
    """The file; it lacks what could not be measured, so that composing it names that.

    Args:
        found: What was measured.
        cluster: The cluster as it was probed.
        name: Name of the choice.
        device: Kind of device.
        when: Date and time, for people.
        quick: The probe was a short one.
    """
    effort = "quickly, so these are rough" if quick else "for about a second each"
    memory = "what the driver says" if found.backend != "gloo" else "the host's memory over the ranks that share it"
    called = "" if device.lower() == found.device.lower() else f"  # it calls itself {found.device}"
    lines = [
        f"# Measured by `phalanx cluster probe` on {when}: {plural(found.nodes, 'node')} of"
        f" {plural(found.slots, 'device')}, each figure {effort}",
        f"# (torch {found.torch}, {found.backend}). Speeds are what a program gets, not what a data sheet promises.",
        f"name: {name}",
        f"kind: {cluster.kind}",
        f"nodes: {found.nodes}",
        f"slots_per_node: {found.slots}",
        "spares: 0",
        f"address: {_quoted(cluster.address) if cluster.address else 'null'}",
        f"device: {_quoted(device)}{called}",
        f"device_memory_bytes: {found.device_memory_bytes}  # {memory}",
        "hardware:",
        *(f"  {_line(key, figure)}" for key, figure in found.figures.items()),
    ]
    return "\n".join(lines) + "\n"


def _line(key: str, figure: Figure) -> str:
    if figure.value is None:
        return f"# {key}:  # not measured: {figure.note}; fill in"
    prefix = "measured: " if figure.source == "measured" else "configured: " if figure.source == "configured" else ""
    return f"{key}: {_number(figure.value)}  # {prefix}{figure.note}"


def _number(value: float | int | bool) -> str:
    """As YAML: with a dot and a signed exponent, without which it would be a text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if value == 0 or 1 <= abs(value) < 1e6 else f"{value:.4e}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# ---- for people -------------------------------------------------------------------------------------------------


def probe_text(found: Probed) -> str:
    """Tables of everything measured, and what is wrong or not known."""
    nodes = f"{plural(found.nodes, 'node')} x {plural(found.slots, 'device')}"
    head = f"{nodes} ({found.device}, torch {found.torch}, {found.backend})"
    blocks = [head, _matmuls(found), _links(found), _others(found), "\n".join(remarks(found))]
    return "\n\n".join(block for block in blocks if block)


def _matmuls(found: Probed) -> str:
    dtypes = list(dict.fromkeys(rate.dtype for rate in found.rates))
    shapes = list(dict.fromkeys(rate.shape for rate in found.rates))
    by = {(rate.dtype, rate.shape): rate.flops for rate in found.rates}
    rows = [
        (" x ".join(map(str, shape)), *(_giga(by.get((dtype, shape)), 1e12) for dtype in dtypes)) for shape in shapes
    ]
    header = ("MATMUL, TFLOP/s", *(dtype.upper() for dtype in dtypes))
    return table(header, rows, right=range(1, len(header)))


def _links(found: Probed) -> str:
    links = [("INSIDE A NODE", found.intra), ("BETWEEN NODES", found.inter)]
    sizes = sorted({one for _, link in links if link for one, _ in link.curve})
    if not sizes:
        return ""
    rows: list[tuple[object, ...]] = [(_message(one), *(_at(link, one) for _, link in links)) for one in sizes]
    rows.append(("all devices at once, each", *(_giga(link.shared) if link else None for _, link in links)))
    rows.append(("latency, us", *(f"{1e6 * link.latency_s:.1f}" if link else None for _, link in links)))
    return table(("LINK, GB/s by message", *(name for name, _ in links)), rows, right=(1, 2))


def _message(count: int) -> str:
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count // factor} {unit}"
    return f"{count} B"


def _at(link: Link | None, count: int) -> str | None:
    return _giga(dict(link.curve).get(count)) if link else None


def _others(found: Probed) -> str:
    keys = ("memory_bandwidth", "host_bandwidth", "storage_bandwidth", "storage_total_bandwidth", "disk_bandwidth")
    names = ("device memory", "host to device", "disk, one node", "disk, all nodes", "local disk")
    rows = [
        (name, _rate_of(found.figures[key]), found.figures[key].note) for key, name in zip(keys, names, strict=True)
    ]
    kind = "cores" if found.backend == "gloo" else "devices"
    rows.append(("memory of a device", size(found.device_memory_bytes), f"{found.devices} {kind} on each node"))
    return table(("OTHERS, GB/s", "", "HOW"), rows, right=(1,))


def _rate_of(figure: Figure) -> str | None:
    """A bandwidth; zero is how a cluster file says that storage grows with the nodes."""
    if figure.source != "measured":
        return None
    return _giga(float(figure.value)) if figure.value else "grows with the nodes"


def _giga(value: float | None, unit: float = 1e9) -> str | None:
    return None if value is None else f"{value / unit:.3g}"


def remarks(found: Probed) -> list[str]:
    """What a person should know about the figures: stragglers, shared machines, what is not measured."""
    lines = [
        f"STRAGGLER: node {one.node_rank} ({one.host}) multiplies at {one.share:.0%} of the median node's rate."
        for one in found.stragglers or ()
    ]
    if found.stragglers == ():
        lines.append("No straggler: no node multiplies more than 10 % slower than the median node.")
    if found.machines < found.nodes:
        lines.append(
            f"The {found.nodes} nodes share {plural(found.machines, 'machine')}: the figures are what they get side by "
            "side, the link between nodes is no network, and slow nodes were not looked for."
        )
    if found.backend != "gloo" and found.devices > found.slots:
        lines.append(f"Each node has {found.devices} devices, of which {found.slots} took part.")
    return lines + unknown(found)


def unknown(found: Probed) -> list[str]:
    """What the file does not know."""
    lines = []
    for why in dict.fromkeys(found.figures[key].note.split(";")[0] for key in found.missing):
        keys = [key for key in found.missing if found.figures[key].note.startswith(why)]
        lines.append(f"Not measured, since {why}: {', '.join(keys)}. The file lacks them: fill them in.")
    lines.append(f"Not measurable, zero in the file, fill in: {', '.join(found.of_source('fill in'))}.")
    assumed = [f"{key}={found.figures[key].value:g}" for key in found.of_source("assumed")]
    return [*lines, f"Assumed, not measured: {', '.join(assumed)}."]


# ---- for programs -----------------------------------------------------------------------------------------------


def probe_document(found: Probed, *, file: str, command: str, name: str, device: str) -> dict[str, Any]:
    """Everything, as one JSON document."""
    document: dict[str, Any] = to_json(found)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "file": file,
        "command": command,
        **document,
        "device": device,
        "device_name": found.device,
        "missing": found.missing,
        "remarks": remarks(found),
    }

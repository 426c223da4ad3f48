"""The arithmetic of failures in words and numbers, for people who want to check it."""

from __future__ import annotations

import math

from strategies.failures import DAY_S, SAVE_LATENCY_S, STORAGE_SHARE, Process, Shares, Standby, shares, shortage
from strategies.plan import ParallelPlan
from strategies.reliability import CHECKPOINT_BYTES_PER_PARAMETER, checkpoint_bytes, plan_process
from strategies.topology import nodes_needed
from strategies.workload import Term, Workload


def _term(kind: str, value: float, unit: str, formula: str, numbers: str) -> Term:
    return Term(kind=kind, value=value, unit=unit, formula=formula, numbers=numbers)


def explain(work: Workload, plan: ParallelPlan, step_s: float) -> tuple[Term, ...]:
    """The arithmetic of checkpoint, intervals and goodput; arguments and errors are those of :func:`outlook`."""
    what, standby = plan_process(work, plan, step_s, saving=work.saving)
    parts, hardware = shares(what, standby), work.hardware
    nodes, slots = nodes_needed(plan, work.cluster.slots_per_node), work.cluster.slots_per_node
    size = checkpoint_bytes(work.model)
    count, per_day = work.model.parameters, hardware.failures_per_node_day
    copying = f"{SAVE_LATENCY_S:g} + {size:.4g} / ({nodes} * {slots} * {hardware.host_bandwidth:.3g})"
    stored = "bytes per parameter (fp32 master, two Adam moments) * parameters"
    return (
        _term("checkpoint", size, "bytes", stored, f"{CHECKPOINT_BYTES_PER_PARAMETER} * {count:,}"),
        _term("failures", what.rate * DAY_S, "per day", "nodes * failures per node-day", f"{nodes} * {per_day:g}"),
        _term("save", what.copy_s, "s", "latency + bytes / (nodes * devices * host bandwidth)", copying),
        *_tier_terms(what, step_s),
        *_goodput_terms(what, parts, standby),
    )


def _tier_terms(what: Process, step_s: float) -> list[Term]:
    daly = f"sqrt(2 * {what.copy_s:.4g} * {_mtbf(what.rate)})"
    best = "sqrt(2 * save * MTBF) with Daly's corrections"
    written = f"{what.write_s:.4g} / {STORAGE_SHARE:g}"
    every = f"max({step_s:.4g}, {daly}"
    overlapped = "write / share of the storage"
    if what.correlated == 1:
        formula = f"max(step, {best}, {overlapped})"
        return [_term("disk interval", what.disk_s, "s", formula, f"{every}, {written})")]
    memory = f"max(step, {best}, replica)"
    return [
        _term("memory interval", what.memory_s, "s", memory, f"{every}, {what.replica_s:.4g})"),
        _term(
            "disk interval",
            what.disk_s,
            "s",
            f"max(memory interval, {overlapped})",
            f"max({what.memory_s:.4g}, {written})",
        ),
    ]


def _mtbf(rate: float) -> str:
    return f"{1 / rate:.4g}" if rate else "never"


def _goodput_terms(what: Process, parts: Shares, standby: Standby) -> list[Term]:
    exposed = what.rate * (1 - what.correlated) * what.memory_s
    policy = "going on smaller" if shortage(what, standby).shrinks else "waiting for a repair"
    return [
        _term(
            "staffed",
            parts.staffed,
            "share",
            f"1 - {policy}",
            f"{standby.spares} spares, {what.rate * what.repair_s:.3g} nodes under repair on average",
        ),
        _term(
            "running",
            parts.running,
            "share",
            "1 / (1 + E[exp(rate * recovery) - 1])",
            f"rate {what.rate:.3g}/s, memory {what.recover_memory_s:.4g} s, disk {what.recover_disk_s:.4g} s",
        ),
        _term(
            "kept (memory)",
            parts.memory,
            "share",
            "1 / (1 + stalls) * x / (exp(x) - 1) * exp(-rate * write), x = rate * interval",
            f"stalls {what.stall:.3g}, x {exposed if math.isfinite(exposed) else 0:.3g}",
        ),
        _term(
            "kept (disk)",
            parts.disk,
            "share",
            "x / (exp(x) - 1) * exp(-rate * write), x = rate * interval",
            f"x {what.rate * what.correlated * what.disk_s:.3g}",
        ),
        _term(
            "goodput",
            parts.goodput,
            "share",
            "staffed * running * kept (memory) * kept (disk)",
            f"{parts.staffed:.4f} * {parts.running:.4f} * {parts.memory:.4f} * {parts.disk:.4f}",
        ),
    ]

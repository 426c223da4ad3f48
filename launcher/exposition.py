"""A run in numbers, in Prometheus' text format (version 0.0.4), as a node exporter's textfile collector takes it. Pure.

Every sample carries ``run``. Durations are seconds and sizes bytes, as the names say; what is not known is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.account import CLASSES, INCIDENT_CLASSES, PARTS, Account
from launcher.forecast import KEYS, PHASES, measured
from launcher.run import Run, RunState

_ROUTERS = {
    "aux_loss": "Auxiliary losses of the routers, with their weights.",
    "imbalance": "Load of the busiest expert over the average load, in the layer where it is largest.",
    "dropped": "Visits of tokens for which an expert had no room.",
    "crossed": "Visits for which a token went to another rank.",
}
_UNITS = {"step_s": "step_seconds", "stall_s": "checkpoint_stall_seconds", "goodput": "goodput_ratio"}
_UNITS |= {f"{phase}_s": f"{phase}_seconds" for phase in (*PHASES, "restart")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric with its samples.

    Attributes:
        name: Without the prefix ``phalanx_``.
        kind: ``gauge`` or ``counter``.
        text: What it is.
        samples: (labels besides ``run``, value); values that are None are left out.
    """

    name: str
    kind: str
    text: str
    samples: Sequence[tuple[Mapping[str, str], float | None]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What :func:`metrics` tells of.

    Attributes:
        run: The run.
        books: Its account.
        metric: The newest line of metrics.jsonl; empty before the first step.
        steps: Steps of the whole run; None when unknown.
        nodes_up: Nodes with an announced agent.
        nodes_wanted: Nodes and spares that the run asks for.
        checkpoint: Newest committed checkpoint: ``step``, ``bytes``, ``time``; empty before the first.
        unsaved: Checkpoints that could not be written.
        predicted: See :mod:`launcher.forecast`.
        now: When this was put together (UTC seconds).
    """

    run: Run
    books: Account
    metric: Mapping[str, Any]
    steps: int | None
    nodes_up: int
    nodes_wanted: int
    checkpoint: Mapping[str, Any]
    unsaved: int
    predicted: Mapping[str, Any]
    now: float


def metrics(facts: Facts) -> list[Metric]:
    """Everything, in the order in which people look for it."""
    run, metric = facts.run, facts.metric
    states = [({"state": state.value}, float(state is run.state)) for state in RunState]
    return [
        Metric(name="run_state", kind="gauge", text="1 for the state that the run is in.", samples=states),
        _one("written_timestamp_seconds", "When this was written; it gets old when no controller lives.", facts.now),
        _one("step", "Last optimizer step that is complete.", float(metric.get("step", run.step))),
        _one("steps_wanted", "Steps of the whole run.", facts.steps),
        _one("loss", "Loss of that step.", metric.get("loss")),
        _one("gradient_norm", "Gradient norm of that step.", metric.get("grad_norm")),
        _one("tokens_per_second", "Tokens per second of that step.", metric.get("tokens_per_s")),
        *_routers(metric.get("moe", {})),
        _one("attempt", "Number of the newest attempt.", float(len(run.attempts))),
        _one("controller_epoch", "Incarnation of the controller.", float(run.epoch)),
        _one("nodes_up", "Nodes with an agent, spares included.", float(facts.nodes_up)),
        _one("nodes_wanted", "Nodes and spares that the run asks for.", float(facts.nodes_wanted)),
        *_checkpoint(facts),
        *_accounts(facts.books),
        _one("steps_lost_total", "Complete steps that had to be done again.", float(run.steps_lost), "counter"),
        *_forecast(facts.predicted, measured(facts.books)),
    ]


def _one(name: str, text: str, value: float | None, kind: str = "gauge") -> Metric:
    return Metric(name=name, kind=kind, text=text, samples=[({}, value)])


def _routers(found: Mapping[str, Any]) -> list[Metric]:
    """What the routers of that step have done; nothing without experts."""
    visits = {str(expert): float(count) for expert, count in enumerate(found.get("load", ()))}
    load = _by("moe_load", "Visits of tokens per expert, over all layers.", "expert", visits)
    return [*(_one(f"moe_{key}", text, found.get(key)) for key, text in _ROUTERS.items()), load]


def _checkpoint(facts: Facts) -> list[Metric]:
    newest = facts.checkpoint
    age = max(0.0, facts.now - float(newest["time"])) if newest else None
    return [
        _one("checkpoint_step", "Step of the newest committed checkpoint.", newest.get("step")),
        _one("checkpoint_age_seconds", "Since it was committed.", age),
        _one("checkpoint_bytes", "Its size.", newest.get("bytes")),
        _one("checkpoints_total", "Checkpoints committed.", float(facts.books.saves), "counter"),
        _one("checkpoints_failed_total", "Checkpoints that could not be written.", float(facts.unsaved), "counter"),
    ]


def _accounts(books: Account) -> list[Metric]:
    failures = Counter(one.kind for one in books.incidents)
    again = Counter(one.kind for one in books.incidents if one.recovered)
    # Gauges: a step in progress counts as productive, and becomes lost work when it fails.
    wall = {name: books.seconds[name] for name in CLASSES}
    cost = {name: sum(one.seconds[name] for one in books.incidents) for name in INCIDENT_CLASSES}
    parts = [
        ({"class": name, "part": part}, sum(one.parts.get(part, 0.0) for one in books.incidents))
        for part, name in PARTS.items()
    ]
    stalls = {"memory": books.memory_s, "disk": books.disk_stall_s}
    return [
        _one("goodput_ratio", "Share of the wall time that was productive.", books.goodput),
        _by("seconds", "Wall time by class; the classes sum to it.", "class", wall),
        _by("stall_seconds", "Of the class checkpoint_stall, by tier.", "tier", stalls),
        _by("incident_seconds", "What failures have cost, by class.", "class", cost),
        Metric(name="incident_part_seconds", kind="gauge", text="Of incident_seconds, by part.", samples=parts),
        _by("failures_total", "Failures by kind.", "kind", failures, "counter"),
        _by("restarts_total", "Failures after which the ranks trained again, by kind.", "kind", again, "counter"),
    ]


def _by(name: str, text: str, label: str, values: Mapping[str, float], kind: str = "gauge") -> Metric:
    return Metric(name=name, kind=kind, text=text, samples=[({label: key}, float(one)) for key, one in values.items()])


def _forecast(predicted: Mapping[str, Any], found: Mapping[str, Any]) -> list[Metric]:
    """Each with what came true of it, where that is known."""
    texts = (("predicted", "What the planner predicts of", predicted), ("measured", "What came true of", found))
    return [
        _one(f"{told}_{_UNITS[key]}", f"{text} {_UNITS[key]}.", values.get(key))
        for key in KEYS
        for told, text, values in texts
    ]


def exposition(run_name: str, found: Sequence[Metric]) -> str:
    """The text: one block per metric that has a sample."""
    blocks = []
    for one in found:
        lines = [
            f"phalanx_{one.name}{{{_labels({'run': run_name, **labels})}}} {_number(value)}"
            for labels, value in one.samples
            if value is not None
        ]
        if lines:
            head = [f"# HELP phalanx_{one.name} {one.text}", f"# TYPE phalanx_{one.name} {one.kind}"]
            blocks.append("\n".join([*head, *lines]) + "\n")
    return "".join(blocks)


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    value = float(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)

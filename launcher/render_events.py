"""What happens to a run, for people: an event as a sentence, and how far it is. Pure strings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jobs.checkpoint.memory import generation_of
from launcher import clocks, skips, stopping
from launcher.render import moment, node_name, plan_words, plural, seconds, shorten_ids
from launcher.run import EventKind, RunEvent


def event_line(event: RunEvent) -> str | None:
    """One event as a sentence; None for those that people need not see one by one."""
    sentence = _SENTENCES.get(event.kind)
    text = sentence(event) if sentence else None
    return shorten_ids(text) if text else None


def _attempt_planned(event: RunEvent) -> str:
    data = event.data
    moved = data.get("moved")
    nodes = [node_name(str(node)) for node in (data.get("nodes", []) if moved is None else moved.values())]
    step = int(data.get("first_step", 1))
    kept = "copy in memory" if generation_of(str(data.get("resume_from"))) else "checkpoint"
    source = f"from the {kept} of step {step - 1}" if data.get("resume_from") else f"from step {step}"
    names = f"({', '.join(nodes[:8])}{', ...' if len(nodes) > 8 else ''})" if nodes else ""
    where = f"{plural(len(nodes), 'node' if moved is None else 'new node')} {names}".rstrip()
    smaller = " (nodes are missing)" if data.get("wanted") else ""
    alone = skips.left_out(data.get("skip"))
    alone += f"; {data['unfenced']}, and is not waited for" if data.get("unfenced") else ""
    return f"attempt {event.attempt} on {where}, {source}: {plan_words(data.get('plan', {}))}{smaller}{alone}"


def _controller_started(event: RunEvent) -> str | None:
    if event.data.get("adopted"):
        return f"controller {event.epoch} took over; the ranks never stopped"
    return f"controller {event.epoch} takes over" if event.epoch > 1 else None


_DOING = {
    "shrink": "shrinking",
    "grow": "growing",
    "swap": "swapping",
    "wait": "waiting",
    "replace": "replacing",
    "leave": "leaving",
    "adopt": "adopting",
}


def _decision(event: RunEvent) -> str:
    data = event.data
    if data.get("action") == "give_up":
        return f"giving up: {data.get('reason')}"
    if data.get("action") in _DOING:
        return f"{_DOING[data['action']]}: {data.get('reason')}"
    delay = float(data.get("delay_s") or 0.0)
    text = "recovering: " + (f"new ranks in {delay:.1f} s" if delay else "placing new ranks")
    return text + skips.without(data.get("skip")) + skips.rolled_back(data.get("rollback"))


def _detail(data: Mapping[str, Any]) -> str:
    failure = data.get("failure", {})
    return str(failure.get("detail", "unknown") if isinstance(failure, Mapping) else failure)


def _fault(data: Mapping[str, Any]) -> str:
    record = data.get("record", {})
    return str(record.get("fault") or data.get("fault")) if isinstance(record, Mapping) else str(data.get("fault"))


def _waiting(event: RunEvent) -> str:
    data = event.data
    why = data.get("why") or "no reason known"
    return f"waiting for nodes: {data.get('have')} of {data.get('need')} are here; {why}"


def _restored(data: Mapping[str, Any]) -> str:
    return f"; the state was read in {seconds(float(data['restored_s']))}" if "restored_s" in data else ""


def _excluded(event: RunEvent) -> str:
    node, until = node_name(str(event.data.get("node"))), moment(float(event.data.get("until", 0.0)))
    return f"node {node} carries no ranks until {until} UTC: {event.data.get('reason')}"


def _readmitted(event: RunEvent) -> str:
    nodes = ", ".join(node_name(str(node)) for node in event.data.get("nodes", []))
    return f"taken back: {nodes}, {event.data.get('reason')}"


def _unsaved(event: RunEvent) -> str:
    return f"the checkpoint of step {event.data.get('step')} could not be written: {event.data.get('reason')}"


def _pool_unsafe(event: RunEvent) -> str:
    node = node_name(str(event.data.get("node")))
    return f"node {node} starts its ranks afresh, which is slower: {event.data.get('reason')}"


def _clock(data: Mapping[str, Any]) -> str:
    return clocks.words(float(data.get("ahead_s", 0.0)), float(data.get("within_s", 0.0)))


def _cut_off(event: RunEvent) -> str:
    patience_s = float(event.data.get("patience_s", 0.0))
    return f"nothing is heard of any node: the controller is cut off, and waits {patience_s:.0f} s; ranks train on"


def _dying(event: RunEvent) -> str:
    node, waited_s = node_name(str(event.data.get("node"))), float(event.data.get("waited_s", 0.0))
    left = stopping.words(event.data.get("left", []))
    return f"node {node}: {waited_s:.0f} s after SIGKILL these have not ended and are waited for: {left}"


_SENTENCES: dict[EventKind, Callable[[RunEvent], str | None]] = {
    EventKind.ATTEMPT_PLANNED: _attempt_planned,
    EventKind.CONTROLLER_STARTED: _controller_started,
    EventKind.FAILURE_DETECTED: lambda e: f"failure: {_detail(e.data)} (last step {e.data.get('last_step', '?')})",
    EventKind.FAULT_FIRED: lambda e: f"the injected fault was: {_fault(e.data)}",
    EventKind.DECISION: _decision,
    EventKind.CHECKPOINT_FAILED: _unsaved,
    EventKind.CHECKPOINT_REJECTED: lambda e: f"checkpoint refused: {e.data.get('reason') or e.data.get('path')}",
    EventKind.FENCE_LAID: lambda e: str(e.data.get("reason")),
    EventKind.WAITING_FOR_NODES: _waiting,
    EventKind.NODE_EXCLUDED: _excluded,
    EventKind.NODE_READMITTED: _readmitted,
    EventKind.RANKS_DYING: _dying,
    EventKind.STRAGGLER_FOUND: lambda e: f"slow: {_detail(e.data)}",
    EventKind.POOL_UNSAFE: _pool_unsafe,
    EventKind.CUT_OFF: _cut_off,
    EventKind.CLOCK_SKEWED: lambda e: f"node {node_name(str(e.data.get('node')))}: {_clock(e.data)}",
    EventKind.RANKS_SPAWNED: lambda e: f"{plural(int(e.data.get('ranks', 0)), 'rank')} running, loading",
    EventKind.TRAINING_STARTED: lambda e: f"training from step {e.data.get('step')}" + _restored(e.data),
    EventKind.RESUME_REQUESTED: lambda e: "resumed by a person; the budget of restarts is renewed",
    EventKind.CANCEL_REQUESTED: lambda e: "cancelling: the ranks are asked to stop",
    EventKind.RUN_SUCCEEDED: lambda e: f"succeeded at step {e.data.get('step')}",
    EventKind.RUN_FAILED: lambda e: f"failed: {e.data.get('reason')}",
    EventKind.RUN_CANCELLED: lambda e: "cancelled",
}


def progress_line(
    *,
    state: str,
    attempt: int,
    steps: int | None,
    metric: Mapping[str, Any],
    checkpoint: int,
    elapsed_s: float,
    bar: int = 0,
) -> str:
    """One line that says how far a run is.

    Args:
        state: State of the run.
        attempt: Number of the newest attempt.
        steps: Steps of the whole run; None when unknown (scripts).
        metric: The newest line of metrics.jsonl; empty before the first step.
        checkpoint: Step of the newest committed checkpoint; 0 for none.
        elapsed_s: Seconds since the submit.
        bar: Width of a progress bar; 0 for none.
    """
    parts = [f"{state:<10}", seconds(elapsed_s)]
    if steps:
        done = int(metric.get("step", 0))
        filled = round(bar * min(1.0, done / steps))
        parts.append((f"[{'=' * filled}{' ' * (bar - filled)}] " if bar else "") + f"step {done}/{steps}")
    if metric:
        parts += [f"loss {metric['loss']:.4f}", f"{metric.get('tokens_per_s', 0.0):.0f} tokens/s"]
    parts.append(f"attempt {attempt}" if attempt else "no ranks yet")
    if checkpoint:
        parts.append(f"checkpoint {checkpoint}")
    return "  ".join(parts)

"""Did the injected faults really happen, and were they noticed? Pure: the request's faults against two records.

One record is the injector's, made before a fault acts; the other is the controller's log. A fault is proven by its
own record and by a failure of the same attempt, detected afterwards, of the kind and at the place that the fault
implies; a slow rank by being named so in that attempt, not before the step. One failure proves one fault; only faults
that fired before that failure had stopped the gang share it, since the gang then falls once for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.faults import NUMERIC, Fault, named
from launcher import roster
from launcher.recovery import FailureKind
from launcher.run import EventKind, RunEvent

_LOOKS_LIKE: dict[str, frozenset[FailureKind]] = {
    "rank_kill": frozenset({FailureKind.RANK_KILLED}),
    "rank_exit": frozenset({FailureKind.RANK_EXIT}),
    "rank_error": frozenset({FailureKind.RANK_ERROR}),
    "device_lost": frozenset({FailureKind.DEVICE_LOST}),
    "rank_stop": frozenset({FailureKind.HANG}),
    "rank_spin": frozenset({FailureKind.HANG}),
    "rank_deadlock": frozenset({FailureKind.HANG}),
    "rank_slow": frozenset(),  # nothing fails; see named_slow
    "nan_grad": frozenset({FailureKind.NUMERIC}),
    "loss_spike": frozenset({FailureKind.NUMERIC}),
    "bad_update": frozenset({FailureKind.NUMERIC}),
    "node_kill": frozenset({FailureKind.NODE_LOST, FailureKind.PARTITIONED, FailureKind.PREEMPTED}),
    "agent_kill": frozenset({FailureKind.NODE_LOST, FailureKind.PARTITIONED, FailureKind.PREEMPTED}),
}


@dataclass(slots=True)
class _Fall:
    """How one attempt fell: what was seen first, and what was found to be the cause."""

    attempt: int
    nodes: Sequence[str]
    detected: float
    failure: Mapping[str, Any]
    stopped: float = float("inf")
    cause_kind: str = ""
    cause: str = ""
    faults: list[str] = field(default_factory=list)

    def explains(self, fault: Fault) -> bool:
        """Whether this is what the fault looks like from outside."""
        kinds = _LOOKS_LIKE[fault.kind]
        if self.failure.get("kind") in kinds and self._is_place(fault):
            return True
        return self.cause_kind in kinds and self._names_place(fault)

    def _node_of(self, fault: Fault) -> str:
        assert fault.target is not None
        return self.nodes[fault.target] if fault.target < len(self.nodes) else ""

    @staticmethod
    def _shown(fault: Fault) -> int:
        """The step whose numbers show it: an update is seen by the loss after it."""
        assert fault.step is not None
        return fault.step + (fault.kind == "bad_update")

    def _is_place(self, fault: Fault) -> bool:
        if fault.kind in NUMERIC:  # the loss and the norm are everybody's: only the step is known
            return self.failure.get("step") == self._shown(fault)
        if fault.scope == "rank":
            return self.failure.get("rank") == fault.target
        return bool(self._node_of(fault)) and self.failure.get("node") == self._node_of(fault)

    def _names_place(self, fault: Fault) -> bool:
        """The cause is recorded as a sentence."""
        place = f"rank {fault.target}" if fault.scope == "rank" else f"node {self._node_of(fault)}"
        if fault.kind in NUMERIC:
            place = f"step {self._shown(fault)}"
        return re.search(rf"\b{re.escape(place)}(?![\w.-])", self.cause) is not None


def unproven(faults: Sequence[str], events: Iterable[RunEvent], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Injected faults of which the record does not show that they happened and were noticed.

    Args:
        faults: Faults of the request, resolved.
        events: The run's log.
        records: What the injector left (:func:`launcher.progress.fault_records`).
    """
    events = list(events)
    falls = _falls(events)
    by_id = {str(record["id"]): record for record in records}
    fired = [(name, fault, by_id[name]) for name, fault in named(faults) if name in by_id]
    proven = {name for name, fault, record in fired if named_slow(fault, record, events)}
    for name, fault, record in fired:
        for fall in falls:
            if not fall.faults and _may_be(fall, record) and fall.explains(fault):
                fall.faults.append(name)
                proven.add(name)
                break
    for name, _, record in fired:
        if any(fall.faults and _may_be(fall, record) for fall in falls):
            proven.add(name)
    return [str(fault) for name, fault in named(faults) if name not in proven]


def named_slow(fault: Fault, record: Mapping[str, Any], events: Iterable[RunEvent]) -> int:
    """The step at which the rank that has become slow was named, in the attempt in which it is slow; 0 for never."""
    if fault.kind != "rank_slow":
        return 0
    steps = []
    for event in events:
        failure = event.data.get("failure") if event.kind is EventKind.STRAGGLER_FOUND else None
        if isinstance(failure, Mapping) and event.attempt == record.get("attempt"):
            steps += [int(failure.get("step", 0))] if failure.get("rank") == fault.target else []
    return min((step for step in steps if step >= (fault.step or 1)), default=0)


def _may_be(fall: _Fall, record: Mapping[str, Any]) -> bool:
    """The fault fired in this attempt, before the gang was stopped."""
    return int(record.get("attempt", 0)) == fall.attempt and float(record["time"]) <= fall.stopped


def _falls(events: Iterable[RunEvent]) -> list[_Fall]:
    falls: dict[int, _Fall] = {}
    nodes: dict[int, Sequence[str]] = {}
    for event in events:
        if event.kind is EventKind.ATTEMPT_PLANNED:
            nodes[event.attempt] = roster.read(nodes.get(event.attempt - 1, ()), event.data)
        elif event.kind is EventKind.FAILURE_DETECTED:
            failure = event.data.get("failure")
            told = failure if isinstance(failure, Mapping) else {}
            there = nodes.get(event.attempt, ())
            falls[event.attempt] = _Fall(event.attempt, there, detected=event.time, failure=told)
        elif event.kind is EventKind.GANG_STOPPED and event.attempt in falls:
            fall = falls[event.attempt]
            fall.stopped = event.time
            fall.cause_kind, fall.cause = str(event.data.get("failure", "")), str(event.data.get("cause", ""))
    return list(falls.values())

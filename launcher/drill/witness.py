"""What the controller's log says of the faults of a rehearsal: of the right kind, at the right place, after the strike.

The controller knows nothing of the drill. What it has written down before a fault struck, or of another place, is no
word of that fault. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.drill.case import Aim, Case
from launcher.recovery import Action, Failure
from launcher.run import EventKind, Run, RunEvent
from strategies.codec import from_json

Record = Mapping[str, Any]
MANIFEST = ".manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """A failure as first seen or as the cause found afterwards, or a decision.

    Attributes:
        kind: Kind of the failure, or the action.
        time: UTC seconds.
        words: One sentence.
        node: Node that it is put down to, or "".
        rank: Rank that it is put down to, or -1.
    """

    kind: str
    time: float
    words: str
    node: str = ""
    rank: int = -1

    def names(self, place: str | int) -> bool:
        """Whether it is put down to a node or a rank, or speaks of it."""
        if place in (self.node, self.rank):
            return True
        word = place if isinstance(place, str) else f"rank {place}"
        return re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w.-])", self.words) is not None


def sayings(events: Sequence[RunEvent]) -> Iterator[Said]:
    """Every failure and decision of a log."""
    for event in events:
        data, when = event.data, event.time
        if event.kind is EventKind.FAILURE_DETECTED:
            failure = from_json(Failure, data["failure"], where="events.jsonl")
            where: dict[str, Any] = {"node": failure.node, "rank": failure.rank}
            yield Said(kind=failure.kind.value, time=when, words=failure.detail, **where)
        elif event.kind is EventKind.GANG_STOPPED:
            where = {"node": str(data.get("node", "")), "rank": int(data.get("rank", -1))}
            yield Said(kind=str(data.get("failure", "")), time=when, words=str(data.get("cause", "")), **where)
        elif event.kind is EventKind.DECISION:
            yield Said(kind=str(data.get("action", "")), time=when, words=str(data.get("reason", "")))


def places(case: Case, aim: Aim, run: Run, records: Sequence[Record]) -> list[tuple[Record, str | int]]:
    """What the drill has done from outside and the log must name: its record, and the node or rank that it struck."""
    if not run.attempts:
        return []
    gang = run.attempts[0].nodes
    by_id = {str(record["id"]): record for record in records}
    found: list[tuple[Record, str | int]] = []
    for number, act in enumerate(case.acts, 1):
        record = by_id.get(act.proof(number))
        if act.strikes and record is not None:
            nodes = {"target": aim.node, "other": aim.other}
            found.append((record, aim.rank if act.strikes == "rank" else gang[nodes[act.strikes]]))
    return found


def noticed(
    case: Case, aim: Aim, events: Sequence[RunEvent], records: Sequence[Record], struck: Sequence[str | int]
) -> list[str] | None:
    """What the log says of a fault since it struck; None where it does not say what it must.

    Args:
        case: The fault.
        aim: Where it struck.
        events: The log.
        records: Of what did damage.
        struck: Nodes and ranks of :func:`places`.
    """
    since = min((float(record["time"]) for record in records), default=0.0)
    said, failed = [], any(event.kind is EventKind.FAILURE_DETECTED for event in events)
    if case.failures:
        fitting = [one for one in sayings(events) if one.kind in case.failures and one.time >= since]
        if not fitting or (failed and not case.fails):
            return None
        fitting.sort(key=lambda one: not any(one.names(place) for place in struck))
        said.append(fitting[0].words)
    elif failed:
        return None
    for kind in case.events:
        found = [event for event in events if event.kind.value == kind and event.time >= since]
        found = [event for event in found if is_about(event, aim, records)]
        if not found:
            return None
        said.append(told(found[-1]))
    if case.ambush and case.resumes:
        begun = [event for event in events if event.kind is EventKind.CONTROLLER_STARTED and event.time >= since]
        if not begun or (case.adopted and not begun[-1].data["adopted"]):
            return None
        said.append(told(begun[-1]))
    return said


def is_about(event: RunEvent, aim: Aim, records: Sequence[Record]) -> bool:
    """Whether an event may be about what was done: the rank that was slowed, the checkpoint that was damaged."""
    if event.kind is EventKind.STRAGGLER_FOUND:
        failure = event.data["failure"]
        return bool(failure.get("rank") == aim.rank and failure.get("step", 0) >= aim.step)
    if event.kind is EventKind.CHECKPOINT_REJECTED:
        damaged = "/".join(str(event.data["path"]).split("/")[-2:]).removesuffix(MANIFEST)
        return any(damaged in str(record.get("did", "")) for record in records)
    return True


def told(event: RunEvent) -> str:
    """An event in words."""
    words = [f"{name} {event.data[name]}" for name in ("reason", "adopted", "pid", "ratio") if name in event.data]
    if event.kind is EventKind.STRAGGLER_FOUND:
        words.insert(0, str(event.data["failure"].get("detail", "")))
    return f"{event.kind.value} ({', '.join(words)})"


def unnoticed(case: Case, events: Sequence[RunEvent]) -> str:
    """What the log should say of a fault and does not."""
    shown = [f"{one.kind}: {one.words}" for one in sayings(events)]
    shown += [told(event) for event in events if event.kind.value in case.events]
    there = "; ".join(dict.fromkeys(shown)) or "no failure"
    wanted = [*filter(None, [" or ".join(case.failures)]), *map(str, case.events)]
    wanted += [] if case.fails else ["no failure"]
    wanted += [f"a second controller{' that adopts' if case.adopted else ''}"] if case.ambush and case.resumes else []
    return f"the log should show {' and '.join(wanted)}; it shows {there}"


def speaks_of(case: Case, aim: Aim, event: RunEvent, records: Sequence[Record]) -> bool:
    """Whether this may be how it is noticed. Where a certain decision is, others are about something else."""
    decisions = set(case.failures) & set(Action)
    if event.kind is EventKind.DECISION:
        return not decisions or event.data.get("action") in decisions
    if event.kind is EventKind.FAILURE_DETECTED:
        return True
    return event.kind in case.events and is_about(event, aim, records)

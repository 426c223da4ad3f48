"""What the records of a rehearsal prove: that the fault fired, that it was noticed, and what it cost. Reads only.

Two records are held against each other: the proofs that whoever did the damage left before acting, and the log of the
controller, which knew nothing of it. A fault without its proof, or one that nobody noticed, has not fired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.faults import named
from launcher import progress
from launcher.drill import bounds
from launcher.drill.case import Aim, Case, faults_of, hold
from launcher.drill.rehearsal import Ended
from launcher.proof import unproven
from launcher.recovery import Action, Failure, FailureKind
from launcher.run import EventKind, RunEvent
from strategies.codec import from_json

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What is known of one fault.

    Attributes:
        fired: It struck and was noticed.
        proof: What proves it, or what is missing.
        detected_s: From the fault (the last of several) to the controller knowing; None where nothing is to be known.
        within_s: The most that this may take (:mod:`launcher.drill.bounds`); None for no bound.
        recovered_s: From the fault to the next step that the ranks completed; None if there was none.
        steps_lost: Steps that had to be done again.
        most_lost: The most that they may be (:mod:`launcher.drill.bounds`); None for no bound.
        resumes: How often a person had to resume.
        smaller: The run went on with another plan than it began with.
    """

    fired: bool
    proof: str
    detected_s: float | None
    within_s: float | None
    recovered_s: float | None
    steps_lost: int
    most_lost: int | None
    resumes: int
    smaller: bool

    @property
    def late(self) -> bool:
        """It was known later than it must be."""
        return self.detected_s is not None and self.within_s is not None and self.detected_s > self.within_s

    @property
    def costly(self) -> bool:
        """It has cost more steps than it may."""
        return self.most_lost is not None and self.steps_lost > self.most_lost


def gather(case: Case, aim: Aim, ended: Ended) -> Evidence:
    """Hold the records of a rehearsal against each other."""
    events, run = ended.store.events(), ended.store.run()
    every = progress.fault_records(ended.store.paths)
    records = strikes(case, aim, every)
    absent = _absent(case, aim, records, ended)
    struck = max((float(record["time"]) for record in records), default=0.0)
    noticed = _noticed(case, events)
    missing = absent or (_unnoticed(case, events) if noticed is None else _misplaced(case, aim, events, records))
    plans = [one.plan for one in run.attempts]
    return Evidence(
        fired=bool(records) and not missing,
        proof=missing or "; ".join(_words(records, noticed, every)),
        detected_s=_detected_s(case, events, records),
        within_s=bounds.within_s(case, aim, ended.store.request(), ended.store.metrics()),
        recovered_s=_recovered_s(ended, struck),
        steps_lost=run.steps_lost,
        most_lost=bounds.most_lost(case, ended.store.request()),
        resumes=max(0, len(ended.exits) - 1),
        smaller=any(plan != plans[0] for plan in plans),
    )


def strikes(case: Case, aim: Aim, records: Sequence[Record]) -> list[Record]:
    """The records of what did damage: neither the rank that was held for it nor what put an end to it."""
    aside = {name for name, _ in named([hold(aim)])} if case.held else set()
    return [one for one in records if one["id"] not in aside and not str(one["id"]).endswith(".relief")]


def _absent(case: Case, aim: Aim, records: Sequence[Record], ended: Ended) -> str:
    """What should have left a proof and has not."""
    there = {str(record["id"]) for record in records}
    wanted = [name for name, _ in named(faults_of(case, aim)[1 if case.held else 0 :])]
    lacking = [name for name in wanted if name not in there]
    if case.ambush and not any(name.startswith("controller_kill") for name in there):
        lacking.append(f"controller_kill in {case.ambush.upper()}")
    if lacking:
        return f"no proof of {', '.join(lacking)}"
    if ended.undone:
        return f"the moment of {ended.undone} of {len(case.acts)} acts never came"
    if case.ambush and (not ended.exits or ended.exits[0] != -9):
        return f"the controller ended with {ended.exits[:1]}, not by signal 9"
    return ""


def _noticed(case: Case, events: Sequence[RunEvent]) -> list[str] | None:
    """What the controller's log says of it; None when it does not say what it must."""
    said = []
    failures = _failures(events)
    if case.failures:
        fitting = [detail for kind, detail in failures if kind in case.failures]
        if not fitting:
            return None
        said.append(fitting[0])
    elif any(event.kind is EventKind.FAILURE_DETECTED for event in events):
        return None
    for kind in case.events:
        found = [event for event in events if event.kind.value == kind]
        if not found:
            return None
        said.append(_told(found[-1]))
    if case.ambush and case.resumes:
        begun = [event for event in events if event.kind is EventKind.CONTROLLER_STARTED]
        if len(begun) < 2 or (case.adopted and not begun[-1].data["adopted"]):
            return None
        said.append(_told(begun[-1]))
    return said


def _misplaced(case: Case, aim: Aim, events: Sequence[RunEvent], records: Sequence[Record]) -> str:
    """Faults of ranks that were noticed as something else, or at another place than where they struck."""
    faults = faults_of(case, aim)[1 if case.held else 0 :]
    hidden = FailureKind.SECONDARY in case.failures  # who was told of the cause has died before it could say so
    wrong = unproven(faults, events, records) if case.failures and not hidden else []
    return f"the log does not name the place of {', '.join(wrong)}" if wrong else ""


def _failures(events: Sequence[RunEvent]) -> list[tuple[str, str]]:
    """Kind and words of every failure: as first seen, as the cause found afterwards, and what was decided."""
    found = []
    for event in events:
        if event.kind is EventKind.FAILURE_DETECTED:
            failure = from_json(Failure, event.data["failure"], where="events.jsonl")
            found.append((failure.kind.value, failure.detail))
        elif event.kind is EventKind.GANG_STOPPED:
            found.append((str(event.data.get("failure", "")), str(event.data.get("cause", ""))))
        elif event.kind is EventKind.DECISION:
            found.append((str(event.data.get("action", "")), str(event.data.get("reason", ""))))
    return found


def _told(event: RunEvent) -> str:
    words = {key: event.data[key] for key in ("reason", "adopted", "pid", "ratio") if key in event.data}
    return f"{event.kind.value} ({', '.join(f'{key} {value}' for key, value in words.items())})"


def _unnoticed(case: Case, events: Sequence[RunEvent]) -> str:
    found = dict.fromkeys(f"{kind}: {detail}" for kind, detail in _failures(events))
    there = "; ".join(found) or "no failure"
    wanted = [*filter(None, [" or ".join(case.failures)]), *map(str, case.events)] or ["no failure"]
    wanted += [f"a second controller{' that adopts' if case.adopted else ''}"] if case.ambush and case.resumes else []
    return f"the log should show {' and '.join(wanted)}; it shows {there}"


def _words(records: Sequence[Record], noticed: Sequence[str] | None, every: Sequence[Record]) -> list[str]:
    done = [str(record.get("did") or record["fault"]) for record in records]
    ended = [
        str(one["did"]) for one in every if str(one["id"]).endswith(".relief") and "SIGCONT" not in str(one["did"])
    ]
    return [" + ".join(done), *ended, *(f'log: "{line}"' for line in noticed or ())]


def _detected_s(case: Case, events: Sequence[RunEvent], records: Sequence[Record]) -> float | None:
    """From the last strike to the first word after it; from the first one where the log is silent from the last on."""
    attempt = max((int(record.get("attempt", 0)) for record in records), default=0)
    if case.ambush:
        told = [e.time for e in events if e.kind is EventKind.CONTROLLER_STARTED]
    elif case.failures or case.events:
        told = [e.time for e in events if e.attempt >= attempt and _speaks_of(case, e)]
    else:
        return None
    struck = sorted(float(record["time"]) for record in records)
    since = ([at - then for at in told if at >= then] for then in (struck[-1:] + struck[:1]))
    return next((min(later) for later in since if later), None)


def _speaks_of(case: Case, event: RunEvent) -> bool:
    """Whether this may be how it is noticed. Where a certain decision is, others are about something else."""
    decisions = set(case.failures) & set(Action)
    if event.kind is EventKind.DECISION:
        return not decisions or event.data.get("action") in decisions
    return event.kind is EventKind.FAILURE_DETECTED or event.kind in case.events


def _recovered_s(ended: Ended, struck: float) -> float | None:
    """Time to the first step that the ranks completed afterwards which then brought the run to its end."""
    metrics = [(int(line["attempt"]), float(line["time"])) for line in ended.store.metrics()]
    last = max((attempt for attempt, _ in metrics), default=0)
    later = [time for attempt, time in metrics if attempt == last and time > struck]
    return min(later) - struck if later else None

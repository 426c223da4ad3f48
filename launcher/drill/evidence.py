"""What the records of a rehearsal prove: that the fault fired, that it was noticed, and what it cost. Reads only.

Two records are held against each other: the proofs that whoever did the damage left before acting, and the log of the
controller, which knew nothing of it (:mod:`launcher.drill.witness`). A fault without its proof, one that struck at
another moment or place than it was to, or one that nobody noticed afterwards, has not fired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.faults import named
from launcher import progress
from launcher.drill import bounds
from launcher.drill.case import Aim, Case, faults_of, hold
from launcher.drill.promises import Facts
from launcher.drill.rehearsal import Ended
from launcher.drill.witness import Record, noticed, places, sayings, speaks_of, unnoticed
from launcher.proof import unproven
from launcher.recovery import FailureKind
from launcher.run import EventKind, RunEvent


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
        broken: What else the fault must have come to and has not (:mod:`launcher.drill.promises`).
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
    broken: tuple[str, ...] = ()

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
    struck = places(case, aim, run, every)
    words = noticed(case, aim, events, records, [place for _, place in struck])
    missing = _absent(case, aim, records, ended) or _untimely(case, events, every)
    missing = missing or (unnoticed(case, events) if words is None else _misplaced(case, aim, events, records, struck))
    facts = Facts(store=ended.store, aim=aim, records=every)
    last = max((float(record["time"]) for record in records), default=0.0)
    return Evidence(
        fired=bool(records) and not missing,
        proof=missing or "; ".join(_words(records, words, every)),
        detected_s=_detected_s(case, aim, events, records),
        within_s=bounds.within_s(case, aim, ended.store.request(), ended.store.metrics()),
        recovered_s=_recovered_s(ended, last),
        steps_lost=run.steps_lost,
        most_lost=bounds.most_lost(case, ended.store.request()),
        resumes=max(0, len(ended.exits) - 1),
        smaller=any(one.plan != run.attempts[0].plan for one in run.attempts),
        broken=() if missing else tuple(filter(None, (promise(facts) for promise in case.promises))),
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
        return f"the moment of {ended.undone} of {len(case.acts)} acts never came, or was over"
    if case.ambush and (not ended.exits or ended.exits[0] != -9):
        return f"the controller ended with {ended.exits[:1]}, not by signal 9"
    return ""


def _untimely(case: Case, events: Sequence[RunEvent], every: Sequence[Record]) -> str:
    """What was done when its moment was over, which a machine that is busy may bring about."""
    by_id = {str(record["id"]): record for record in every}
    for number, act in enumerate(case.acts, 1):
        record, over = by_id.get(act.proof(number)), act.over(events)
        if record is not None and over is not None and float(record["done"]) > over:
            late_s = float(record["done"]) - over
            return f"{record['did']}: that was {late_s:.2f} s after the log had {act.before}, and must be before it"
    return ""


def _misplaced(
    case: Case,
    aim: Aim,
    events: Sequence[RunEvent],
    records: Sequence[Record],
    struck: Sequence[tuple[Record, str | int]],
) -> str:
    """What was noticed as something else, or at another place than where it struck."""
    faults = faults_of(case, aim)[1 if case.held else 0 :]
    hidden = FailureKind.SECONDARY in case.failures  # who was told of the cause has died before it could say so
    wrong = [] if hidden else unproven(faults, events, records)
    said = [one for one in sayings(events) if one.kind in case.failures]
    for record, place in struck if case.failures else ():
        if not any(one.time >= float(record["time"]) and one.names(place) for one in said):
            wrong.append(str(record["did"]))
    return f"the log does not name the place of {', '.join(wrong)}" if wrong else ""


def _words(records: Sequence[Record], words: Sequence[str] | None, every: Sequence[Record]) -> list[str]:
    done = [str(record.get("did") or record["fault"]) for record in records]
    ended = [
        str(one["did"]) for one in every if str(one["id"]).endswith(".relief") and "SIGCONT" not in str(one["did"])
    ]
    return [" + ".join(done), *ended, *(f'log: "{line}"' for line in words or ())]


def _detected_s(case: Case, aim: Aim, events: Sequence[RunEvent], records: Sequence[Record]) -> float | None:
    """From the last strike to the first word after it; from the first one where the log is silent from the last on."""
    attempt = max((int(record.get("attempt", 0)) for record in records), default=0)
    if case.ambush:
        told = [e.time for e in events if e.kind is EventKind.CONTROLLER_STARTED]
    elif case.failures or case.events:
        told = [e.time for e in events if e.attempt >= attempt and speaks_of(case, aim, e, records)]
    else:
        return None
    struck = sorted(float(record["time"]) for record in records)
    since = ([at - then for at in told if at >= then] for then in (struck[-1:] + struck[:1]))
    return next((min(later) for later in since if later), None)


def _recovered_s(ended: Ended, struck: float) -> float | None:
    """Time to the first step that the ranks completed afterwards which then brought the run to its end."""
    metrics = [(int(line["attempt"]), float(line["time"])) for line in ended.store.metrics()]
    last = max((attempt for attempt, _ in metrics), default=0)
    later = [time for attempt, time in metrics if attempt == last and time > struck]
    return min(later) - struck if later else None

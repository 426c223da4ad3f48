"""The outcome of a drill, fault by fault: values, and the table for people. Pure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.drill.case import Aim, Case, Outcome
from launcher.drill.changes import Change
from launcher.drill.compare import Comparison
from launcher.drill.evidence import Evidence
from launcher.render import indent, plural, seconds, table
from strategies.codec import to_json
from strategies.errors import DrillFailed, DrillIncomplete
from strategies.specs import Precision

SCHEMA_VERSION = 1
Verdict = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One fault.

    Attributes:
        name: Name of its run.
        case: What it was.
        aim: Where it struck.
        verdict: ``ok``: it fired and the run ended as it must.
        why: What is wrong, or why it was skipped.
        evidence: What the records prove; None where it was skipped.
        comparison: Against the undisturbed run.
        precision: Arithmetic of the rehearsal.
    """

    name: str
    case: Case
    aim: Aim
    verdict: Verdict
    why: str = ""
    evidence: Evidence | None = None
    comparison: Comparison | None = None
    precision: Precision = "fp32"

    @property
    def numbers(self) -> str:
        """How the run compares, in a cell."""
        compared = self.comparison
        if compared is None:
            return "-"
        if compared.problem:
            return "no"
        if compared.identical:
            return Outcome.SAME.value
        close = compared.meets(Outcome.CLOSE, self.precision)
        return f"{'rounding' if close else 'NO'}, {compared.worst:.1e}"


def judge(
    name: str, case: Case, aim: Aim, evidence: Evidence, comparison: Comparison, *, problem: str, precision: Precision
) -> Result:
    """Put evidence and comparison together: everything that is wrong, in order of importance."""
    wrong = [problem] if problem else []
    if not evidence.fired:
        wrong.append(f"not proven that it fired: {evidence.proof}")
    if evidence.late:
        wrong.append(f"known after {_time(evidence.detected_s)}, and must be within {_time(evidence.within_s)}")
    if evidence.costly:
        wrong.append(f"it has cost {plural(evidence.steps_lost, 'step')}, and may cost {evidence.most_lost} at most")
    wrong += evidence.broken
    outcome = Outcome.CLOSE if evidence.smaller else Outcome.SAME
    if not comparison.meets(outcome, precision):
        wrong.append(comparison.problem or f"not {outcome.value}: {comparison.difference}")
    if case.outcome is Outcome.SAME and evidence.smaller:
        wrong.append("it went on with a smaller plan, and should not have needed one")
    if case.outcome is Outcome.CLOSE and not evidence.smaller:
        wrong.append("it went on with the same plan, and a smaller one was to take over")
    return Result(
        name=name,
        case=case,
        aim=aim,
        verdict="failed" if wrong else "ok",
        why="; ".join(wrong),
        evidence=evidence,
        comparison=comparison,
        precision=precision,
    )


def line(result: Result) -> str:
    """One result in a line, as it comes in."""
    found = result.evidence
    if found is None:
        return f"{result.verdict}: {result.name}: {result.why}"
    cells = [f"{result.verdict}: {result.name}", f"recovered in {_time(found.recovered_s)}"]
    cells += [f"{plural(found.steps_lost, 'step')} lost", result.numbers]
    return ", ".join(cells) + (f" - {result.why}" if result.why else "")


HEADER = ("FAULT", "AT", "FIRED", "DETECTED", "WITHIN", "RECOVERED", "LOST", "BY", "WEIGHTS AND LOSSES", "VERDICT")


def render(results: Sequence[Result]) -> str:
    """The table, and under it what proves each fault."""
    rows = [_row(result) for result in results]
    told = [_told(result) for result in results]
    return f"{table(HEADER, rows, right=(3, 4, 5, 6))}\n\nPROOF\n" + "\n".join(told) + f"\n\n{summary(results)}"


def _row(result: Result) -> tuple[object, ...]:
    found = result.evidence
    if found is None:
        return (result.name, *"--------", result.verdict)
    return (
        result.name,
        where(result),
        "yes" if found.fired else "NO",
        _time(found.detected_s),
        _time(found.within_s),
        _time(found.recovered_s),
        found.steps_lost,
        "a person's resume" if found.resumes else "itself",
        result.numbers,
        result.verdict if result.verdict == "ok" else result.verdict.upper(),
    )


def where(result: Result) -> str:
    """Where it struck, as short as possible."""
    aim, text = result.aim, " ".join(result.case.faults)
    parts = []
    if "{rank}" in text or result.case.held:
        parts.append(f"rank {aim.rank}")
    struck = {act.strikes for act in result.case.acts}
    if "{node}" in text or "target" in struck:
        parts.append(f"node {aim.node}")
    if "{other}" in text or "other" in struck:
        parts.append(f"node {aim.other}")
    parts.append(f"step {aim.step}")
    if "{phase}" in text and aim.phase != "step_begin":
        parts.append(aim.phase)
    return ", ".join(parts)


def _told(result: Result) -> str:
    text = result.why or (result.evidence.proof if result.evidence else "")
    return indent(textwrap.fill(f"{result.name}: {text}", 116, subsequent_indent="    "))


def _time(value: float | None) -> str:
    return "-" if value is None else seconds(value)


def summary(results: Sequence[Result]) -> str:
    """The verdict on the whole."""
    count = {verdict: sum(one.verdict == verdict for one in results) for verdict in ("ok", "failed", "skipped")}
    same = sum(one.comparison is not None and one.comparison.identical for one in results)
    parts = [f"{plural(count['ok'], 'fault')} of {len(results)} passed, {same} bit-identical"]
    parts += [f"{count['failed']} failed"] if count["failed"] else []
    parts += [f"{count['skipped']} cannot be rehearsed here"] if count["skipped"] else []
    return "; ".join(parts) + "."


def document(results: Sequence[Result], *, folder: str, plan: str, changes: Sequence[Change], seed: int | None) -> Any:
    """All of it for programs."""
    return {
        "schema_version": SCHEMA_VERSION,
        "folder": folder,
        "plan": plan,
        "seed": seed,
        "shrunk": to_json(list(changes)),
        "summary": {v: sum(one.verdict == v for one in results) for v in ("ok", "failed", "skipped")},
        "faults": [_document(result) for result in results],
    }


def _document(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "kind": result.case.name,
        "what": result.case.what,
        "aim": to_json(result.aim),
        "expected": result.case.outcome.value,
        "verdict": result.verdict,
        "why": result.why,
        "evidence": to_json(result.evidence),
        "comparison": _finite(to_json(result.comparison)),
    }


def _finite(compared: Any) -> Any:
    """JSON has no infinity: what could not be compared has no distance."""
    return compared and {key: None if value == math.inf else value for key, value in compared.items()}


def verdict(results: Sequence[Result], folder: Path) -> DrillFailed | DrillIncomplete | None:
    """What is wrong with a drill, if anything."""
    failed = [one.name for one in results if one.verdict == "failed"]
    skipped = [one.name for one in results if one.verdict == "skipped"]
    if failed:
        return DrillFailed(
            f"{plural(len(failed), 'fault')} of {len(results)} did not end as it must: {', '.join(failed)}.",
            hint=f"Each has its run in {folder}; drill.log there is the controller's, attempts/ has the ranks'.",
        )
    if skipped:
        return DrillIncomplete(
            f"{plural(len(skipped), 'fault')} of {len(results)} cannot be rehearsed here: {', '.join(skipped)}.",
            why="the others passed; the table says what each of these needs",
            hint="Give the machine what is needed, or name the faults you want with --faults.",
        )
    return None


def catalogue_text(cases: Sequence[Case]) -> str:
    """Every fault with what it does and needs."""
    rows = [(case.name, case.outcome.value, _how(case), case.what) for case in cases]
    return (
        table(("FAULT", "MUST END", "GOES ON BY", "WHAT HAPPENS"), rows)
        + "\n\nNEEDS\n"
        + "\n".join(f"  {case.name}: {'; '.join(need.value for need in case.needs)}" for case in cases if case.needs)
    )


def _how(case: Case) -> str:
    return "resume" if case.resumes else "itself"


def catalogue_document(cases: Sequence[Case]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "schema_version": SCHEMA_VERSION,
        "faults": [
            {
                "name": case.name,
                "what": case.what,
                "expected": case.outcome.value,
                "goes_on_by": _how(case),
                "needs": [need.value for need in case.needs],
                "random": case.drawn,
            }
            for case in cases
        ],
    }

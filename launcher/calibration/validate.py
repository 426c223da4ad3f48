"""Predicted against measured, for a file of published runs.

Every row is predicted on its own: nothing that was measured in the file, or fitted to it, enters. Rows that the
constants were fitted to (they are in ``published_runs.csv`` beside this module) are told apart from the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.calibration.metrics import MISSING, agreement, spearman, verdicts
from launcher.calibration.rows import FITTED_ROWS, Row, Skipped, read_rows
from launcher.calibration.validation_text import validation_text
from strategies import calibrated
from strategies.calibration import lookup
from strategies.errors import PhalanxError
from strategies.memory import FITTED, Memory
from strategies.timing import Timing
from strategies.workload import Workload

__all__ = ["validate", "validation_text"]

SCHEMA_VERSION = 1

SKIPPED_LIMIT = 0.05
"""Above this share of skipped rows, each of them counts as wrong."""

_SWEEP_ROWS = 4  # fewer plans have no ranking to speak of


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """One row and what the planner says about it.

    Attributes:
        row: The run.
        step_s: Seconds per step.
        low_s: Lower end of the 90 % band.
        high_s: Upper end.
        peak_bytes: Memory of the fullest rank, counted as the row counted it.
        fits: It stays within the device's memory; where the row does not state recomputation, with the least that does.
        warnings: What the prediction cannot be trusted about.
        seen: The constants were fitted to this row.
    """

    row: Row
    step_s: float
    low_s: float
    high_s: float
    peak_bytes: float
    fits: bool
    warnings: tuple[str, ...]
    seen: bool

    @property
    def step_error(self) -> float | None:
        """Signed relative error of the step time."""
        return self.step_s / self.row.step_s - 1 if self.row.step_s else None

    @property
    def memory_error(self) -> float | None:
        """Signed relative error of the memory."""
        return self.peak_bytes / self.row.peak_bytes - 1 if self.row.peak_bytes else None

    @property
    def fitted(self) -> bool:
        """The run did not run out of memory."""
        return self.row.outcome == "ok"


def validate(path: Path) -> dict[str, Any]:
    """Predict every run of a file and compare.

    Raises:
        ConfigError: The file cannot be read or has bad cells; all of them are listed.
    """
    sheet = read_rows(path)
    seen = {} if not FITTED_ROWS.is_file() else {row.id: row for row in read_rows(FITTED_ROWS).rows}
    done, skipped = _predict_all(sheet.rows, seen)
    skipped = [*sheet.skipped, *skipped]
    share = len(skipped) / (len(skipped) + len(done))
    counted = skipped if share > SKIPPED_LIMIT else []
    families = sorted({one.row.family for one in done} | {one.family for one in skipped})
    return {
        "schema_version": SCHEMA_VERSION,
        "path": sheet.path,
        "overall": {**_summary(done, counted), **_ranking(done)},
        "families": {name: _family(name, done, counted) for name in families},
        "devices": _groups(done, _kind),
        "fit": {
            "seen": _summary([one for one in done if one.seen], []),
            "unseen": _summary([one for one in done if not one.seen], counted),
        },
        "sweeps": _sweeps(done),
        "skipped": {
            "n": len(skipped),
            "share": share,
            "limit": SKIPPED_LIMIT,
            "counted_as_wrong": bool(counted),
            "rows": [{"id": s.id, "line": s.line, "family": s.family, "reason": s.reason} for s in skipped],
        },
        "constants": {
            "step_time": {"fitted": len(calibrated.CONSTANTS), "runs": calibrated.ROWS},
            "memory": {"fitted": len(FITTED), "runs": sum({name.split()[0]: n for name, n in FITTED.items()}.values())},
        },
        "calibrations": _calibrations(done),
        "rows": [_row(one) for one in done],
    }


# ---- prediction -------------------------------------------------------------------------------------------------


def _predict_all(rows: Iterable[Row], seen: dict[str, Row]) -> tuple[list[Predicted], list[Skipped]]:
    parts: dict[Workload, tuple[Timing, Memory]] = {}
    done: list[Predicted] = []
    skipped: list[Skipped] = []
    for row in rows:
        try:
            if row.work not in parts:
                parts[row.work] = (Timing(row.work), Memory(row.work))
            done.append(_predict(row, *parts[row.work], seen=_same_run(row, seen.get(row.id))))
        except PhalanxError as error:
            skipped.append(
                Skipped(
                    id=row.id,
                    line=row.line,
                    family=row.family,
                    reason=" ".join(str(error).split()),
                    outcome=row.outcome,
                    timed=row.step_s is not None,
                    weighed=row.peak_bytes is not None,
                )
            )
    return done, skipped


def _same_run(row: Row, fitted: Row | None) -> bool:
    """A row of the same name, plan and measurement; a name alone may be a coincidence."""
    return fitted is not None and (row.plan, row.step_s, row.outcome) == (fitted.plan, fitted.step_s, fitted.outcome)


def _predict(row: Row, timing: Timing, memory: Memory, *, seen: bool) -> Predicted:
    step_s = sum(timing.step(row.plan))
    low_s, high_s, warnings = timing.band(row.plan, step_s)
    peak = memory.peak(row.plan)
    least = peak if row.recompute_stated else memory.peak(replace(row.plan, recompute="full"))
    stages = (memory.stage(row.plan, stage) for stage in range(row.plan.pp))
    tensors = max(sum(stage) - stage.context - stage.fragmentation for stage in stages)
    return Predicted(
        row=row,
        step_s=step_s,
        low_s=low_s,
        high_s=high_s,
        peak_bytes=tensors if row.allocated else peak,
        fits=min(peak, least) <= memory.budget(),
        warnings=tuple(warnings),
        seen=seen,
    )


# ---- comparison -------------------------------------------------------------------------------------------------


def _summary(done: Sequence[Predicted], counted: Sequence[Skipped]) -> dict[str, Any]:
    step = [one.step_error for one in done if one.step_error is not None]
    memory = [one.memory_error for one in done if one.memory_error is not None]
    judged = [(one.fitted, one.fits == one.fitted) for one in done]
    held = [one.low_s <= one.row.step_s <= one.high_s for one in done if one.row.step_s]
    return {
        "step_time": agreement([*step, *(MISSING for one in counted if one.timed)]),
        "memory": agreement([*memory, *(MISSING for one in counted if one.weighed)]),
        "verdicts": verdicts([*judged, *((one.outcome == "ok", False) for one in counted)]),
        "band_coverage": sum(held) / len(held) if held else None,
    }


def _family(name: str, done: Sequence[Predicted], counted: Sequence[Skipped]) -> dict[str, Any]:
    own = [one for one in done if one.row.family == name]
    return {
        **_summary(own, [one for one in counted if one.family == name]),
        **_ranking(own),
        "dense": all(one.row.dense for one in own),
        "devices": sorted({one.row.work.cluster.device for one in own}),
        "seen": sum(one.seen for one in own),
    }


def _ranking(done: Sequence[Predicted]) -> dict[str, float | None]:
    """Mean and least rank correlation over the sweeps."""
    found = [sweep["spearman"] for sweep in _sweeps(done) if sweep["spearman"] is not None]
    return {"spearman": sum(found) / len(found) if found else None, "spearman_least": min(found, default=None)}


def _sweeps(done: Sequence[Predicted]) -> list[dict[str, Any]]:
    """Rank correlation inside every group of runs that differ in their plan only."""
    members: dict[str, list[Predicted]] = {}
    for one in done:
        if one.row.step_s:
            members.setdefault(one.row.sweep, []).append(one)
    return [
        {
            "sweep": name,
            "n": len(found),
            "spearman": spearman([one.step_s for one in found], [one.row.step_s or 0.0 for one in found]),
        }
        for name, found in members.items()
        if len({one.row.plan for one in found}) >= _SWEEP_ROWS
    ]


def _groups(done: Sequence[Predicted], key: Callable[[Predicted], str]) -> dict[str, Any]:
    names = sorted({key(one) for one in done})
    return {name: _summary([one for one in done if key(one) == name], []) for name in names}


def _kind(one: Predicted) -> str:
    """What a calibration is keyed by, and whether there are experts."""
    work = one.row.work
    return f"{work.cluster.device} {work.framework} {work.precision}" + ("" if one.row.dense else " experts")


def _calibrations(done: Sequence[Predicted]) -> list[dict[str, Any]]:
    """The constants in use, by name."""
    found = {(c.device, c.framework, c.precision): c for c in (lookup(one.row.work) for one in done)}
    return [{name: getattr(found[key], name) for name in found[key].__dataclass_fields__} for key in sorted(found)]


def _row(one: Predicted) -> dict[str, Any]:
    row = one.row
    return {
        "id": row.id,
        "line": row.line,
        "family": row.family,
        "plan": row.plan.describe(),
        "framework": row.work.framework,
        "step_time": {
            "predicted_s": one.step_s,
            "measured_s": row.step_s,
            "error": one.step_error,
            "low_s": one.low_s,
            "high_s": one.high_s,
        },
        "memory": {"predicted_bytes": one.peak_bytes, "measured_bytes": row.peak_bytes, "error": one.memory_error},
        "verdict": {"predicted": "fit" if one.fits else "oom", "measured": "fit" if one.fitted else "oom"},
        "seen": one.seen,
        "assumed": list(row.assumed),
        "warnings": list(one.warnings),
    }

"""Samples that a run passes over: asked for by the configuration, or left out after a blow-up. Pure.

The event log is where skips that were decided live (:attr:`launcher.run.Run.skips`); an attempt's ``job.json`` lists
them after the configured ones, and every checkpoint records those that it was made with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.spec import JobSpec
from launcher.run import Run


def skipped(job: JobSpec, run: Run) -> list[dict[str, Any]]:
    """Every skip for ``status --json``: before which ``step``, how many ``samples``, ``first`` and ``last`` index, and
    ``by`` whom (``configuration`` or ``recovery``), in the order of the steps."""
    schedule = job.skipping(run.skips).schedule()
    configured = list(job.skips)
    rows = []
    for skip, indices in schedule.skipped():
        asked = skip in configured
        if asked:
            configured.remove(skip)
        rows.append(
            {
                "step": skip.step,
                "samples": skip.samples,
                "first": indices.start,
                "last": indices.stop - 1,
                "by": "configuration" if asked else "recovery",
            }
        )
    return rows


def head(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Lines of a run's text: one per skip."""
    return [
        ("skipped", f"samples {row['first']:,} to {row['last']:,}, before step {row['step']} (by {row['by']})")
        for row in rows
    ]


def without(skip: Mapping[str, Any] | None) -> str:
    """The end of the sentence that tells a decision."""
    return f", without the {skip['samples']} samples of step {skip['step']}" if skip else ""


def rolled_back(rollback: Mapping[str, Any] | None) -> str:
    """The end of the sentence that tells a decision to go back further."""
    if not rollback:
        return ""
    return f", from before step {rollback['before']}, without the samples from there to step {rollback['step']}"


def left_out(skip: Mapping[str, Any] | None) -> str:
    """The end of the sentence that tells an attempt."""
    return f"; {skip['samples']} samples are left out before step {skip['step']}" if skip else ""

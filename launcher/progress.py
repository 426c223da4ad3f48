"""What a run has to show on disk: the newest checkpoint to resume from, and the record of its end. Reads only."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import checkpoint
from jobs.checkpoint.fence import Branch, current
from jobs.checkpoint.layout import Token, place_of
from jobs.checkpoint.memory import MemoryPoint
from jobs.metrics import tells_of_a_step
from jobs.paths import RunPaths
from jobs.spec import JobSpec
from strategies.errors import StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePoint:
    """Where an attempt begins.

    Attributes:
        path: Manifest of the checkpoint (or the folder of a script's checkpoint), or the name of a generation in
            memory; "" for the very beginning.
        step: Step that the checkpoint holds; the attempt runs from the next one.
        memory: Where the parts of the generation are; None for what is on disk.
    """

    path: str = ""
    step: int = 0
    memory: MemoryPoint | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OnDisk:
    """What the checkpoints of a run offer, all of them read once.

    Attributes:
        point: The best of the committed ones that count and were not found damaged (:mod:`jobs.checkpoint.fence`).
        damaged: Committed ones whose manifest cannot be used any more, each with the reason.
        writers: The gangs that have made those that can be used.
        branch: What has decided which ones count; None where all do.
    """

    point: ResumePoint
    damaged: tuple[tuple[str, str], ...] = ()
    writers: frozenset[Token] = frozenset()
    branch: Branch | None = None


def on_disk(
    paths: RunPaths,
    *,
    script: bool,
    rejected: frozenset[str] = frozenset(),
    known: Branch | None = None,
    before: int = 0,
) -> OnDisk:
    """Look at the checkpoints of a run.

    Args:
        paths: The run's files.
        script: What is done lies in folders with a mark, not in manifests.
        rejected: Checkpoints that are not used any more.
        known: As of :func:`jobs.checkpoint.fence.current`.
        before: Only of an earlier step; 0 for any.
    """
    if script:
        return OnDisk(point=_script_point(paths, rejected))
    branch = current(paths.checkpoints, known)
    found, broken = checkpoint.survey(paths.checkpoints, branch)
    points = [
        ResumePoint(path=str(one.path), step=one.step)
        for one in found
        if str(one.path) not in rejected and (not before or one.step < before)
    ]
    return OnDisk(
        point=points[0] if points else ResumePoint(),
        damaged=tuple((str(path), why) for path, why in broken if not before or place_of(path).step < before),
        writers=frozenset(one.token for one in found),
        branch=branch,
    )


def resume_point(paths: RunPaths, *, script: bool, rejected: frozenset[str] = frozenset()) -> ResumePoint:
    """The newest committed checkpoint that was not found damaged."""
    return on_disk(paths, script=script, rejected=rejected).point


def missing(point: ResumePoint, *, script: bool) -> str:
    """What of a checkpoint on disk is not there, at a quick look; "" for nothing. (The ranks read every byte.)"""
    if script or point.memory is not None or not point.path:
        return ""
    with contextlib.suppress(StorageError):  # whether it can be read is for those to say who have to
        return next(iter(checkpoint.absent(point.path)), "")
    return ""


def _script_point(paths: RunPaths, rejected: frozenset[str]) -> ResumePoint:
    """A script's checkpoint is a folder named by its step with a file COMMIT in it."""
    if not paths.checkpoint_dir.is_dir():
        return ResumePoint()
    steps = [path for path in paths.checkpoint_dir.iterdir() if path.name.isdigit() and (path / "COMMIT").exists()]
    usable = [path for path in steps if str(path) not in rejected]
    if not usable:
        return ResumePoint()
    newest = max(usable, key=lambda path: int(path.name))
    return ResumePoint(path=str(newest), step=int(newest.name))


def final_record(paths: RunPaths) -> dict[str, Any]:
    """What the ranks wrote after their last step (``step``, ``weights_digest``, ``checkpoint``); empty if nothing."""
    try:
        value = json.loads(Path(paths.root / "final.json").read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def result(paths: RunPaths, step: int, *, script: bool) -> dict[str, Any]:
    """What the event log keeps of a run that is done: ``step`` is the last that its ranks have told of, if they do."""
    if script:
        return {"step": resume_point(paths, script=True).step, "weights_digest": None}
    return {"step": step, "weights_digest": final_record(paths).get("weights_digest")}


def results(paths: RunPaths) -> dict[str, Any] | None:
    """What an evaluation or a generation has found; None while it has not ended."""
    try:
        value = json.loads(paths.results.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def completed(paths: RunPaths, job: JobSpec) -> dict[str, Any]:
    """What the ranks have left behind when they did all steps of the job; empty while they have not."""
    final = final_record(paths)
    done = job.kind != "script" and int(final.get("step", 0)) >= job.train.steps
    return final if done else {}


def fault_records(paths: RunPaths) -> list[dict[str, Any]]:
    """What the fault injector left as proof, oldest first."""
    records = []
    for path in sorted(paths.faults.glob("*.json")) if paths.faults.is_dir() else []:
        try:
            records.append(json.loads(path.read_text()) | {"id": path.stem})
        except ValueError:
            continue
    return sorted(records, key=lambda record: float(record.get("time", 0.0)))


def last_metric(paths: RunPaths) -> Mapping[str, Any]:
    """The newest whole line of metrics.jsonl that tells of a step; empty if there is none."""
    try:
        with paths.metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and tells_of_a_step(value):
            return value
    return {}

"""Whether a checkpoint belongs to a run: its name, and the model, samples and seed that made it. No torch, no numpy.

Another thing is whether its weights fit a model: :func:`model_differences` tells those, too, with more left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jobs.checkpoint.manifest import Manifest
from jobs.spec import JobSpec
from strategies.specs import ModelSpec, MoeSpec

_PLANNED = ("name", "moe.imbalance")  # nothing that a run does depends on these


def differences(manifest: Manifest, job: JobSpec) -> list[str]:
    """Everything by which a checkpoint is of another run, in words; empty when it is this one's.

    The plan may differ, and so may the model's name and what is planned with: they change nothing. The run's name
    cannot: it is all that tells the runs of a sweep apart.
    """
    extra: Mapping[str, Any] = manifest.extra
    data = extra.get("data") or {}
    found = model_differences(manifest.model, job.model, _PLANNED)
    pairs = [
        ("run", manifest.run_id, job.run_id),
        ("data digest", data.get("digest"), job.data.digest),
        ("vocabulary", data.get("vocab"), job.data.vocab),
        ("seed", extra.get("seed"), job.train.seed),
    ]
    return found + [f"{name}: {there} in the checkpoint, {here} here" for name, there, here in pairs if there != here]


def model_differences(there: ModelSpec, here: ModelSpec, free: Collection[str]) -> list[str]:
    """In what a checkpoint's model is not the one here, in words; experts are compared field by field.

    Args:
        there: The checkpoint's.
        here: Ours.
        free: Fields that may differ, for example ``name`` or ``moe.imbalance``.
    """
    return [
        f"model.{name}: {was} in the checkpoint, {now} here"
        for name, was, now in _pairs(there, here)
        if name not in free
    ]


def _pairs(there: ModelSpec | MoeSpec, here: ModelSpec | MoeSpec, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for field in dataclasses.fields(there):
        was, now = getattr(there, field.name), getattr(here, field.name)
        if isinstance(was, MoeSpec) and isinstance(now, MoeSpec):
            yield from _pairs(was, now, f"{field.name}.")
        elif was != now:
            yield f"{prefix}{field.name}", was, now

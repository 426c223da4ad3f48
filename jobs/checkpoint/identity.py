"""Whether a checkpoint belongs to a run: the model, the samples and the seed that made it. No torch, no numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jobs.checkpoint.manifest import Manifest
from jobs.spec import JobSpec


def differences(manifest: Manifest, job: JobSpec) -> list[str]:
    """Everything by which a checkpoint is of another run, in words; empty when it is this one's.

    The plan may differ, and so may names: they change nothing.
    """
    extra: Mapping[str, Any] = manifest.extra
    data = extra.get("data") or {}
    found = [
        f"model.{field.name}: {there} in the checkpoint, {here} here"
        for field in dataclasses.fields(job.model)
        if field.name != "name"
        and (there := getattr(manifest.model, field.name)) != (here := getattr(job.model, field.name))
    ]
    pairs = [
        ("data digest", data.get("digest"), job.data.digest),
        ("vocabulary", data.get("vocab"), job.data.vocab),
        ("seed", extra.get("seed"), job.train.seed),
    ]
    return found + [f"{name}: {there} in the checkpoint, {here} here" for name, there, here in pairs if there != here]

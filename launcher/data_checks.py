"""What a configuration says of its data, and what is wrong with that before any file is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.data.kinds import KINDS
from jobs.data.mixture import form_problems
from jobs.data.sources import default_name
from jobs.data.surveying import named
from jobs.spec import DataSpec, SourceSpec
from launcher.schema import Config
from launcher.typed import Problem


def data_spec(config: Config) -> DataSpec:
    """What the configuration says of the data; not prepared."""
    data = config.data
    sources = (
        SourceSpec(
            path=one.path or "",
            name=one.name or "",
            kind=one.kind,
            field=one.field,
            config=one.config or "",
            split=one.split or "",
            weight=one.weight,
            epochs=one.epochs,
        )
        for one in data.sources
    )
    return DataSpec(
        kind=data.kind,
        path=data.path or "",
        sources=tuple(sources),
        tokenizer=data.tokenizer or "",
        end_token=data.end_token or "",
        validation=data.validation,
        packing=data.packing,
    )


def unprepared(data: DataSpec) -> DataSpec:
    """Data as they are asked for, without what preparing them has found."""
    bare = (
        replace(one, name=one.name or default_name(one), store="", digest="", share=0, documents=0, tokens=0)
        for one in data.sources
    )
    return replace(data, store="", digest="", vocab=0, end_id=0, sources=tuple(bare) if data.kind == "mixture" else ())


def sources_outline(config: Config) -> list[dict[str, Any]] | None:
    """The sources of a mixture before any file is looked at: ``share`` of what is dealt by weight, or ``epochs``."""
    if config.data.kind != "mixture" or config.job.kind != "pretrain":
        return None
    sources = named(data_spec(config))
    total = sum(one.weight or 0.0 for one in sources) or 1.0
    return [
        {
            "name": one.name,
            "share": None if one.weight is None else one.weight / total,
            "epochs": one.epochs,
        }
        for one in sources
    ]


def absent(config: Config) -> list[str]:
    """Paths of the data that are not on this machine; they may be where the run is submitted."""
    data = config.data
    if config.job.kind != "pretrain":
        return []
    paths = [data.path if data.kind == "text" else None, *(one.path for one in data.sources), data.tokenizer]
    return [path for path in paths if path and not Path(path).expanduser().exists()]


def data_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with the data of a run, as far as no file has to be looked at."""
    data = config.data
    if config.job.kind == "script":
        return
    if data.kind == "text" and not data.path:
        yield Problem(key="data.path", message="missing", hint="data=text data.path=FILE_OR_DIR")
    if data.kind == "mixture" and not data.sources:
        hint = "data=mixture 'data.sources=[{path: a.jsonl, weight: 3}, {path: books, weight: 1}]'"
        yield Problem(key="data.sources", message="missing", hint=hint)
    if data.kind != "mixture" and data.sources:
        yield Problem(key="data.sources", message=f"data.kind={data.kind} has none", hint="Use data=mixture.")
    if data.kind == "mixture":
        for number, key, message, hint in form_problems(named(data_spec(config)), KINDS):
            yield Problem(key=f"data.sources[{number}].{key}", message=message, hint=hint)
    if data.end_token and not data.tokenizer and not config.train.init_from:
        message = "a tokenizer that is trained on the text has no end but its own"
        yield Problem(key="data.end_token", message=message, hint="data.tokenizer=FILE names another.")
    if config.train.eval_every and not data.validation:
        message = "there is nothing to validate with, data.validation is 0"
        yield Problem(key="train.eval_every", message=message, hint="data.validation=0.01 keeps one document in 100.")

"""Look at every source of a mixture before anything is written, and gather all that is wrong with any of them."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.data.documents import Part
from jobs.data.kinds import KINDS
from jobs.data.mixture import form_problems
from jobs.data.sources import Unit, default_name, units
from jobs.data.work import Request, Runner, answers
from jobs.spec import DataSpec, SourceSpec
from strategies.codec import to_json
from strategies.errors import ConfigError, StorageError

Progress = Callable[[str, float], None]
_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Surveyed:
    """A source after it was read once.

    Attributes:
        source: What was asked for.
        units: What there is to do; files that are not text are left out.
        digest: SHA-256 over the text of all documents.
        documents: How many there are.
        text_bytes: Their length.
        empty: Documents left out because there is nothing in them.
        skipped: Files left out because they are not text.
    """

    source: SourceSpec
    units: tuple[Unit, ...]
    digest: str
    documents: int
    text_bytes: int
    empty: int
    skipped: int


def wanted(source: SourceSpec) -> bool:
    """Whether anything of it is to be trained on."""
    return (source.weight or 0) > 0 or (source.epochs or 0) > 0


def misformed(sources: Sequence[SourceSpec]) -> list[str]:
    """What is wrong with a list of sources before any file is looked at."""
    return [
        f"{sources[number].name}: {key}: {message}. {hint}"
        for number, key, message, hint in form_problems(sources, KINDS)
    ]


def named(data: DataSpec) -> tuple[SourceSpec, ...]:
    """The sources of any kind of data, each with a name; other kinds than ``mixture`` have one."""
    if data.kind != "mixture":
        kind = "stdlib" if data.kind == "stdlib" else "text"
        return (SourceSpec(path=data.path, name=data.kind, kind=kind, weight=1.0),)
    return tuple(replace(source, name=source.name or default_name(source)) for source in data.sources)


def formed(source: SourceSpec) -> bool:
    """Whether it says of what kind it is, and where."""
    return source.kind in KINDS and bool(source.path or source.kind == "stdlib")


def survey_sources(
    sources: Sequence[SourceSpec],
    runner: Runner,
    problems: list[str],
    progress: Progress,
    *,
    most_bytes: float = math.inf,
) -> list[Surveyed]:
    """Read every source once, as it will be read, the smallest first where there is too much for all.

    Args:
        sources: Named.
        runner: Where the work is done.
        problems: All that is wrong is added here.
        progress: Told how far it is (``reading``).
        most_bytes: More than so much is not read in all.

    Returns:
        Those that were read.
    """
    work: list[list[Unit]] = []
    lost: set[str] = set()
    for source in sources:
        try:
            work.append(units(source) if formed(source) else [])
        except (ConfigError, StorageError) as error:
            problems.append(f"{source.name}: {error.what}")
            work.append([])
            lost.add(source.name)
    read = _affordable([sum(unit.size for unit in some) for some in work], most_bytes)
    sources, work = [sources[one] for one in read], [work[one] for one in read]
    requests: list[Request] = [{"verb": "survey", "unit": to_json(unit)} for some in work for unit in some]
    told = answers(runner, requests, [unit.size for some in work for unit in some], "reading", progress)
    found, at = [], 0
    for source, some in zip(sources, work, strict=True):
        pairs = zip(some, told[at : at + len(some)], strict=True)
        parts = [one for unit, answer in pairs for one in zip(unit.parts, answer["parts"], strict=True)]
        at += len(some)
        found.append(_summary(source, some, parts))
        if source.name not in lost and source.kind in KINDS:
            problems += _problems(found[-1], parts)
    return found


def _affordable(sizes: Sequence[int], most_bytes: float) -> list[int]:
    """As many of the smallest as come to no more than ``most_bytes``, in their own order."""
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    totals = itertools.accumulate(sizes[one] for one in order)
    return sorted(one for one, total in zip(order, totals, strict=True) if total <= most_bytes)


def _summary(source: SourceSpec, work: Sequence[Unit], parts: Sequence[tuple[Part, dict[str, Any]]]) -> Surveyed:
    """What was seen of a source."""
    binary = {part.path for part, told in parts if told["binary"]}
    kept = [(part, told) for part, told in parts if part.path not in binary]
    digest = hashlib.sha256("|".join(told["digest"] for _, told in kept).encode())
    left = (replace(one, parts=tuple(part for part in one.parts if part.path not in binary)) for one in work)
    return Surveyed(
        source=source,
        units=tuple(one for one in left if one.parts),
        digest=digest.hexdigest(),
        documents=sum(told["documents"] for _, told in kept),
        text_bytes=sum(told["text_bytes"] for _, told in kept),
        empty=sum(told["empty"] for _, told in kept),
        skipped=len(binary),
    )


def _problems(seen: Surveyed, parts: Sequence[tuple[Part, dict[str, Any]]]) -> list[str]:
    """What is wrong with a source: damaged files, no documents, or records that cannot be used, with the first."""
    source, bad = seen.source, sum(told["bad"] for _, told in parts)
    damaged = list(dict.fromkeys(told["damage"] for _, told in parts if told["damage"]))
    found = [f"{source.name}: {one}" for one in damaged[:_SHOWN]]
    if len(damaged) > _SHOWN:
        found.append(f"{source.name}: {len(damaged) - _SHOWN} more files cannot be read")
    return found + _of_records(seen, parts, bad) if bad or not found else found


def _of_records(seen: Surveyed, parts: Sequence[tuple[Part, dict[str, Any]]], bad: int) -> list[str]:
    source = seen.source
    if not bad:
        if seen.documents or not wanted(source):
            return []
        left = [(seen.empty, "empty"), (seen.skipped, "not text")]
        why = "".join(f", {number} {word}" for number, word in left if number)
        amount = f"weight {source.weight:g}" if source.weight is not None else f"{source.epochs:g} epochs"
        return [f"{source.name}: has {amount}, but no documents in {source.path or source.kind}{why}"]
    shown, before, path = [], 0, ""
    for part, told in parts:
        before = before if part.path == path else 0
        path = part.path
        shown += [f"{part.path}:{before + place}: {what}" for place, what in told["problems"]]
        before += told["lines"]
    shown = shown[:_SHOWN]
    more = f"\n      ... and {bad - len(shown)} more" if bad > len(shown) else ""
    lines = "".join(f"\n      {line}" for line in shown)
    return [f"{source.name}: {bad} {'record' if bad == 1 else 'records'} cannot be used{lines}{more}"]

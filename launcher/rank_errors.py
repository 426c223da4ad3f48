"""``attempts/N/errors.json``: what the ranks of an attempt died of, equal errors as one entry. 512 ranks say one thing.

A list of ``{"error", "kind", "ranks", "nodes"}``: the error without what differs between ranks, the kind of failure,
who had it; the likeliest cause first, then the most frequent.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.paths import RunPaths
from launcher.recovery import Failure, FailureKind
from launcher.store import dump, write_atomic
from strategies.errors import StorageError

_OWN = re.compile(r"0x[0-9a-f]+|\b\d{1,3}(\.\d{1,3}){3}\b|(?<=:)\d{4,5}\b|(?<=pid )\d+|(?<=pid=)\d+", re.IGNORECASE)
"""What differs between ranks that have the same error: addresses of memory, hosts and ports, process ids."""


def grouped(evidence: Sequence[Failure]) -> list[dict[str, Any]]:
    """Failures as groups of equal errors."""
    groups: dict[tuple[FailureKind, str], dict[str, Any]] = {}
    for failure in evidence:
        key = (failure.kind, _OWN.sub("?", _without_rank(failure)))
        group = groups.setdefault(key, {"error": key[1], "kind": failure.kind.value, "ranks": set(), "nodes": set()})
        group["ranks"] |= {failure.rank} - {-1}
        group["nodes"] |= {failure.node} - {""}
    order = list(FailureKind)
    found = sorted(groups.items(), key=lambda item: (order.index(item[0][0]), -len(item[1]["ranks"]), item[0][1]))
    return [{**group, "ranks": sorted(group["ranks"]), "nodes": sorted(group["nodes"])} for _, group in found]


def _without_rank(failure: Failure) -> str:
    """The sentence about a failure without whom it befell, so that equal ones are equal."""
    whose = f"rank {failure.rank} on {failure.node} "
    return failure.detail.removeprefix(whose) if failure.rank >= 0 else failure.detail


def keep(paths: RunPaths, attempt: int, evidence: Sequence[Failure]) -> None:
    """Write them down; a full disk must not hold up a recovery."""
    with contextlib.suppress(StorageError):
        write_atomic(paths.errors(attempt), dump(grouped(evidence)))


def read(paths: RunPaths, attempt: int) -> list[Mapping[str, Any]]:
    """The errors of an attempt; empty when nothing is known."""
    try:
        value = json.loads(paths.errors(attempt).read_text())
    except (OSError, ValueError):
        return []
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def spans(numbers: Sequence[int]) -> str:
    """Numbers as people write them: ``0-3, 7``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)

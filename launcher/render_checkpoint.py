"""The checkpoints of a run as text. Pure strings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.render import size, table


def checkpoints_text(document: Mapping[str, Any], now: float) -> str:
    """A table of what is committed, newest first, what does not count last; a line for every manifest that is damaged.

    Args:
        document: What ``checkpoint ls --json`` prints.
        now: UTC seconds.
    """
    rows = [
        (row["step"], _age(now - row["time"]), size(row["bytes"]), _writer(row), "yes", row["plan"])
        for row in document["checkpoints"]
    ]
    rows += [(row["step"], "", "", _writer(row), "no", row["reason"]) for row in document["superseded"]]
    head = ("STEP", "AGE", "SIZE", "WRITTEN BY", "COUNTS", "PLAN, OR WHY NOT" if document["superseded"] else "PLAN")
    text = table(head, rows, right=(0, 1, 2)) if rows else ""
    broken = [f"damaged: {one['path']}: {one['reason']}" for one in document["damaged"]]
    return "\n".join([*([text] if text else []), *broken])


def _writer(row: Mapping[str, Any]) -> str:
    return f"e{row['epoch']} a{row['attempt']}"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"

"""What went wrong in a run and what it cost, for people at three in the morning. Pure strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.account import INCIDENT_CLASSES, PARTS
from launcher.forecast import KEYS, without_numbers
from launcher.rank_errors import spans
from launcher.render import moment, node_name, plural, shorten_ids, table

_SHOWN = 12  # of the newest incidents; --json has all
_WHAT_WIDTH = 44
_TITLES = {
    "step_s": "one step",
    "stall_s": "stall of a checkpoint",
    "detect_s": "failure until known",
    "decide_s": "decide",
    "place_s": "place",
    "restore_s": "restore (predicted: reading)",
    "replay_s": "replay",
    "restart_s": "known until training",
    "goodput": "goodput",
}

_UNLIKE = ("goodput", "restore_s")  # of a restore only a part is predicted


def incidents_table(incidents: Sequence[Mapping[str, Any]], *, live: bool) -> str:
    """One line per incident: what failed, seconds by class, steps lost; the newest last. Below, parts of the seconds.

    Args:
        incidents: As in the status document.
        live: The run has not ended.
    """
    header = ("#", "UTC", "WHAT FAILED", *(name.upper() for name in INCIDENT_CLASSES), "TOTAL", "STEPS LOST", "THEN")
    rows: list[tuple[object, ...]] = []
    for one in incidents[-_SHOWN:]:
        spent = [_short(one[f"{name}_s"]) for name in INCIDENT_CLASSES]
        rows.append(
            (
                one["number"],
                moment(one["at"])[11:],
                _what(one),
                *spent,
                _short(one["total_s"]),
                one["steps_lost"],
                _then(one, live=live, newest=one is incidents[-1]),
            )
        )
    text = table(header, rows, right=(0, *range(3, 11)))
    left = len(incidents) - _SHOWN
    newest = f" (the newest {_SHOWN} of {len(incidents)})" if left > 0 else ""
    return f"incidents, seconds by class{newest}:\n{text}{_parts(incidents[-_SHOWN:])}"


def _parts(incidents: Sequence[Mapping[str, Any]]) -> str:
    """Of decide and restore, seconds that have a name of their own; "" where none has."""
    known = [one for one in incidents if any(one[f"{part}_s"] is not None for part in PARTS)]
    if not known:
        return ""
    header = ("#", "DECIDE: TEARDOWN", "RESTORE: DEVICE", "COMMUNICATORS", "ENGINE", "STATE", "REST")
    rows: list[tuple[object, ...]] = []
    for one in known:
        named = [one[f"{part}_s"] or 0.0 for part in PARTS]
        rest = one["restore_s"] - sum(of for of, name in zip(named, PARTS.values(), strict=True) if name == "restore")
        rows.append((one["number"], *(_short(seconds) for seconds in (*named, rest))))
    return "\nof which:\n" + table(header, rows, right=tuple(range(7)))


def _what(one: Mapping[str, Any]) -> str:
    rank = f"rank {one['rank']}" if one["rank"] >= 0 else ""
    node = node_name(str(one["node"])) if one["node"] else ""
    where = " on ".join(part for part in (rank, node) if part)
    text = str(one["kind"]).replace("_", " ") + (f": {where}" if where else "")
    return text if len(text) <= _WHAT_WIDTH else text[: _WHAT_WIDTH - 3] + "..."


def _then(one: Mapping[str, Any], *, live: bool, newest: bool) -> str:
    if one["recovered"]:
        return "trains again"
    if one["action"] in ("give_up", "resume"):
        return "gave up" if one["action"] == "give_up" else "a person resumed"
    if newest:
        return "recovering" if live else "the run ended"
    return "failed again"


def _short(number: float) -> str:
    if number < 0.005:
        return "-"
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 1000 else f"{number:.0f}"


def forecast_table(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """Predicted against measured."""
    if without_numbers(predicted):
        return f"not predicted: {predicted['why']}"
    rows = []
    for key in KEYS:
        promise, found = predicted.get(key), measured.get(key)
        ratio = f"{found / promise:.2f} x" if promise and found is not None and key not in _UNLIKE else ""
        told = "not predicted" if promise is None else _value(key, promise)
        rows.append((_TITLES[key], told, _value(key, found), ratio))
    return table(("WHAT", "PREDICTED", "MEASURED", ""), rows, right=(1, 2, 3))


def _value(key: str, number: float | None) -> str | None:
    if number is None:
        return None
    if key == "goodput":
        return f"{100 * number:.1f} %"
    return f"{1000 * number:.0f} ms" if number < 1 else f"{number:.1f} s"


def errors_text(attempt: int, errors: Sequence[Mapping[str, Any]]) -> str:
    """The errors of an attempt, equal ones as one line."""
    lines = [f"errors of attempt {attempt}:"]
    for one in errors:
        ranks = one["ranks"]
        if not ranks:
            who = "node " + ", ".join(node_name(str(node)) for node in one["nodes"])
        else:
            who = f"{plural(len(ranks), 'rank')} ({spans(ranks)})" if len(ranks) > 1 else f"rank {ranks[0]}"
        lines.append(f"  {who}: {shorten_ids(str(one['error']))}")
    return "\n".join(lines)

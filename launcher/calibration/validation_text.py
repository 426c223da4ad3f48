"""The comparison of predictions with published runs, as text. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.render import plural, size, table

_WORST = 10
_REASONS = 20


def validation_text(document: Mapping[str, Any]) -> str:
    """What ``phalanx plan --validate`` shows.

    Args:
        document: What :func:`launcher.calibration.validate.validate` returns.
    """
    blocks = [_head(document), _by_family(document), _by_fit(document)]
    blocks += [_sweeps(document["sweeps"])] if document["sweeps"] else []
    blocks += [_worst(document["rows"], "step_time"), _worst(document["rows"], "memory")]
    blocks += [_wrong_verdicts(document["rows"]), _skipped(document["skipped"])]
    return "\n\n".join(block for block in blocks if block)


def percent(number: float | None, *, sign: bool = False) -> str:
    """A fraction for people: ``7.3 %``."""
    if number is None:
        return "-"
    return f"{100 * number:+.1f} %" if sign else f"{100 * number:.1f} %"


def _head(document: Mapping[str, Any]) -> str:
    step, memory = document["overall"]["step_time"], document["overall"]["memory"]
    judged = document["overall"]["verdicts"]
    fits = f"{judged['fit_right']} of {judged['fit_right'] + judged['fit_wrong']} runs that fitted"
    ooms = f"{judged['oom_right']} of {judged['oom_right'] + judged['oom_wrong']} that ran out of memory"
    held = percent(document["overall"]["band_coverage"])
    lines = [
        f"{document['path']}: {plural(len(document['rows']), 'run')} predicted, {document['skipped']['n']} skipped",
        f"{'step time:':<12}MAPE {percent(step['mape'])}, median {percent(step['median'])}, "
        f"bias {percent(step['bias'], sign=True)} on {plural(step['n'], 'run')}; the 90 % band holds {held}",
        f"{'memory:':<12}MAPE {percent(memory['mape'])}, median {percent(memory['median'])}, "
        f"bias {percent(memory['bias'], sign=True)} on {plural(memory['n'], 'run')}; "
        f"furthest under {percent(memory['under'], sign=True)}",
        f"{'verdicts:':<12}called right: {fits}, {ooms}",
        f"{'constants:':<12}{_fitted(document, 'step_time')}, {_fitted(document, 'memory')}",
    ]
    return "\n".join(lines)


def _fitted(document: Mapping[str, Any], kind: str) -> str:
    one = document["constants"][kind]
    return f"{one['fitted']} of {kind.replace('_', ' ')} (fitted on {plural(one['runs'], 'run')})"


_HEADER = ("", "n", "MAPE", "median", "bias", "band", "Spearman", "n mem", "MAPE", "median", "under", "fit", "oom")
_RIGHT = tuple(range(1, len(_HEADER)))


def _by_family(document: Mapping[str, Any]) -> str:
    rows = [_line(name, one) for name, one in document["families"].items()]
    rows.append(_line("all", document["overall"]))
    return "By family (left: step time, right: memory and verdicts)\n" + table(_HEADER, rows, right=_RIGHT)


def _by_fit(document: Mapping[str, Any]) -> str:
    fit = document["fit"]
    rows = [
        _line("the constants were fitted to", fit["seen"]),
        _line("the fit has not seen", fit["unseen"]),
        *(_line(name, one) for name, one in document["devices"].items()),
    ]
    return "By what the constants were fitted to\n" + table(_HEADER, rows, right=_RIGHT)


def _line(name: str, one: Mapping[str, Any]) -> list[object]:
    step, memory, judged = one["step_time"], one["memory"], one["verdicts"]
    rank = one.get("spearman")
    fits, ooms = judged["fit_right"] + judged["fit_wrong"], judged["oom_right"] + judged["oom_wrong"]
    return [
        name,
        step["n"],
        percent(step["mape"]),
        percent(step["median"]),
        percent(step["bias"], sign=True),
        percent(one["band_coverage"]),
        "-" if rank is None else f"{rank:.2f}",
        memory["n"],
        percent(memory["mape"]),
        percent(memory["median"]),
        percent(memory["under"], sign=True),
        f"{judged['fit_right']}/{fits}",
        f"{judged['oom_right']}/{ooms}",
    ]


def _sweeps(sweeps: Sequence[Mapping[str, Any]]) -> str:
    rows = [(one["sweep"], one["n"], "-" if one["spearman"] is None else f"{one['spearman']:.2f}") for one in sweeps]
    return "Ranking of plans\n" + table(("sweep", "n", "Spearman"), rows, right=(1, 2))


def _worst(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    found = [row for row in rows if row[kind]["error"] is not None]
    found.sort(key=lambda row: -abs(row[kind]["error"]))
    if not found:
        return ""
    unit = "s" if kind == "step_time" else "bytes"
    lines = []
    for row in found[:_WORST]:
        both = [row[kind][f"{side}_{unit}"] for side in ("predicted", "measured")]
        shown = [f"{number:.4g} s" if unit == "s" else size(number) for number in both]
        lines.append((row["id"], row["plan"], *shown, percent(row[kind]["error"], sign=True)))
    title = "Furthest off, step time" if unit == "s" else "Furthest off, memory"
    return f"{title}\n" + table(("run", "plan", "predicted", "measured", "error"), lines, right=(2, 3, 4))


def _wrong_verdicts(rows: Sequence[Mapping[str, Any]]) -> str:
    wrong = [row for row in rows if row["verdict"]["predicted"] != row["verdict"]["measured"]]
    lines = [
        (row["id"], row["plan"], row["verdict"]["predicted"], row["verdict"]["measured"]) for row in wrong[: 2 * _WORST]
    ]
    more = f"\nand {len(wrong) - len(lines)} more" if len(wrong) > len(lines) else ""
    return "Wrong verdicts\n" + table(("run", "plan", "predicted", "measured"), lines) + more if wrong else ""


def _skipped(skipped: Mapping[str, Any]) -> str:
    if not skipped["n"]:
        return ""
    limit = percent(skipped["limit"])
    wrong = f"above {limit}, so each counts as a prediction of nothing (error -100 %) and as a wrong verdict"
    verdict = wrong if skipped["counted_as_wrong"] else f"up to {limit} they do not count"
    head = f"Skipped: {plural(skipped['n'], 'row')}, {percent(skipped['share'])} of all; {verdict}"
    lines = [f"  line {one['line']}, {one['id']}: {one['reason']}" for one in skipped["rows"][:_REASONS]]
    more = [f"  and {skipped['n'] - _REASONS} more"] if skipped["n"] > _REASONS else []
    return "\n".join([head, *lines, *more])

"""The figures of the report but for schedule and placement: time, memory, goodput, finish and cost, the search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from launcher.quantities import days, digits, dollars, percent, span, storage
from launcher.report.kinds import LOST, MEMORY, TIME, style
from launcher.report.svg import CHARACTER, Anchor, Svg, spread, ticks

HALF = 520.0
WIDE = 1096.0

# ---- time --------------------------------------------------------------------------------------------------------


def time_bars(time: Mapping[str, Any]) -> str:
    """Seconds of one step by kind: a bar, the seconds and the share of each."""
    kinds = [(kind, value) for kind, value in time["kinds_s"].items() if value > 0]
    row, left, right = 22, 158.0, 128.0
    figure = Svg(HALF, row * (len(kinds) + 1) + 8, "seconds of one step by kind")
    longest = max((value for _, value in kinds), default=1.0)
    room = HALF - left - right
    for i, (kind, value) in enumerate(kinds):
        y, look = row * i, style(TIME, kind)
        figure.text(left - 10, y + 15, look.label, anchor="end")
        figure.rect(left, y + 4, max(1.0, room * value / longest), 14, look.css, tip=f"{look.label}: {span(value)}")
        figure.text(HALF - 62, y + 15, span(value), anchor="end")
        figure.text(HALF, y + 15, percent(value / time["step_s"]), "soft", anchor="end")
    y = row * len(kinds) + 4
    figure.line(left, y, HALF, y, "grid-line")
    figure.text(left - 10, y + 17, "one step", "strong", anchor="end")
    band = f"90 % band {span(time['low_s'])} to {span(time['high_s'])}"
    figure.text(left, y + 17, band, "soft")
    figure.text(HALF, y + 17, span(time["step_s"]), "strong", anchor="end")
    return str(figure)


# ---- memory ------------------------------------------------------------------------------------------------------


def memory_columns(memory: Mapping[str, Any]) -> str:
    """Bytes of one rank of every stage by kind, with the budget as a line."""
    stages, budget = memory["stages"], memory["budget_bytes"]
    left, top, height, bottom = 52.0, 22.0, 210.0, 38.0
    figure = Svg(HALF, top + height + bottom, "memory of one rank per pipeline stage, by kind")
    highest = max([entry["total_bytes"] for entry in stages] + ([budget] if budget else []))
    scale = height / (highest * 1.06)
    unit, factor = _unit(highest)
    for tick in ticks(highest / factor):
        y = top + height - tick * factor * scale
        figure.line(left, y, HALF, y, "grid-line")
        figure.text(left - 8, y + 4, digits(tick, 2) if tick < 10 else f"{tick:.0f}", "soft", anchor="end")
    figure.text(left - 8, top - 8, unit, "soft", anchor="end")
    pitch = (HALF - left) / len(stages)
    width = min(64.0, pitch * (0.7 if pitch > 8 else 0.88))
    every = max(1, math.ceil(len(stages) * (len(str(len(stages))) + 1) * CHARACTER / (HALF - left)))
    for i, entry in enumerate(stages):
        x, y = left + pitch * (i + 0.5) - width / 2, top + height
        for kind, look in MEMORY.items():
            value = entry.get(f"{kind}_bytes", 0.0)
            if value <= 0:
                continue
            y -= value * scale
            figure.rect(x, y, width, value * scale, look.css, tip=f"stage {i}, {look.label}: {storage(value)}")
        if i % every == 0:
            figure.text(x + width / 2, top + height + 15, str(i), "soft", anchor="middle")
        if pitch >= 58:
            figure.text(x + width / 2, y - 5, storage(entry["total_bytes"]), anchor="middle")
    figure.line(left, top + height, HALF, top + height, "axis")
    figure.text(left + (HALF - left) / 2, top + height + 32, "pipeline stage", "soft", anchor="middle")
    if budget:
        y = top + height - budget * scale
        figure.line(left, y, HALF, y, "limit")
        words = f"budget {storage(budget)}"  # above the bars: a plan that does not fit reaches over the line
        figure.text(HALF, top - 8, words, "bad", anchor="end")
        figure.line(HALF - CHARACTER * len(words) - 34, top - 12, HALF - CHARACTER * len(words) - 10, top - 12, "limit")
    return str(figure)


def memory_kinds(memory: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(class, label) of the kinds that occur, for the legend."""
    present = [kind for kind in MEMORY if any(entry.get(f"{kind}_bytes", 0.0) > 0 for entry in memory["stages"])]
    return [(MEMORY[kind].css, MEMORY[kind].label) for kind in present]


def _unit(highest: float) -> tuple[str, float]:
    table = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((entry for entry in table if highest >= 2 * entry[1]), ("B", 1.0))


# ---- failures ----------------------------------------------------------------------------------------------------


def sweep_curve(failures: Mapping[str, Any]) -> str:
    """Goodput against the seconds that a restart takes."""
    points = [(entry["restart_s"], entry["goodput"]) for entry in failures["sweep"]]
    left, top, width, height = 58.0, 14.0, HALF - 58.0 - 62.0, 160.0
    figure = Svg(HALF, top + height + 40, "goodput against the seconds of a restart")
    floor = _floor(min(value for _, value in points))
    first, last = math.log(points[0][0]), math.log(points[-1][0])

    def x(seconds: float) -> float:
        return left + width * (math.log(seconds) - first) / max(1e-9, last - first)

    def y(goodput: float) -> float:
        return top + height * (1 - (goodput - floor) / max(1e-9, 1 - floor))

    for i in range(5):
        value = floor + (1 - floor) * i / 4
        figure.line(left, y(value), left + width, y(value), "grid-line")
        figure.text(left - 8, y(value) + 4, _percent_tick(value, floor), "soft", anchor="end")
    figure.path([f"{'M' if i == 0 else 'L'}{x(a):.1f} {y(b):.1f}" for i, (a, b) in enumerate(points)], "curve")
    for i, (seconds, goodput) in enumerate(points):
        at_x, at_y = x(seconds), y(goodput)
        figure.dot(at_x, at_y, 4, "blue", tip=f"restart in {span(seconds)}: goodput {percent(goodput, 2)}")
        if i == len(points) - 1:  # the curve comes from above: beside its end there is room
            figure.text(at_x + 9, at_y + 4, percent(goodput, 2))
        else:
            anchor: Anchor = "start" if i == 0 else "middle"
            height_of = at_y + 20 if at_y < top + 20 else at_y - 10
            figure.text(at_x + 4 * (i == 0), height_of, percent(goodput, 2), "halo", anchor=anchor)
        figure.text(at_x, top + height + 18, f"{seconds:g} s", "soft", anchor="middle")
    figure.text(left + width / 2, top + height + 36, "time to restart after a failure", "soft", anchor="middle")
    return str(figure)


def _floor(low: float) -> float:
    """The lower end of an axis that shows losses: a round number, so that the curve fills the figure."""
    for floor in (0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.6, 0.4):
        if low >= floor + (1 - floor) * 0.08:
            return floor
    return 0.0


def _percent_tick(value: float, floor: float) -> str:
    return f"{100 * value:.{0 if floor <= 0.9 and (1 - floor) * 100 % 4 == 0 else 2}f} %"


def lost_bar(failures: Mapping[str, Any]) -> str:
    """Where the hours of the run go, as one bar; what is lost is drawn larger below it."""
    lost = {kind: value for kind, value in failures["lost"].items() if value > 0}
    total = sum(lost.values())
    row, left = 22, 158.0
    figure = Svg(HALF, row * (len(lost) + 1) + 4, "where the time of the run goes")
    room = HALF - left - 66
    figure.text(left - 10, 15, "training", anchor="end")
    figure.rect(left, 4, room * (1 - total), 14, "blue")
    figure.rect(left + room * (1 - total), 4, room * total, 14, "grey2", tip=f"lost: {percent(total, 2)}")
    figure.text(HALF, 15, percent(1 - total, 2), anchor="end")
    for i, (kind, value) in enumerate(lost.items(), start=1):
        look = style(LOST, kind)
        figure.text(left - 10, row * i + 15, look.label, anchor="end")
        figure.rect(left, row * i + 4, max(1.0, room * value), 14, "grey2", tip=f"{look.label}: {percent(value, 3)}")
        figure.text(HALF, row * i + 15, percent(value, 2), "soft", anchor="end")
    return str(figure)


# ---- finish and cost ---------------------------------------------------------------------------------------------


def finish_ranges(failures: Mapping[str, Any]) -> str:
    """Days and dollars: the best guess between the bounds of 10 and 90 %."""
    rows: list[tuple[str, tuple[float, float, float], Callable[[float], str]]] = [
        ("finish", (failures["days_low"], failures["days_50"], failures["days_90"]), days)
    ]
    if failures["cost_50_usd"]:
        costs = (failures["cost_low_usd"], failures["cost_50_usd"], failures["cost_90_usd"])
        rows.append(("cost", costs, dollars))
    left, row = 58.0, 66.0
    figure = Svg(HALF, row * len(rows) + 4, "finish and cost with their bounds")
    for i, (name, values, words) in enumerate(rows):
        _range_row(figure, row * i, left, name, values, words)
    return str(figure)


def _range_row(
    figure: Svg, top: float, left: float, name: str, values: tuple[float, float, float], words: Callable[[float], str]
) -> None:
    """One scale from the early to the late bound, with its three labels kept apart."""
    room, y = HALF - left - 60, top + 30
    margin = 0.1 * (max(values) - min(values)) or 1.0
    low, high = min(values) - margin, max(values) + margin
    places = [left + 20 + room * (value - low) / (high - low) for value in values]
    figure.text(left - 10, y + 4, name, "strong", anchor="end")
    figure.line(left, y, HALF, y, "grid-line")
    figure.line(places[0], y, places[2], y, "whisker")
    for end in (places[0], places[2]):
        figure.line(end, y - 7, end, y + 7, "whisker")
    figure.dot(places[1], y, 6, "blue", tip=f"50 %: {words(values[1])}")
    above = spread(places, 96, left + 40, HALF - 44)
    for at, value, note in zip(above, values, ("10 %", "50 %", "90 %"), strict=True):
        figure.text(at, y - 13, words(value), "strong" if note == "50 %" else "", anchor="middle")
        figure.text(at, y + 24, note, "soft", anchor="middle")


def ladder_bars(rungs: Sequence[Mapping[str, Any]]) -> str:
    """Throughput on fewer nodes, as steps down from all of them."""
    row, left, room = 24, 118.0, WIDE - 118.0 - 210.0
    figure = Svg(WIDE, row * (len(rungs) + 1) + 2, "throughput after nodes are lost")
    entries = [("all nodes", 1.0, "")]
    for one in rungs:
        most, words = one["nodes_lost_most"], f"{one['nodes_lost']}"
        words += f" to {most}" if most > one["nodes_lost"] else ""
        idle = f"{one['idle_nodes']} nodes stand by" if one["idle_nodes"] > 1 else ""
        entries.append((f"{words} lost", one["throughput"], idle))
    for i, (name, share, note) in enumerate(entries):
        y = row * i
        figure.text(left - 10, y + 16, name, anchor="end")
        figure.rect(left, y + 4, room, 16, "lane")
        figure.rect(left, y + 4, room * share, 16, "blue" if i == 0 else "sky", tip=f"{name}: {percent(share)}")
        figure.text(left + room + 60, y + 16, percent(share), anchor="end")
        figure.text(left + room + 74, y + 16, note, "soft")
    return str(figure)


# ---- the search --------------------------------------------------------------------------------------------------


def search_scatter(
    points: Sequence[tuple[float, float]], *, budget: float | None, marks: Iterable[tuple[str, float, float]]
) -> str:
    """Step time against memory of the plans that the search looked at, both on logarithmic axes.

    Args:
        points: (seconds, bytes) of each.
        budget: Bytes a rank may use.
        marks: (name, seconds, bytes) of the plans that have a name.
    """
    marks = list(marks)
    left, top, width, height = 62.0, 20.0, WIDE - 62.0 - 24.0, 300.0
    figure = Svg(WIDE, top + height + 44, "plans that the search looked at: step time against memory")
    all_x = [p[0] for p in points] + [m[1] for m in marks]
    all_y = [p[1] for p in points] + [m[2] for m in marks] + ([budget] if budget else [])
    x, x_ticks = _log_axis(all_x, left, left + width)
    y, y_ticks = _log_axis(all_y, top + height, top)
    for tick in x_ticks:
        figure.line(x(tick), top, x(tick), top + height, "grid-line")
        figure.text(x(tick), top + height + 17, span(tick), "soft", anchor="middle")
    for tick in y_ticks:
        figure.line(left, y(tick), left + width, y(tick), "grid-line")
        figure.text(left - 8, y(tick) + 4, storage(tick), "soft", anchor="end")
    for seconds, peak in points:
        figure.dot(x(seconds), y(peak), 2.4, "cloud" if budget is None or peak <= budget else "beyond")
    if budget:
        figure.line(left, y(budget), left + width, y(budget), "limit")
        figure.text(left + width, y(budget) - 6, f"budget {storage(budget)}", "bad halo", anchor="end")
    _marks(figure, [(name, x(a), y(b), f"{name}: {span(a)}, {storage(b)}") for name, a, b in marks], left + width)
    figure.text(left + width / 2, top + height + 38, "seconds per step", "soft", anchor="middle")
    figure.text(left - 8, top - 8, "per rank", "soft", anchor="end")
    return str(figure)


def _marks(figure: Svg, marks: Sequence[tuple[str, float, float, str]], right: float) -> None:
    """Named points; the label of the highest is above it and those of the others below, so that they keep apart."""
    for i, (name, at_x, at_y, tip) in enumerate(sorted(marks, key=lambda mark: mark[2])):
        figure.dot(at_x, at_y, 5, "red" if name == "best" else "ring", tip=tip)
        fits = at_x + CHARACTER * len(tip) < right
        label_y = at_y - 10 if i == 0 else at_y + 20
        figure.text(at_x - 4 if fits else at_x + 4, label_y, tip, "strong halo", anchor="start" if fits else "end")


def near(points: Sequence[tuple[float, float]], marks: Sequence[tuple[str, float, float]]) -> list[tuple[float, float]]:
    """The points that share a picture with the marks: those far off would press all others together."""
    seconds, peak = min(mark[1] for mark in marks), min(mark[2] for mark in marks)
    return [(a, b) for a, b in points if seconds / 4 <= a <= 12 * seconds and peak / 12 <= b <= 12 * peak]


def _log_axis(values: Sequence[float], start: float, end: float) -> tuple[Callable[[float], float], list[float]]:
    """A logarithmic map from values to px, and its round ticks (1, 2, 5 per decade, fewer where they crowd)."""
    low, high = min(values) / 1.08, max(values) * 1.08
    first, last = math.log10(low), math.log10(high)

    def place(value: float) -> float:
        return start + (end - start) * (math.log10(value) - first) / max(1e-9, last - first)

    for steps in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        found = [
            factor * 10.0**power
            for power in range(math.floor(first), math.ceil(last) + 1)
            for factor in steps
            if low <= factor * 10.0**power <= high
        ]
        gap = abs(end - start) * math.log10(1.2 if len(steps) > 3 else 2) / max(1e-9, last - first)
        if gap >= (60 if end > start else 24):
            break
    return place, found

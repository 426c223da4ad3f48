"""The pipeline schedule of one step as a Gantt picture: a lane per stage, a block per pass of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.quantities import percent, span
from launcher.report.pipeline import Pass, Timeline, simulate
from launcher.report.svg import Svg, box, ticks

WIDE = 1096.0
LANES = 32
_COMPUTE = ("gemm", "attention", "memory_bound", "tp", "cp", "ep", "launch")
"""Kinds of seconds inside a pass: what the bubble is a multiple of."""


def step_timeline(plan: Mapping[str, Any], time: Mapping[str, Any]) -> Timeline:
    """Simulate the plan's schedule with the predicted seconds of a pass; of many micro-batches, only the first.

    A backward pass is taken as twice a forward pass, three times with full recomputation (arXiv 2104.04473, section 3);
    a stage with fewer blocks takes less in proportion.
    """
    pp, stages = plan["pp"], plan["stages"]
    inside = sum(time["kinds_s"].get(kind, 0.0) for kind in _COMPUTE) / plan["grad_accum"]
    share = 0.25 if plan["recompute"] == "full" else 1 / 3
    loads = [blocks / max(stages) for blocks in stages]
    return simulate(
        schedule=plan["schedule"],
        pp=pp,
        micro_batches=_drawn(plan),
        forward=[inside * share * load for load in loads],
        backward=[inside * (1 - share) * load for load in loads],
        vpp=plan["vpp"],
    )


def _drawn(plan: Mapping[str, Any]) -> int:
    """Micro-batches that show warm-up, steady state and cool-down; a multiple of p where the schedule is made of it."""
    pp, wanted = plan["pp"], plan["grad_accum"]
    rounds = 3 if plan["schedule"] == "dualpipev" else 2
    most = max(rounds * pp, 12 // pp * pp)
    return int(min(wanted, most))


def gantt(plan: Mapping[str, Any], time: Mapping[str, Any]) -> tuple[str, str]:
    """The picture, and what to read under it."""
    timeline = step_timeline(plan, time)
    lanes = _lanes(timeline.ranks)
    lane = 26.0 if len(lanes) <= 8 else 20.0 if len(lanes) <= 16 else 13.0
    left, top = 62.0, 4.0
    height = lane * len(lanes)
    figure = Svg(WIDE, top + height + 42, "pipeline schedule: passes of micro-batches per stage over time")
    scale = (WIDE - left) / timeline.makespan
    rows = {rank: top + lane * i for i, rank in enumerate(lanes) if rank is not None}
    for i, rank in enumerate(lanes):
        y = top + lane * i
        words = f"stage {rank}" if rank is not None else "..."
        figure.text(left - 8, y + lane / 2 + 4, words, "soft" if lane > 14 else "soft small", anchor="end")
        if rank is not None:
            figure.rect(left, y + 1, WIDE - left, lane - 2, "lane")
    _blocks(figure, timeline, rows, left, lane, scale)
    axis = top + height + 2
    figure.line(left, axis, WIDE, axis, "axis")
    for tick in ticks(timeline.makespan, 8):
        figure.line(left + tick * scale, axis, left + tick * scale, axis + 4, "axis")
        if left + tick * scale < WIDE - 20:
            figure.text(left + tick * scale, axis + 18, span(tick) if tick else "0", "soft", anchor="middle")
    figure.text(left + (WIDE - left) / 2, axis + 36, "time in one step", "soft", anchor="middle")
    return str(figure), _note(plan, time, timeline, lanes)


def _lanes(ranks: int) -> list[int | None]:
    """Ranks to draw, top to bottom; None stands for those left out."""
    if ranks <= LANES:
        return list(range(ranks))
    half = LANES // 2
    return [*range(half), None, *range(ranks - half + 1, ranks)]


def _blocks(figure: Svg, timeline: Timeline, rows: Mapping[int, float], left: float, lane: float, scale: float) -> None:
    """All passes, one path per colour; the number of the micro-batch where it finds room."""
    paths: dict[str, list[str]] = {}
    labels: list[tuple[float, float, str, str]] = []
    split = any(one.kind == "W" for one in timeline.passes)
    for one in timeline.passes:
        if one.rank not in rows:
            continue
        x, y, width = left + one.start * scale, rows[one.rank] + 2, (one.end - one.start) * scale
        gap = 0.7 if width > 3.5 else 0.2 * width
        css = _colour(one, split=split)
        paths.setdefault(css, []).append(box(x, y, max(0.3, width - gap), lane - 4))
        if width > 7.5 * len(str(timeline.micro_batches)) + 2 and lane > 14:
            ink = "dark" if css in ("sky", "mint") else "on"
            labels.append((x + width / 2, y + lane / 2 + 2, str(one.micro + 1), ink))
    for css in ("sky", "blue", "green", "mint"):
        figure.path(paths.get(css, []), css)
    for x, y, words, ink in labels:
        figure.text(x, y, words, f"{ink} small" if lane > 20 else f"{ink} tiny", anchor="middle")


def _colour(one: Pass, *, split: bool) -> str:
    """Forward blue, backward green, every other virtual stage lighter.

    Where the backward pass of the weights is apart (``split``), that is what lighter green means.
    """
    if one.kind == "F":
        return "blue" if one.chunk % 2 == 0 else "sky"
    lighter = one.kind == "W" if split else one.chunk % 2 == 1
    return "mint" if lighter else "green"


def legend(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(class, label) of the colours."""
    if plan["pp"] == 1 or plan["schedule"] == "1f1b" or (plan["schedule"] == "interleaved" and plan["vpp"] == 1):
        return [("blue", "forward"), ("green", "backward")]
    if plan["schedule"] == "interleaved":
        return [
            ("blue", "forward, even virtual stages"),
            ("sky", "forward, odd ones"),
            ("green", "backward, even virtual stages"),
            ("mint", "backward, odd ones"),
        ]
    return [
        ("blue", "forward, way in"),
        ("sky", "forward, way back"),
        ("green", "backward of activations"),
        ("mint", "backward of weights"),
    ]


def _note(plan: Mapping[str, Any], time: Mapping[str, Any], timeline: Timeline, lanes: list[int | None]) -> str:
    parts = []
    if timeline.micro_batches < plan["grad_accum"]:
        parts.append(f"Drawn with {timeline.micro_batches} of {plan['grad_accum']} micro-batches")
    else:
        parts.append(f"All {plan['grad_accum']} micro-batches of a replica")
    if None in lanes:
        parts[0] += f", {len(lanes) - 1} of {timeline.ranks} stages"
    if plan["pp"] > 1:
        share = time["kinds_s"].get("bubble", 0.0) / time["step_s"]
        parts.append(f"the predicted step has {percent(share)} of bubble; exchange between stages is not drawn")
    return "; ".join(parts) + "."

"""An estimate as text: memory, seconds, bottleneck, what would help, failures, finish and cost. Pure strings."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.quantities import days, digits, dollars, extent, gain, percent, span, storage
from launcher.render import count, plural, table
from strategies.saving import ENDLESS_S

VAGUE = 2.0
"""Upper over lower end of the band of a step from which on finish and cost are a range and no point: mixtures of
experts, and devices without runs to calibrate on."""

_STAGES_SHOWN = 8
_BAR = 28
_RUNGS_SHOWN = 3
_WIDE = 110
_WORTH_SAYING = 0.001  # goodput
_MEMORY_COLUMNS = (
    ("WEIGHTS", ("weights",)),
    ("GRADIENTS", ("gradients",)),
    ("OPTIMIZER", ("optimizer",)),
    ("ACTIVATIONS", ("activations",)),
    ("LOGITS", ("logits",)),
    ("GATHERED", ("gathered",)),
    ("BUFFERS", ("buffers",)),
    ("OVERHEAD", ("context", "fragmentation")),
    ("TOTAL", ("total",)),
)
TIME_WORDS = {
    "gemm": "matrix multiplication",
    "attention": "attention",
    "memory_bound": "norms, activations",
    "tp": "tensor-parallel exchange",
    "cp": "sequence exchange",
    "ep": "expert exchange",
    "launch": "kernel launches",
    "bubble": "pipeline bubble",
    "p2p": "pipeline exchange",
    "dp": "replica exchange",
    "optimizer": "optimizer",
    "offload": "host memory traffic",
}
LOST_WORDS = {
    "checkpoint": "saving checkpoints",
    "replay": "work done again",
    "detect": "noticing failures",
    "restart": "restarting",
    "wait": "waiting for nodes",
}


def estimate_text(estimate: Mapping[str, Any], today: datetime.date) -> str:
    """Everything that ``phalanx plan`` predicts.

    Args:
        estimate: The ``estimate`` of ``plan --json``.
        today: The day on which the run would start.
    """
    blocks = [memory_text(estimate), time_text(estimate), advice_text(estimate)]
    if estimate["fits"]:
        blocks.append(failures_text(estimate, today))
    if estimate["ladder"]:
        blocks.append(ladder_text(estimate["ladder"]))
    if estimate["warnings"]:
        blocks.append("\n".join(f"warning: {one}" for one in estimate["warnings"]))
    return "\n\n".join(blocks)


def forecast_line(estimate: Mapping[str, Any]) -> str:
    """The whole estimate in one line; finish and cost as ranges where the step is known roughly only."""
    time, memory, failures = estimate["time"], estimate["memory"], estimate["failures"]
    parts = [f"{storage(memory['peak_bytes'])} per rank"]
    if memory["budget_bytes"] is not None:
        parts = [f"{'fits' if estimate['fits'] else 'does NOT fit'} ({parts[0]} of {storage(memory['budget_bytes'])})"]
    parts += [f"{span(time['step_s'])} per step", f"MFU {percent(time['mfu'])}"]
    if not estimate["fits"]:
        return ", ".join(parts)
    if failures["never"]:
        parts.append("never finished")
    wide = time["high_s"] > VAGUE * time["low_s"]
    for name, words, unit in (("days", "finished in ", ""), ("cost", "", "_usd")):
        shown = days if name == "days" else dollars
        low, likely, late = (failures[f"{name}_{end}{unit}"] for end in ("low", "50", "90"))
        if likely:
            parts.append(words + (extent(low, late, shown) if wide else shown(likely)))
    return ", ".join(parts)


# ---- memory ------------------------------------------------------------------------------------------------------


def memory_text(estimate: Mapping[str, Any]) -> str:
    """The table of one rank per stage, by kind, and the verdict."""
    memory = estimate["memory"]
    rows = [_memory_row(entry) for entry in memory["stages"]]
    used = [
        i for i, (_, kinds) in enumerate(_MEMORY_COLUMNS) if any(_bytes(entry, kinds) > 0 for entry in memory["stages"])
    ]
    header = ("STAGE", "BLOCKS", *(_MEMORY_COLUMNS[i][0] for i in used))
    shown = _fewer(rows, memory["peak_stage"])
    cells = [
        (stage, blocks, *(kinds[i] for i in used)) if kinds else (stage,) + ("",) * (len(used) + 1)
        for stage, blocks, kinds in shown
    ]
    peak, budget = memory["peak_bytes"], memory["budget_bytes"]
    if budget is None:
        verdict = f"{storage(peak)}; the cluster does not say how much a device has"
    elif estimate["fits"]:
        verdict = f"{storage(peak)} of {storage(budget)}: it fits, {percent(1 - peak / budget, 0)} are free"
    else:
        verdict = f"{storage(peak)} of {storage(budget)}: it does NOT fit, {storage(peak - budget)} too much"
    return f"memory of a rank at its peak: {verdict}\n" + table(header, cells, right=range(len(header)))


def _bytes(entry: Mapping[str, Any], kinds: Sequence[str]) -> float:
    return sum(float(entry[f"{kind}_bytes"]) for kind in kinds)


def _memory_row(entry: Mapping[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    """Stage, blocks, and every kind as text."""
    values = (_bytes(entry, kinds) for _, kinds in _MEMORY_COLUMNS)
    return str(entry["stage"]), str(entry["blocks"]), tuple(storage(value) if value else "-" for value in values)


def _fewer(rows: Sequence[tuple[str, str, tuple[str, ...]]], peak: int) -> list[tuple[str, str, tuple[str, ...]]]:
    """Equal neighbours in one row; of many, the first, the last and the largest."""
    merged: list[tuple[str, str, tuple[str, ...]]] = []
    for stage, blocks, kinds in rows:
        if merged and merged[-1][1:] == (blocks, kinds):
            merged[-1] = (f"{merged[-1][0].partition('-')[0]}-{stage}", blocks, kinds)
        else:
            merged.append((stage, blocks, kinds))
    if len(merged) <= _STAGES_SHOWN:
        return merged
    keep = sorted(
        {0, 1, 2, *(i for i, row in enumerate(merged) if row[0] == str(peak)), len(merged) - 2, len(merged) - 1}
    )
    found: list[tuple[str, str, tuple[str, ...]]] = []
    for before, i in zip([-1, *keep], keep, strict=False):
        if i > before + 1:
            found.append(("...", "", ()))
        found.append(merged[i])
    return found


# ---- time --------------------------------------------------------------------------------------------------------


def time_text(estimate: Mapping[str, Any]) -> str:
    """Seconds by kind with their shares, and the bottleneck."""
    time = estimate["time"]
    step = time["step_s"]
    head = f"one step: {span(step)} (90 %: {span(time['low_s'])} to {span(time['high_s'])}), MFU {percent(time['mfu'])}"
    head += f" (HFU {percent(time['hfu'])})" if time["hfu"] > time["mfu"] * 1.001 else ""
    head += f", {count(time['tokens_per_s'])} tokens/s"
    kinds = {kind: value for kind, value in time["kinds_s"].items() if value > 0}
    longest = max(kinds.values(), default=1.0)
    rows = [
        (
            f"  {TIME_WORDS.get(kind, kind)}",
            span(value),
            percent(value / step),
            "#" * max(1, round(_BAR * value / longest)),
        )
        for kind, value in kinds.items()
    ]
    lines = table(("", "", "", ""), rows, right=(1, 2)).splitlines()[1:]
    sentence = f"bottleneck: {estimate['bottleneck']['sentence']}"
    return "\n".join([head, *lines, textwrap.fill(sentence, _WIDE, subsequent_indent=" " * 12)])


# ---- advice ------------------------------------------------------------------------------------------------------


def advice_text(estimate: Mapping[str, Any]) -> str:
    """The changes of the plan that help most, and apart from them those of the machine."""
    advice, fits = estimate["advice"], estimate["fits"]
    rows = []
    for one in advice["plan"]:
        worth = gain(one["gain"]) if fits else span(one["step_s"])
        note = "" if one["runnable"] or not estimate["runnable"] else " (modelled only)"
        rows.append(("  plan", worth, one["change"] + note, storage(one["peak_bytes"]), one["overrides"]))
    rows += [
        ("  machine", gain(one["gain"]), one["change"], storage(one["peak_bytes"]), "")
        for one in advice["hardware"]
        if fits
    ]
    head = "what would help most (tokens per second that survive failures; each change by itself):"
    if not fits:
        head = "neighbours of this plan that fit (seconds per step, memory of a rank):"
        if not rows:
            return "no neighbour of this plan fits; strategy=auto searches all plans"
    elif not rows:
        return "what would help most: no single change of plan or machine gains half a percent"
    if fits and not advice["plan"]:
        rows.insert(0, ("  plan", "", "no single change that is legal and fits gains half a percent", "", ""))
    return "\n".join([head, *table(("",) * 5, rows, right=(1,)).splitlines()[1:]])


# ---- failures ----------------------------------------------------------------------------------------------------


def failures_text(estimate: Mapping[str, Any], today: datetime.date) -> str:
    """Failures, checkpoints, goodput, the end of the run, and what other restart times would make of it."""
    failures = estimate["failures"]
    rows = [("failures", _rate(failures)), *_checkpoints(failures)]
    if failures["spares"] or failures["spares_wanted"]:
        rows.append(("spares", _spares(failures)))
    if failures["mtbf_s"]:
        lost = sorted(((kind, share) for kind, share in failures["lost"].items() if share > 0), key=lambda one: -one[1])
        words = ", ".join(f"{LOST_WORDS.get(kind, kind)} {percent(share)}" for kind, share in lost)
        rows.append(("goodput", percent(failures["goodput"])))
        rows.append(("", f"lost: {words}"))
        sweep = ", ".join(f"{one['restart_s']:g} s {percent(one['goodput'])}" for one in failures["sweep"])
        rows.append(("", f"with restarts of {sweep}"))
    rows.append(("finish", _finish(failures, today)))
    if failures["cost_50_usd"]:
        low, late = failures["cost_low_usd"], failures["cost_90_usd"]
        rows.append(
            ("cost", f"{dollars(failures['cost_50_usd'])}; 10 %: below {dollars(low)}; 90 %: below {dollars(late)}")
        )
    return "\n".join(
        textwrap.fill(f"{name + ':' if name else '':<12}{text}", _WIDE, subsequent_indent=" " * 12)
        for name, text in rows
    )


def _rate(failures: Mapping[str, Any]) -> str:
    if not failures["mtbf_s"]:
        return "none expected (cluster.hardware.failures_per_node_day)"
    text = f"one every {span(failures['mtbf_s'])} on {plural(failures['nodes'], 'node')}"
    expected = failures["failures_expected"]
    return text + (f", {digits(expected)} over the run" if expected else "")


def _checkpoints(failures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Size, and how often to which tier."""
    size = storage(failures["checkpoint_bytes"])
    if not failures["mtbf_s"]:
        return [("checkpoint", f"{size}; where nothing fails, one at the end is enough")]
    text = f"{size}; to disk every {span(failures['disk_interval_s'])}"
    text += f" ({plural(failures['disk_interval_steps'], 'step')}), which stalls {span(failures['save_disk_s'])}"
    if failures["disk_interval_s"] >= ENDLESS_S:
        text = f"{size}; to disk after the last step only (checkpoint.every=0)"
    better = _better(failures)
    if not failures["memory_tier"]:
        return [("checkpoint", text), *better]
    memory = f"to a peer's memory every {span(failures['memory_interval_s'])}"
    memory += f" ({plural(failures['memory_interval_steps'], 'step')}), which stalls {span(failures['save_memory_s'])}"
    return [("checkpoint", text), ("", memory), *better]


def _better(failures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the best intervals would bring, where they bring something."""
    if failures["best_goodput"] - failures["goodput"] < _WORTH_SAYING:
        return []
    best = plural(failures["best_disk_steps"], "step")
    keys = "checkpoint.every=null" if failures["memory_tier"] else "checkpoint.every=null checkpoint.memory_every=1"
    text = f"best: to disk every {best} ({keys}), a goodput of {percent(failures['best_goodput'])}"
    return [("", text)]


def _spares(failures: Mapping[str, Any]) -> str:
    have, wanted = failures["spares"], failures["spares_wanted"]
    text = f"{plural(have, 'node')} stand{'s' if have == 1 else ''} by"
    return f"{text}; {wanted} would be enough for 99 % of the failures (cluster.spares)" if wanted > have else text


def _finish(failures: Mapping[str, Any], today: datetime.date) -> str:
    if failures["never"]:
        return f"never: {failures['never']}"
    if failures["days_50"] is None:
        return "unknown: train.tokens says how many tokens the run has"
    low, likely, late = failures["days_low"], failures["days_50"], failures["days_90"]
    if likely < 1:
        return f"after {days(likely)}; 10 %: within {days(low)}; 90 %: within {days(late)}"
    ends = [f"{_date(today, end)} ({days(end)})" for end in (likely, low, late)]
    return f"{ends[0]}; 10 %: by {ends[1]}; 90 %: by {ends[2]}; from {today}"


def _date(today: datetime.date, after: float) -> str:
    try:
        return str(today + datetime.timedelta(days=after))
    except OverflowError:
        return "never"


def ladder_text(rungs: Sequence[Mapping[str, Any]]) -> str:
    """The next plans for fewer nodes."""
    rows = []
    for one in rungs[:_RUNGS_SHOWN]:
        lost, idle = (
            between(one["nodes_lost"], one["nodes_lost_most"]),
            between(one["idle_nodes"], one["idle_nodes_least"]),
        )
        changes = ", ".join(one["changes"]) if one["plan"] else "-"
        moved = f"{storage(one['moved_bytes'])}, {span(one['move_s'])}" if one["moved_bytes"] else "-"
        rows.append((lost, changes, percent(one["throughput"]), idle, moved, one["advice"]))
    header = ("LOST", "NEXT PLAN", "SPEED", "IDLE", "MOVES", "WAIT OR SHRINK")
    return "nodes lost for good, and the plan that goes on without them:\n" + table(header, rows, right=(2,))


def between(first: int, last: int) -> str:
    """``7``, or ``7-4`` for a range."""
    return f"{first}" if first == last else f"{first}-{last}"


# ---- arithmetic --------------------------------------------------------------------------------------------------


def arithmetic_text(arithmetic: Mapping[str, Any]) -> str:
    """How every number came about."""
    titles = {
        "time": "seconds of one step",
        "memory": f"bytes of a rank of stage {arithmetic['memory_stage']}, the one that needs most",
        "failures": "failures and checkpoints",
    }
    blocks = []
    for part, title in titles.items():
        lines = [f"{title}:"]
        for term in arithmetic[part]:
            lines.append(f"  {term['kind']} = {_value(term['value'], term['unit'])}")
            lines += [f"      {words}" for words in (term["formula"], term["numbers"]) if words]
        if arithmetic[part]:
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _value(value: float, unit: str) -> str:
    if unit == "s":
        return span(value)
    return storage(value) if unit == "bytes" else f"{digits(value)} {unit}".rstrip()

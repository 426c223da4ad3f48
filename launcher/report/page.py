"""The report as one HTML page: sections, words and tables around the figures. Everything is inline and escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from launcher.quantities import days, dollars, extent, gain, percent, span, storage
from launcher.render import count, plural
from launcher.render_estimate import between
from launcher.report import charts, gantt
from launcher.report.placement import placement
from launcher.report.style import CSS
from launcher.verdict import BEST_AT, best_text, contenders_text, tight, tight_text
from strategies.plan import ParallelPlan
from strategies.saving import ENDLESS_S
from strategies.specs import ClusterSpec

_RUNGS_SHOWN = 6


def page(document: Mapping[str, Any], plan: ParallelPlan, cluster: ClusterSpec) -> str:
    """The whole page.

    Args:
        document: What ``plan --json`` prints, with an ``estimate``.
        plan: The plan of the document.
        cluster: The machine of the document.
    """
    estimate = document["estimate"]
    sections = [
        _time(estimate),
        _memory(estimate),
        _schedule(document, estimate),
        _placement(plan, cluster),
        *((_finish(estimate), _failures(estimate)) if estimate["fits"] else ()),
        _ladder(estimate),
        _advice(estimate),
        _search(document, estimate),
    ]
    title = f"{document['model']['name']} on {_machine(cluster)}"
    body = "".join(sections)
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n"
        f'<body><main>{_head(document, estimate, title)}<div class="grid">{body}</div>{_foot(document, estimate)}'
        "</main></body></html>\n"
    )


def _machine(cluster: ClusterSpec) -> str:
    device = f" {cluster.device}" if cluster.device.lower() not in ("", "cpu") else " slots"
    return f"{cluster.nodes:,} x {cluster.slots_per_node}{device}"


def _section(title: str, lead: str, *parts: str, wide: bool = False, name: str) -> str:
    """A titled part of the page; ``parts`` are HTML, title and lead are words."""
    lead = f'<p class="note">{escape(lead)}</p>' if lead else ""
    css = ' class="wide"' if wide else ""
    return f'<section id="{name}"{css}><h2>{escape(title)}</h2>{lead}{"".join(parts)}</section>\n'


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    swatch = '<svg viewBox="0 0 10 10" aria-hidden="true"><rect width="10" height="10" class="{}"/></svg>'
    items = "".join(f"<li>{swatch.format(escape(css))}{escape(label)}</li>" for css, label in entries)
    return f'<ul class="legend">{items}</ul>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table of words; those columns are aligned right."""

    def row(cells: Sequence[str], tag: str) -> str:
        css = [' class="right"' if i in right else "" for i in range(len(cells))]
        return "".join(f"<{tag}{css[i]}>{_words(cell)}</{tag}>" for i, cell in enumerate(cells))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{row(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _words(cell: str) -> str:
    return escape(cell.replace("->", "\N{RIGHTWARDS ARROW}"))


# ---- head and foot -----------------------------------------------------------------------------------------------


def _head(document: Mapping[str, Any], estimate: Mapping[str, Any], title: str) -> str:
    batch, plan = document["batch"], estimate["plan_text"]
    tokens = count(batch["global_batch"] * batch["seq"])
    sub = f"{plan}, {document['precision']}. {count(document['parameters'])} parameters; "
    sub += f"{batch['global_batch']:,} sequences of {batch['seq']:,} tokens = {tokens} tokens per step."
    figures = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span><span>{escape(note)}</span></div>"
        for name, value, note in _key_figures(estimate)
    )
    return (
        f'<header><h1>{escape(title)}</h1><p class="sub">{escape(sub)}</p>'
        f'{_verdict(estimate)}</header><div class="figures">{figures}</div>'
    )


def _verdict(estimate: Mapping[str, Any]) -> str:
    css, words = "", "It fits, and phalanx can run it."
    if estimate["memory"]["budget_bytes"] is None:
        words = "Phalanx can run it, if it fits: the cluster does not say how much memory a device has."
    if not estimate["fits"]:
        css, words = " bad", "It does not fit into the memory of the devices."
    elif not estimate["runnable"]:
        fits = tight_text(estimate) if tight(estimate) else "fits"
        css, words = " half", f"It {fits}. phalanx can model it, but not run it: {estimate['modelled_reason']}."
    elif tight(estimate):
        css, words = " half", f"It {tight_text(estimate)}, and phalanx can run it."
    lines = [words, estimate["bottleneck"]["sentence"]]
    if beaten := best_text(estimate):
        lines.append(f"{beaten[0].upper()}{beaten[1:]}.")
    return f'<div class="verdict{css}">{"".join(f"<p>{escape(one)}</p>" for one in lines)}</div>'


def _key_figures(estimate: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, note): what goes on a slide."""
    time, memory, failures = estimate["time"], estimate["memory"], estimate["failures"]
    budget = memory["budget_bytes"]
    found = [
        ("seconds per step", span(time["step_s"]), f"90 %: {span(time['low_s'])} to {span(time['high_s'])}"),
        ("model FLOPs utilisation", percent(time["mfu"]), f"{count(time['tokens_per_s'])} tokens/s"),
        ("memory of a rank", storage(memory["peak_bytes"]), f"of {storage(budget)}" if budget else "budget unknown"),
    ]
    if not estimate["fits"]:
        return found
    found.append(("goodput with failures", percent(failures["goodput"]), _failure_rate(failures)))
    if failures["days_50"] is not None:
        note = f"80 %: {extent(failures['days_low'], failures['days_90'], days)}"
        found.append(("until it is finished", days(failures["days_50"]), note))
    elif failures["never"]:
        found.append(("until it is finished", "never", f"{percent(failures['goodput'])} of the time counts"))
    if failures["cost_50_usd"]:
        note = f"80 %: {extent(failures['cost_low_usd'], failures['cost_90_usd'], dollars)}"
        found.append(("cost", dollars(failures["cost_50_usd"]), note))
    return found


def _failure_rate(failures: Mapping[str, Any]) -> str:
    if not failures["mtbf_s"]:
        return "no failures expected"
    return f"a failure every {span(failures['mtbf_s'])}"


def _foot(document: Mapping[str, Any], estimate: Mapping[str, Any]) -> str:
    warnings = "".join(f"<li>{escape(one)}</li>" for one in estimate["warnings"])
    listed = f'<section class="wide" id="warnings"><h2>With care</h2><ul class="plain">{warnings}</ul></section>'
    basis = f"Predicted by phalanx {escape(document.get('version', ''))}".rstrip()
    basis += f", calibrated for {escape(estimate['framework'])} on {escape(str(document['cluster']['device']))}. "
    basis += "Bands hold nine of ten measured runs that the calibration has not seen. Bytes in powers of ten."
    return f"{listed if warnings else ''}<footer>{basis}</footer>"


# ---- sections ----------------------------------------------------------------------------------------------------


def _time(estimate: Mapping[str, Any]) -> str:
    lead = "Seconds of one step on the critical path, by kind; the slowest stage rules."
    return _section("Where a step goes", lead, _figure(charts.time_bars(estimate["time"])), name="time")


def _memory(estimate: Mapping[str, Any]) -> str:
    memory = estimate["memory"]
    lead = "One rank of every pipeline stage at its peak."
    return _section(
        "Memory per stage",
        lead,
        _figure(charts.memory_columns(memory)),
        _legend(charts.memory_kinds(memory)),
        name="memory",
    )


def _schedule(document: Mapping[str, Any], estimate: Mapping[str, Any]) -> str:
    plan = document["plan"]
    picture, note = gantt.gantt(plan, estimate["time"])
    names = {"1f1b": "1F1B", "interleaved": f"interleaved 1F1B, {plan['vpp']} virtual stages", "dualpipev": "DualPipeV"}
    title = f"Pipeline schedule: {names[plan['schedule']]}" if plan["pp"] > 1 else "Schedule: one stage, no pipeline"
    return _section(title, note, _figure(picture), _legend(gantt.legend(plan)), wide=True, name="schedule")


def _placement(plan: ParallelPlan, cluster: ClusterSpec) -> str:
    picture, note = placement(plan, cluster)
    return _section("Ranks on nodes", note, _figure(picture), wide=True, name="placement")


def _finish(estimate: Mapping[str, Any]) -> str:
    failures, priced = estimate["failures"], bool(estimate["failures"]["cost_50_usd"])
    if failures["never"]:
        return _section("Finish and cost", f"It never ends: {failures['never']}.", _lost(failures), name="finish")
    if failures["days_50"] is None:
        lead = "The configuration gives no number of tokens (train.tokens), so there is no end to predict."
        return _section("Finish and cost", lead, _lost(failures), name="finish")
    lead = f"{count(estimate['tokens'])} tokens with the failures that will happen."
    lead += f" Without any, {days(failures['days_fault_free'])}. Ranges hold the error of the predicted step, too."
    paid = " The nodes of the plan and those that stand by are paid for, all the time."
    lead += paid if priced else " The cluster gives no price."
    ranges = _figure(charts.finish_ranges(failures))
    return _section("Finish and cost", lead, ranges, _lost(failures), name="finish")


def _lost(failures: Mapping[str, Any]) -> str:
    return _figure(charts.lost_bar(failures)) if failures["mtbf_s"] else ""


def _failures(estimate: Mapping[str, Any]) -> str:
    failures = estimate["failures"]
    if not failures["mtbf_s"]:
        lead = "No failures expected: the cluster gives no rate (cluster.hardware.failures_per_node_day)."
        return _section("Failures and restarts", lead, name="failures")
    disk_s = failures["disk_interval_s"]
    often = "after the last step only" if disk_s >= ENDLESS_S else f"every {span(disk_s)}"
    lead = f"{_failure_rate(failures).capitalize()}. A save to disk {often}"
    if failures["memory_tier"]:
        lead += f", to the memory of a peer every {span(failures['memory_interval_s'])}"
    have, wanted = failures["spares"], failures["spares_wanted"]
    lead += f". {plural(have, 'spare node')}; {wanted} would be enough for 99 % of the failures." if wanted else "."
    return _section("Failures and restarts", lead, _figure(charts.sweep_curve(failures)), name="failures")


def _ladder(estimate: Mapping[str, Any]) -> str:
    rungs = estimate["ladder"]
    title = "When nodes are lost for good"
    if not rungs:
        lead = "No plan fits fewer nodes: the run waits for them."
        lead = lead if estimate["fits"] else "The plan does not fit, so there is nothing to go on from."
        return _section(title, lead, wide=True, name="ladder")
    rows = [
        (
            between(one["nodes_lost"], one["nodes_lost_most"]),
            ", ".join(one["changes"]) or "no plan fits",
            percent(one["throughput"]),
            between(one["idle_nodes"], one["idle_nodes_least"]),
            f"{storage(one['moved_bytes'])} in {span(one['move_s'])}" if one["moved_bytes"] else "-",
            one["advice"],
        )
        for one in rungs[:_RUNGS_SHOWN]
    ]
    header = ("nodes lost", "next plan", "speed", "idle", "what moves", "wait or shrink")
    lead = "The next legal plan for fewer nodes; healthy nodes of a broken replica stand by as spares."
    picture = _figure(charts.ladder_bars(rungs[:_RUNGS_SHOWN]))
    return _section(title, lead, picture, _table(header, rows, right=(2, 3)), wide=True, name="ladder")


def _advice(estimate: Mapping[str, Any]) -> str:
    advice, parts = estimate["advice"], []
    base = "gain" if estimate["fits"] else "step"
    for title, kind in (("of the plan", "plan"), ("of the machine", "hardware"))[: 2 if estimate["fits"] else 1]:
        rows = [
            (one["change"], gain(one["gain"]) if base == "gain" else span(one["step_s"]), storage(one["peak_bytes"]))
            for one in advice[kind]
        ]
        header = (f"changes {title}", base, "memory")
        none = "<p>Nothing that is legal and fits would gain half a percent.</p>"
        parts.append(f"<div>{_table(header, rows, right=(1, 2)) if rows else none}</div>")
    lead = "Tokens per second that survive failures, against this plan; each change by itself."
    if not estimate["fits"]:
        lead = "Neighbours of this plan that fit."
    return _section("What would help most", lead, f'<div class="grid">{"".join(parts)}</div>', wide=True, name="advice")


def _best_words(search: Mapping[str, Any]) -> str:
    best, runs = search["best"], search["best_runnable"]
    if best is None:
        return "none"
    if best["runnable"]:
        return str(best["plan_text"])
    other = f"; of those that phalanx runs: {runs['plan_text']}" if runs else ""
    return f"{best['plan_text']} (modelled only)" + other


def _search(document: Mapping[str, Any], estimate: Mapping[str, Any]) -> str:
    search = estimate["search"]
    if not search or not search["points"]:
        return _section("The search", "No search has been made.", wide=True, name="search")
    time, memory = estimate["time"], estimate["memory"]
    marks = [("this plan", time["step_s"], memory["peak_bytes"])]
    best = search["best"]
    if best and best["plan"] != document["plan"]:
        name = "best" if best["runnable"] else "best, modelled only"
        marks.append((name, best["step_s"], best["peak_bytes"]))
    else:
        marks = [("best", time["step_s"], memory["peak_bytes"])]
    lead = f"{search['space']:,} plans ({contenders_text(search)}); {search['evaluated']:,} evaluated, "
    lead += f"{search['pruned']:,} ruled out by bounds, {search['rejected']:,} rejected. "
    lead += f"Best by {BEST_AT[search['objective']]}: {_best_words(search)}."
    points = charts.near(search["points"], marks)
    picture = charts.search_scatter(points, budget=memory["budget_bytes"], marks=marks)
    shown = f"Dots: {len(search['points']):,} legal plans drawn at random, each with as many replicas as the machine "
    shown += f"carries; {len(points):,} of them are near enough to be in the picture. Grey ones do not fit."
    return _section(
        "The search", lead, _figure(picture), f'<p class="note">{escape(shown)}</p>', wide=True, name="search"
    )

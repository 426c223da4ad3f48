"""Texts for people, as pure strings: no files, no clock, no colours. The same words everywhere for the same thing."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from launcher import clocks, skips, stopping
from launcher.account import CLASSES
from launcher.resume_diff import Change
from strategies.codec import from_json
from strategies.errors import ConfigError
from strategies.plan import ParallelPlan

_LONG_ID = re.compile(r"\b[0-9a-f]{24,}\b")

MEANING = {
    "start": "getting the first ranks to their first step",
    "productive": "optimizer steps that count",
    "checkpoint_stall": "waiting for checkpoints",
    "detect": "failure until known",
    "decide": "clearing the old ranks away",
    "place": "decision until new ranks exist",
    "restore": "new ranks until their first step",
    "replay": "lost steps done again",
    "wait": "waiting for nodes, backing off, or down",
    "finish": "last step until the recorded end",
}


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """Columns as wide as their longest cell, two spaces apart.

    Args:
        header: Titles.
        rows: Cells; None becomes "-".
        right: Indices of columns to align right.
    """
    cells = [list(header), *([("-" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [c.rjust(widths[i]) if i in right else c.ljust(widths[i]) for i, c in enumerate(row)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def indent(text: str, by: str = "  ") -> str:
    """Every line moved to the right."""
    return "\n".join(f"{by}{line}".rstrip() for line in text.splitlines())


def size(number: float) -> str:
    """Bytes for people: ``12.3 MB`` (powers of ten)."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:.0f} B"


def count(number: float) -> str:
    """A large count for people: ``1.3 M``."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:.0f}"


def seconds(number: float) -> str:
    """A duration for people: ``4.2 s``, ``3 m 05 s``, ``2 h 10 m``."""
    if number < 60:
        return f"{number:.1f} s"
    minutes, rest = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes} m {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} m"


def moment(utc: float | None) -> str:
    """A point in time, UTC."""
    if not utc:
        return "-"
    return datetime.datetime.fromtimestamp(utc, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def plural(number: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def node_name(node: str) -> str:
    """A node's identity, shortened where it is a long random one."""
    return node if len(node) <= 20 else node[:10]


def shorten_ids(text: str) -> str:
    """Long hexadecimal identities in a sentence, cut to what tells them apart."""
    return _LONG_ID.sub(lambda match: match.group()[:10], text)


def plan_words(plan: Mapping[str, Any]) -> str:
    """A plan that was stored as JSON, in one line."""
    try:
        return from_json(ParallelPlan, dict(plan)).describe()
    except ConfigError:
        return "a plan of another version"


# ---- runs -------------------------------------------------------------------------------------------------------


def runs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of all runs, newest last."""
    header = ("RUN", "STATE", "STEP", "ATTEMPTS", "LOST", "LOSS", "SUBMITTED (UTC)", "PLAN")
    cells: list[tuple[object, ...]] = []
    for row in rows:
        state = str(row["state"]) + (" (orphaned)" if row.get("orphaned") else "")
        if row["state"] == "damaged":
            cells.append((row["run"], state, None, None, None, None, None, row.get("reason")))
            continue
        loss = None if row["loss"] is None else f"{row['loss']:.4f}"
        step = f"{row['step']}/{row['steps']}" if row["steps"] else None
        cells.append(
            (
                row["run"],
                state,
                step,
                row["attempts"],
                row["steps_lost"],
                loss,
                moment(row["submitted"]),
                row["plan"],
            )
        )
    return table(header, cells, right=(2, 3, 4, 5))


def run_text(run: Mapping[str, Any]) -> str:
    """One run in full, from its status document."""
    state = run["state"] + (" (orphaned: no controller is alive; phalanx resume goes on)" if run["orphaned"] else "")
    head = [("run", run["run"]), ("state", state)]
    if run["reason"]:
        head.append(("reason", run["reason"]))
    if run["steps"]:
        head.append(("step", f"{run['step']} of {run['steps']}"))
    if run["loss"]:
        head.append(("loss", f"{run['loss']['first']:.4f} -> {run['loss']['last']:.4f}"))
    head.append(("submitted", f"{moment(run['submitted'])} UTC"))
    if run["checkpoint"]:
        head.append(("checkpoint", f"step {run['checkpoint']['step']}: {run['checkpoint']['path']}"))
    if unsaved := run["unsaved"]:
        since, times = moment(unsaved["since"]), plural(unsaved["times"], "time")
        head.append(("not saved", f"since {since} UTC, {times}, last at step {unsaved['step']}: {unsaved['reason']}"))
    head.append(("steps lost", str(run["steps_lost"])))
    head += skips.head(run["skips"])
    if run["weights_digest"]:
        head.append(("weights", str(run["weights_digest"])))
    head.append(("directory", run["dir"]))
    blocks = ["\n".join(f"{name + ':':<12}{value}" for name, value in head)]
    if run["attempts"]:
        blocks.append(attempts_table(run["attempts"], script=run["kind"] == "script"))
    if run["ranks"]:
        blocks.append(ranks_table(run["ranks"]))
    blocks += _cost(run)
    return "\n\n".join(blocks)


def _doubtful(run: Mapping[str, Any]) -> list[str]:
    """Nodes and ranks that are not what they should be."""
    blocks = []
    if run["clocks"]:
        off = {f"  node {node_name(o['node'])}: {clocks.words(o['ahead_s'], o['within_s'])}" for o in run["clocks"]}
        blocks.append("clocks that disagree:\n" + "\n".join(sorted(off)))
    if run["dying"]:
        left = (f"  node {node_name(o['node'])}: {stopping.words(o['left'])}" for o in run["dying"])
        blocks.append("killed, not dead, and waited for:\n" + "\n".join(left))
    if run["excluded"]:
        rows = (f"  node {node_name(o['node'])} until {moment(o['until'])} UTC: {o['reason']}" for o in run["excluded"])
        blocks.append("carry no ranks for now:\n" + "\n".join(rows))
    if run["stragglers"]:
        found = dict.fromkeys(f"  {shorten_ids(str(one['failure']['detail']))}" for one in run["stragglers"])
        blocks.append("found slow:\n" + "\n".join(found))
    return blocks


def _cost(run: Mapping[str, Any]) -> list[str]:
    """What went wrong, and where the time went."""
    from launcher.render_incidents import errors_text, forecast_table, incidents_table

    blocks = []
    failed = next((one for one in reversed(run["attempts"]) if one["errors"]), None)
    if failed is not None:
        blocks.append(errors_text(failed["number"], failed["errors"]))
    if run["slow_starts"]:
        lines = {f"  node {node_name(str(one.get('node')))}: {one.get('reason')}" for one in run["slow_starts"]}
        blocks.append("ranks that started afresh, not from the warm pool:\n" + "\n".join(sorted(lines)))
    blocks += _doubtful(run)
    if run["incidents"]:
        blocks.append(incidents_table(run["incidents"], live=not run["ended"]))
    if run["ledger"].get("wall"):
        blocks.append(ledger_table(run["ledger"], run["data"]["share"], run["stalls"]["memory_s"], run["copies_every"]))
        if run["step"]:
            blocks.append(forecast_table(run["predicted"], run["measured"]))
    return blocks


def attempts_table(attempts: Sequence[Mapping[str, Any]], *, script: bool = False) -> str:
    """Every attempt: where, how long, and why it ended."""
    rows = []
    for one in attempts:
        lasted = seconds(one["ended"] - one["started"]) if one["ended"] else "running"
        names = [node_name(str(node)) for node in one["nodes"]]
        nodes = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        plan = "a script" if script else plan_words(one["plan"])
        rows.append((one["number"], one["first_step"], lasted, nodes, plan, shorten_ids(one["cause"] or "-")))
    return table(("ATTEMPT", "FROM STEP", "LASTED", "NODES", "PLAN", "ENDED BECAUSE"), rows, right=(0, 1, 2))


def ranks_table(ranks: Sequence[Mapping[str, Any]]) -> str:
    """The live ranks and where they are."""
    rows = []
    for one in ranks:
        at = one.get("coordinates") or {}
        where = f"({at.get('pipe')},{at.get('data')},{at.get('model')})"
        rows.append((one["rank"], node_name(str(one["node"])), one["pid"], where))
    return table(("RANK", "NODE", "PID", "(PIPE,DATA,MODEL)"), rows, right=(0, 2))


def ledger_table(
    books: Mapping[str, float], data_share: float = 0.0, memory_s: float = 0.0, copies_every: int | None = None
) -> str:
    """Where the seconds went; classes without a second are left out.

    Args:
        books: Seconds by class.
        data_share: Share of the productive ones in which ranks waited for samples; 0 where nobody measured it.
        memory_s: Of the stalls, seconds that copies in memory have cost.
        copies_every: Steps between two of those as of late; None where nobody has told.
    """
    wall = books["wall"] or 1.0
    reading = f"; {100 * data_share:.2f} % of it waiting for samples" if data_share else ""
    copying = f"; {memory_s:.1f} s of it for copies in memory" if memory_s >= 0.05 else ""
    if copies_every and copies_every > 1:
        copying += f"; copies in memory every {copies_every} steps"
    added = {"productive": reading, "checkpoint_stall": copying}
    meaning = {name: text + added.get(name, "") for name, text in MEANING.items()}
    rows = [
        (name, f"{books[name]:.1f}", f"{100 * books[name] / wall:.1f} %", meaning[name])
        for name in CLASSES
        if books.get(name, 0.0) >= 0.05
    ]
    goodput = f"goodput {100 * books['productive'] / wall:.1f} %"
    rows.append(("wall", f"{books['wall']:.1f}", "100.0 %", goodput))
    return table(("WHERE", "SECONDS", "SHARE", ""), rows, right=(1, 2))


def summary(run: Mapping[str, Any], *, folder: str) -> str:
    """What a person sees at the end of a followed run.

    Args:
        run: Its status document.
        folder: Parent folder, as the person would type it ("" for the default).
    """
    blocks = [run_text(run)]
    if run["recoveries"]:
        each = ", ".join(seconds(one) for one in run["recoveries"])
        blocks.append(f"time to recover (failure until the ranks trained again): {each}")
    if run["sample"]:
        title = {"evaluate": "found", "generate": "generated text"}.get(run["kind"], "sample of generated text")
        blocks.append(f"{title}:\n" + indent(run["sample"].rstrip(), "  | "))
    blocks.append("look further:\n" + indent(commands(run, folder)))
    return "\n\n".join(blocks)


def commands(run: Mapping[str, Any], folder: str) -> str:
    """Commands that tell more about a run."""
    where = f" --dir {folder}" if folder else ""
    name = run["run"]
    lines = [f"phalanx status {name}{where}", f"phalanx logs {name}{where} --rank 0"]
    if run["state"] in ("failed", "cancelled") or run["orphaned"]:
        lines.append(f"phalanx resume {name}{where}")
    elif run["state"] != "succeeded":
        lines += [f"phalanx logs {name}{where} -f", f"phalanx cancel {name}{where}"]
    lines.append(f"less {run['dir']}/events.jsonl")
    return "\n".join(lines)


# ---- resume -----------------------------------------------------------------------------------------------------


def resume_text(
    *,
    name: str,
    state: str,
    attempt: int,
    step: int,
    steps: int | None,
    sample: int | None,
    source: str,
    plan: str,
    nodes: str,
    changes: Sequence[Change],
    live: int | None = None,
) -> str:
    """What a resume will do, as a difference from the last attempt.

    Args:
        name: The run.
        state: Its state, for people.
        attempt: Number of the next attempt.
        step: Step of the checkpoint it starts from; 0 for the beginning.
        steps: Steps of the whole run; None when unknown.
        sample: Index of the next sample; None when unknown.
        source: The checkpoint, "" for none.
        plan: The plan, "before -> after" where it changes.
        nodes: The nodes, likewise.
        changes: Every changed field.
        live: Last step of a gang that may still run (the last attempt has no recorded end); None for none.
    """
    position = f"step {step + 1}" + (f" of {steps}" if steps else "")
    rows = [
        ("resume", f"{name} ({state}), as attempt {attempt}"),
        ("from", f"{position}, " + (f"checkpoint {source}" if source else "the very beginning: no checkpoint yet")),
    ]
    if sample is not None:
        rows.append(("data", f"next sample {sample:,}"))
    rows += [("plan", plan), ("nodes", nodes)]
    text = "\n".join(f"{key + ':':<9}{value}" for key, value in rows)
    if not changes:
        adopted = " Ranks that still live are taken over as they are, with no step lost." if live is not None else ""
        return text + "\n\nNothing else changes: the run goes on as it would have." + adopted
    cells = [(one.field, brief_value(one.before), brief_value(one.after), one.verdict, one.reason) for one in changes]
    text += "\n\n" + table(("FIELD", "BEFORE", "AFTER", "", "BECAUSE"), cells)
    if live is None:
        return text
    lost = f"the {plural(live - step, 'step')} since the last checkpoint are lost" if live > step else "no step is lost"
    return text + (
        f"\n\nRanks that still live (at step {live}) will be ended for these changes: {lost}. "
        "Without any change they would be taken over as they are."
    )


def brief_value(value: Any) -> str:
    """A value in a table cell; long ones are cut in the middle."""
    text = f"{value:.10g}" if isinstance(value, float) else "-" if value is None or value == "" else str(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"

"""Tables of published runs, read into workloads and plans.

A cell that cannot be read is a problem, and all problems of a file are raised at once. A row that reads well but that
the planner has no model for is *skipped*, with the reason. What a row leaves open is filled with one documented choice
and noted in :attr:`Row.assumed`; facts that its notes state in prose (:mod:`launcher.calibration.facts`) come first.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from launcher.calibration.assemble import Unmodelled, assemble, network
from launcher.calibration.cells import Cells
from launcher.typed import Problem
from strategies.errors import ConfigError, did_you_mean
from strategies.plan import ParallelPlan
from strategies.workload import Workload

FITTED_ROWS = Path(__file__).with_name("published_runs.csv")
"""The runs that the constants were fitted to."""

REQUIRED = (
    *("id", "source", "model", "layers", "hidden", "ffn", "gated_mlp", "heads", "kv_heads", "vocab", "seq"),
    *("moe_experts", "moe_topk", "moe_ffn", "gpu", "gpus", "gpus_per_node", "tp", "pp", "dp", "ep", "cp", "vpp"),
    *("micro_batch", "global_batch", "recompute", "seq_parallel", "zero_stage", "precision", "flash_attn"),
    *("outcome", "step_time_s", "peak_mem_gb", "notes"),
)
"""Columns that a table must have; ``tok_s_gpu`` and ``nic_gbps_per_gpu`` are read where they exist, others ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One published run.

    Attributes:
        id: Name of the row.
        line: Its line in the file.
        family: Short name of the table that it comes from: repository and file.
        sweep: What it shares with the runs that differ from it in the plan only.
        work: The model, the batch and the machine.
        plan: How the model was spread.
        outcome: It ran, or it ran out of memory.
        step_s: Measured seconds per step.
        peak_bytes: Measured memory of the fullest rank.
        allocated: The memory is what tensors took, not what the process held.
        network_stated: The row says how fast its network is.
        recompute_stated: The row says what is recomputed; without that, its memory is known as a range only.
        assumed: What the row left open, and how it was filled.
        notes: Prose of the table.
    """

    id: str
    line: int
    family: str
    sweep: str
    work: Workload
    plan: ParallelPlan
    outcome: Literal["ok", "oom"]
    step_s: float | None
    peak_bytes: float | None
    allocated: bool
    network_stated: bool
    recompute_stated: bool
    assumed: tuple[str, ...]
    notes: str

    @property
    def dense(self) -> bool:
        """The model has no experts."""
        return self.work.model.moe is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A row that the planner has no model for.

    Attributes:
        id: Name of the row.
        line: Its line in the file.
        family: Short name of the table that it comes from.
        reason: What is not modelled, with the nearest thing that is.
        outcome: It ran, or it ran out of memory.
        timed: It has a measured step.
        weighed: It has a measured memory.
    """

    id: str
    line: int
    family: str
    reason: str
    outcome: Literal["ok", "oom"]
    timed: bool
    weighed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """A file of published runs.

    Attributes:
        path: Where it was read.
        rows: What can be predicted.
        skipped: What cannot.
    """

    path: str
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]


def read_rows(path: Path) -> Sheet:
    """Read a file of published runs.

    Raises:
        ConfigError: It cannot be read, misses columns, or has cells that mean nothing; all of them are listed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"The runs in {path} cannot be read.", why=str(reason), hint=_HINT) from error
    return parse_rows(text, str(path))


_HINT = "give a CSV file with one run per line; launcher/calibration/published_runs.csv shows the columns"


def parse_rows(text: str, name: str) -> Sheet:
    """Parse the text of a file called ``name``; raises as :func:`read_rows`."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    problems: list[Problem] = []
    rows: list[Row] = []
    skipped: list[Skipped] = []
    try:
        _check_header(reader.fieldnames, name)
        for raw in reader:
            one = _parse(raw, reader.line_num, problems)
            if isinstance(one, Row):
                rows.append(one)
            elif one is not None:
                skipped.append(one)
    except csv.Error as error:
        problems.append(Problem(key=f"line {reader.line_num}", message=f"not CSV: {error}"))
    problems += _repeated([*rows, *skipped])
    rows = _same_machine(rows)
    if not problems and not rows and not skipped:
        problems.append(Problem(key="line 2", message="the file has a header and no runs"))
    if problems:
        raise ConfigError(_list(name, problems), hint="mend the cells, or drop the lines")
    return Sheet(path=name, rows=tuple(rows), skipped=tuple(skipped))


def _same_machine(rows: Sequence[Row]) -> list[Row]:
    """Rows that do not state their network take that of the other runs of their repository on the same device.

    Only where all that state it agree: a repository's tables are mostly measured on one machine.
    """
    stated: dict[tuple[str, str], set[float]] = {}
    for row in rows:
        if row.network_stated:
            stated.setdefault(_machine(row), set()).add(row.work.hardware.inter_bandwidth)
    completed = []
    for row in rows:
        found = stated.get(_machine(row), set())
        if not row.network_stated and len(found) == 1:
            hardware = replace(row.work.hardware, inter_bandwidth=min(found))
            work = replace(row.work, cluster=replace(row.work.cluster, hardware=hardware))
            row = replace(row, work=work, assumed=(*row.assumed, "the network of the same repository's other runs"))
        completed.append(row)
    return completed


def _machine(row: Row) -> tuple[str, str]:
    return row.family.split("/")[0], row.work.cluster.device


def _list(name: str, problems: Sequence[Problem]) -> str:
    ending = "" if len(problems) == 1 else "s"
    lines = [f"  - {p.key}: {p.message}" + (f"; {p.hint}" if p.hint else "") for p in problems]
    return "\n".join([f"{name} has {len(problems)} problem{ending}:", *lines])


def _check_header(fields: Sequence[str] | None, name: str) -> None:
    if not fields:
        raise ConfigError(f"{name} is empty.", hint=_HINT)
    missing = [column for column in REQUIRED if column not in fields]
    if not missing:
        return
    others = [field for field in fields if field not in REQUIRED]
    lines = []
    for column in missing:
        near = did_you_mean(column, others).split(" Known:")[0] if others else ""
        lines.append(f"  - {column}" + (f": {near.replace('Did you mean', 'is it').lower()}" if "?" in near else ""))
    count = f"{len(missing)} column" + ("s" if len(missing) > 1 else "")
    raise ConfigError("\n".join([f"{name} lacks {count} in its header (line 1):", *lines]), hint=_HINT)


def _repeated(found: Sequence[Row | Skipped]) -> list[Problem]:
    first: dict[str, int] = {}
    problems = []
    for one in sorted(found, key=lambda one: one.line):
        if one.id in first:
            message = f"'{one.id}' is also on line {first[one.id]}"
            problems.append(
                Problem(key=f"line {one.line}, column id", message=message, hint="every run has its own id")
            )
        first.setdefault(one.id, one.line)
    return problems


def _parse(
    raw: Mapping[str | None, str | list[str] | None], line: int, problems: list[Problem]
) -> Row | Skipped | None:
    if None in raw or None in raw.values():
        found = len(raw) - 1 + len(raw[None] or ()) if None in raw else sum(v is not None for v in raw.values())
        named = sum(key is not None for key in raw)
        message = f"{found} cells, the header has {named}"
        problems.append(Problem(key=f"line {line}", message=message, hint="quote a cell with a comma in it"))
        return None
    cells = Cells({str(key): str(value).strip() for key, value in raw.items()}, line)
    family, notes, name = family_of(cells.text("source")), cells.text("notes"), cells.name("id")
    outcome: Literal["ok", "oom"] = "oom" if cells.choice("outcome", ("ok", "oom")) == "oom" else "ok"
    step_s, peak_bytes = cells.step_s(), cells.peak_bytes()
    try:
        run = assemble(cells)
    except Unmodelled as reason:
        run = None
        skipped = Skipped(
            id=name,
            line=line,
            family=family,
            reason=str(reason),
            outcome=outcome,
            timed=step_s is not None,
            weighed=peak_bytes is not None,
        )
    if cells.problems:
        problems += cells.problems
        return None
    if run is None:
        return skipped
    work, plan = run
    return Row(
        id=name,
        line=line,
        family=family,
        sweep=_sweep(family, work, plan),
        work=work,
        plan=plan,
        outcome=outcome,
        step_s=step_s if outcome == "ok" else None,
        peak_bytes=peak_bytes if outcome == "ok" else None,
        allocated=cells.allocated,
        network_stated=network(cells) is not None,
        recompute_stated=bool(cells.text("recompute")),
        assumed=tuple(cells.assumed),
        notes=notes,
    )


def _sweep(family: str, work: Workload, plan: ParallelPlan) -> str:
    model, batch = work.model, work.batch
    experts = f", {model.moe.experts} experts" if model.moe else ""
    shape = f"{model.layers} x {model.hidden}, {model.heads} heads{experts}"
    return (
        f"{family}: {shape}, {plan.world_size} x {work.cluster.device}, "
        f"{batch.global_batch} x {batch.seq} tokens, {work.precision}"
    )


_SOURCE = re.compile(r"(?:https?://)?(?:[\w.-]+\.(?:com|org|io)/)?(?:[\w.-]+/)?([\w.-]+?)(?:@[^:\s]+)?:(\S+)")
_PLAIN = frozenset({"readme", "index", "performance", "results", "skill", "docs"})


def family_of(source: str) -> str:
    """Short name of a table: ``owner/repo@commit:folder/file.ext and more`` becomes ``repo/file``.

    A file called README or the like says nothing, and its folder stands for it. What is no path keeps its first words.
    """
    found = _SOURCE.match(source)
    if not found:
        return " ".join(source.split()[:4]) or "unnamed"
    parts = [part for part in found[2].split("/") if part]
    stem = parts[-1].split(".")[0] if parts else ""
    if stem.lower() in _PLAIN and len(parts) > 1:
        stem = parts[-2]
    return f"{found[1]}/{stem}"

"""A plan as text: verdict, sizes, bytes per rank, and where every rank would sit. Pure strings."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.render import count, plural, size, table
from launcher.verdict import best_text, tight, tight_text
from strategies.capabilities import MODELLED_ONLY
from strategies.codec import from_json
from strategies.plan import ParallelPlan
from strategies.schedule import SampleSchedule
from strategies.specs import BatchSpec, ClusterSpec
from strategies.topology import draw, nodes_needed, place

_STAGES_SHOWN = 32
_PICTURE_LINES = 8


def plan_text(
    document: Mapping[str, Any], plan: ParallelPlan, cluster: ClusterSpec, today: datetime.date | None = None
) -> str:
    """Everything that ``phalanx plan`` shows.

    Args:
        document: What ``plan --json`` prints.
        plan: The plan of the document.
        cluster: The machine of the document.
        today: The day on which the run would start; None is for documents without an estimate.
    """
    estimate = document["estimate"]
    refused = [one for one in document["violations"] if estimate is None or one["rule"] not in MODELLED_ONLY]
    blocks = [_head(document, plan, cluster)]
    if document.get("search"):
        from launcher.render_search import ranking_text

        blocks.append(ranking_text(document["search"]))
    if refused:
        blocks.append(violations_text(refused))
    if estimate is not None:
        from launcher.render_estimate import arithmetic_text, estimate_text

        if not document.get("search"):
            blocks.append(estimate_text(estimate, today or datetime.date.min))
            blocks.append(
                best_text(estimate) or "Is there a better one? --explain says so; strategy=auto finds the best."
            )
        if "arithmetic" in estimate:
            blocks.append(arithmetic_text(estimate["arithmetic"]))
    elif document["memory"]:
        blocks.append(_memory(document))
    warnings = [*_warnings_of_chosen(document), *(document.get("warnings") or ())]
    if warnings:
        blocks.append("\n".join(f"warning: {one}" for one in warnings))
    if not refused:
        if not document.get("search"):
            blocks.append(_picture(plan, cluster, script=document["job"] == "script", brief=estimate is not None))
        blocks.append(_last_word(document, cluster))
    return "\n\n".join(blocks)


def _warnings_of_chosen(document: Mapping[str, Any]) -> Sequence[str]:
    """What the numbers of a searched plan cannot be trusted about; those of a given one stand with its numbers."""
    estimate = document["estimate"]
    return estimate["warnings"] if document.get("search") and estimate is not None else ()


def _last_word(document: Mapping[str, Any], cluster: ClusterSpec) -> str:
    more = f"\nAll about it: phalanx plan {_chosen(document)}" if document.get("search") else ""
    if not document["violations"]:
        needed = " and cluster.address=IP:PORT" if cluster.kind == "existing" and not cluster.address else ""
        absent = document.get("absent_data")
        where = f"Its data are not on this machine: {', '.join(absent)}. Where they are, " if absent else ""
        return f"This plan can run. {where}phalanx submit with the same overrides{needed} starts it.{more}"
    one = document["violations"][0]
    hint = f" ({one['hint']})" if one["hint"] else ""
    return f"This plan can be modelled only; submit would refuse it: {one['message']}{hint}.{more}"


def _chosen(document: Mapping[str, Any]) -> str:
    """The words that ask for the chosen plan itself."""
    search = document["search"]
    chosen = search["best_runnable"] or search["ranked"][0]
    return " ".join(chosen["overrides"]) + " (and your other overrides)"


def violations_text(violations: Sequence[Mapping[str, str]]) -> str:
    """Every broken rule with its numbers and what would mend it."""
    lines = [f"This plan cannot run: it breaks {plural(len(violations), 'rule')}."]
    for one in violations:
        lines.append(f"  - {one['rule']}: {one['message']}")
        if one["hint"]:
            lines.append(f"      {one['hint']}")
    return "\n".join(lines)


def _head(document: Mapping[str, Any], plan: ParallelPlan, cluster: ClusterSpec) -> str:
    model, batch = document["model"], document["batch"]
    machine = f"{cluster.name}: {plural(cluster.nodes, 'node')} x {plural(cluster.slots_per_node, 'slot')}"
    machine += f", {plural(cluster.spares, 'spare')}" if cluster.spares else ""
    if document["job"] == "script":
        return f"{'job:':<12}a script on {plural(plan.world_size, 'rank')}\n{'cluster:':<12}{machine}"
    shape = f"{model['layers']} layers, hidden {model['hidden']}, {model['heads']} heads"
    shape += f" ({model['kv_heads']} kv)" if model["kv_heads"] != model["heads"] else ""
    tokens = batch["global_batch"] * batch["seq"]
    padding = plan.rows_per_step - batch["global_batch"]
    rows = [
        ("model", f"{model['name']} ({model['flavour']}): {shape}, {document['parameters']:,} parameters"),
        ("plan", f"{plan.describe()}, {document['precision']}"),
        ("ranks", f"{plan.world_size} of {cluster.slots} slots"),
        (
            "batch",
            f"{batch['global_batch']} sequences x {batch['seq']} tokens = {count(tokens)} tokens per step"
            + (f", {plural(padding, 'padding row')} of weight 0" if padding > 0 else ""),
        ),
        *([("ramp", ramp_line(from_json(BatchSpec, batch), plan))] if batch["ramp"] is not None else []),
        *([("data", sources_line(document["sources"]))] if document.get("sources") else []),
        ("cluster", machine),
    ]
    if document["estimate"] is not None:
        rows.append(("forecast", _forecast(document["estimate"])))
    return "\n".join(f"{name + ':':<12}{text}" for name, text in rows)


def sources_line(sources: Sequence[Mapping[str, Any]]) -> str:
    """What a mixture is made of; how many documents and tokens that are is known once submit has read them."""
    amounts = [
        f"{one['epochs']:g} epochs" if one["share"] is None else f"{100 * one['share']:.2f} %" for one in sources
    ]
    told = [f"{one['name']} {amount}" for one, amount in zip(sources, amounts, strict=True)]
    kinds = {one["share"] is None for one in sources}
    note = {(True,): " (proportions, since none has a weight)", (False, True): " (% of what the epochs leave)"}
    return f"{plural(len(sources), 'source')}: {', '.join(told)}" + note.get(tuple(sorted(kinds)), "")


def ramp_line(batch: BatchSpec, plan: ParallelPlan) -> str:
    """How the batch grows, in steps of this plan."""
    schedule = SampleSchedule.of(batch)
    if not schedule.changes:
        return f"every step has {batch.global_batch} sequences"
    first, last = 1, schedule.changes[-1].step
    accumulated = schedule.micro_batches(first, plan)
    times = plural(len(schedule.changes), "increment")
    return (
        f"{schedule.batch_at(first)} -> {batch.global_batch} sequences in {times}; the full "
        f"batch from step {last:,} on, after {count(schedule.trained(last) * batch.seq)} tokens "
        f"(micro-batches per step: {accumulated} -> {plan.grad_accum})"
    )


def _forecast(estimate: Mapping[str, Any]) -> str:
    from launcher.render_estimate import forecast_line

    line = forecast_line(estimate)
    if not tight(estimate):
        return line
    return tight_text(estimate) + line[line.index(")") + 1 :]  # its first words are the verdict on memory


def _memory(document: Mapping[str, Any]) -> str:
    stages = document["memory"]
    rows = []
    for entry in stages[:_STAGES_SHOWN]:
        index = entry["stage"]
        parameters = f"{document['parameters_per_rank'][index]:,}"
        kinds = [size(entry[kind]) for kind in ("weights", "gradients", "optimizer", "total")]
        rows.append((index, document["plan"]["stages"][index], parameters, *kinds))
    header = ("STAGE", "BLOCKS", "PARAMETERS", "WEIGHTS", "GRADIENTS", "OPTIMIZER", "TOTAL")
    text = "model state per rank (activations and buffers come on top):\n" + table(header, rows, right=range(7))
    if len(stages) > _STAGES_SHOWN:
        text += f"\n... and {len(stages) - _STAGES_SHOWN} more stages (--json has all)"
    return text


def _picture(plan: ParallelPlan, cluster: ClusterSpec, *, script: bool, brief: bool) -> str:
    names = [f"node-{i}" for i in range(nodes_needed(plan, cluster.slots_per_node))]
    if script:  # its ranks have no coordinates that we know of
        text = f"ranks fill {plural(len(names), 'node')} in order, {cluster.slots_per_node} each"
    else:
        text = draw(plan, place(plan, names, cluster.slots_per_node))
        if brief and text.count("\n") > _PICTURE_LINES:  # the estimate is what people came for
            first, *notes = [line for line in text.splitlines() if not line.startswith("  ")]
            text = "\n".join([first.partition("; rank")[0], *notes, "  (--report draws which rank sits where)"])
    idle = cluster.nodes - len(names)
    notes = [f"{plural(idle, 'node')} without ranks"] if idle else []
    notes += [f"{plural(cluster.spares, 'spare node')}, agents only"] if cluster.spares else []
    return text + ("\n  " + "; ".join(notes) if notes else "")

"""A plan as text: verdict, sizes, bytes per rank, and where every rank would sit. Pure strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.render import count, plural, size, table
from strategies.plan import ParallelPlan
from strategies.specs import ClusterSpec
from strategies.topology import draw, nodes_needed, place

_STAGES_SHOWN = 32


def plan_text(document: Mapping[str, Any], plan: ParallelPlan, cluster: ClusterSpec) -> str:
    """Everything that ``phalanx plan`` shows.

    Args:
        document: What ``plan --json`` prints.
        plan: The plan of the document.
        cluster: The machine of the document.
    """
    blocks = [_head(document, plan, cluster)]
    if document["violations"]:
        blocks.append(violations_text(document["violations"]))
    if document["memory"]:
        blocks.append(_memory(document))
    if not document["violations"]:
        blocks.append(_picture(plan, cluster, script=document["job"] == "script"))
        blocks.append("This plan can run. phalanx submit with the same overrides starts it.")
    return "\n\n".join(blocks)


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
        ("cluster", machine),
    ]
    return "\n".join(f"{name + ':':<12}{text}" for name, text in rows)


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


def _picture(plan: ParallelPlan, cluster: ClusterSpec, *, script: bool) -> str:
    names = [f"node-{i}" for i in range(nodes_needed(plan, cluster.slots_per_node))]
    if script:  # its ranks have no coordinates that we know of
        text = f"ranks fill {plural(len(names), 'node')} in order, {cluster.slots_per_node} each"
    else:
        text = draw(plan, place(plan, names, cluster.slots_per_node))
    idle = cluster.nodes - len(names)
    notes = [f"{plural(idle, 'node')} without ranks"] if idle else []
    notes += [f"{plural(cluster.spares, 'spare node')}, agents only"] if cluster.spares else []
    return text + ("\n  " + "; ".join(notes) if notes else "")

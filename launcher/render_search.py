"""A search as text: the ranking, why the next best lost, and what became of the rest. Pure strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.quantities import dollars, percent, span, storage
from launcher.render import count, indent, plural, table
from launcher.verdict import BEST_AT

_MEANING = {
    "slower": "slower than the plans above: their lower bound says so",
    "model_state": "weights, gradients and optimizer state exceed the memory",
    "activations": "activations on top of them exceed the memory",
    "memory": "exceed the memory, predicted one by one",
    "world_size_fits_cluster": "need more ranks than the cluster has",
    "schedule_fits": "their schedule does not take their number of micro-batches",
}

_NAMES = {
    "gemm": "matrix multiplications",
    "attention": "attention",
    "memory_bound": "memory-bound work",
    "tp": "tensor-parallel communication",
    "cp": "sequence exchange",
    "ep": "expert exchange",
    "launch": "kernel launches",
    "bubble": "pipeline bubble",
    "p2p": "messages between stages",
    "dp": "gradients of the replicas",
    "optimizer": "optimizer",
    "offload": "offload traffic",
}


def ranking_text(document: Mapping[str, Any]) -> str:
    """Everything about a search.

    Args:
        document: From :func:`launcher.auto.auto_document`.
    """
    ranked = document["ranked"]
    priced = document["objective"] == "cost"
    blocks = [f"best plans by {BEST_AT[document['objective']]}:\n{_table(ranked, priced=priced)}"]
    runnable = document["best_runnable"]
    if runnable is None:
        blocks.append("phalanx runs none of these: they are modelled only.")
    elif all(one["plan"] != runnable["plan"] for one in ranked):
        blocks.append(
            "the best plan that phalanx runs today (those above are modelled only):\n"
            + _table([runnable], priced=priced)
        )
    if document["runner_up"]:
        blocks.append("why the next best lost:\n" + indent(lost_text(document["runner_up"])))
    blocks.append(space_text(document))
    return "\n\n".join(blocks)


def _table(plans: Sequence[Mapping[str, Any]], *, priced: bool = False) -> str:
    """One plan a row; if ``priced``, with the dollars of the run at 50 %, where they are known."""
    priced = priced and any(one["cost_50_usd"] for one in plans)
    rows = []
    for index, one in enumerate(plans, start=1):
        rows.append(
            (
                index,
                one["plan_text"],
                span(one["step_s"]),
                *([dollars(one["cost_50_usd"]) if one["cost_50_usd"] else "never"] if priced else []),
                count(one["surviving_tokens_per_s"]),
                percent(one["mfu"]),
                storage(one["peak_bytes"]),
                one["ranks"],
                "yes" if one["runnable"] else "modelled only",
            )
        )
    header = ("#", "PLAN", "STEP", *(["$"] if priced else []), "TOKENS/S", "MFU", "MEMORY", "RANKS", "RUNS")
    return table(header, rows, right=(0, *range(2, len(header) - 1)))


def lost_text(lost: Mapping[str, Any]) -> str:
    """What a plan loses against the best, in two or three lines."""
    kinds = [f"{_NAMES.get(one['kind'], one['kind'])} {_signed(one['more_s'])}" for one in lost["seconds"][:4]]
    lines = [lost["plan_text"]]
    lines.append(f"differs in {', '.join(lost['changes']) or 'nothing'}")
    if abs(lost["slower"]) < 5e-7:
        lines.append("takes as long: the simpler plan comes first")
    else:
        word = "longer" if lost["slower"] > 0 else "shorter"
        text = f"its step is {percent(abs(lost['slower']))} {word}"
        lines.append(text + (f": {', '.join(kinds)}" if kinds else ""))
        if (lost["slower"] > 0) == (lost["surviving"] > 0):
            lines.append(
                f"with failures, {percent(abs(lost['surviving']))} {_fewer(lost['surviving'])} tokens per second"
            )
    if lost["bytes"]:
        held = [f"{one['kind']} {_signed_bytes(one['more_bytes'])}" for one in lost["bytes"][:3]]
        lines.append(f"memory of the fullest rank {_signed_bytes(lost['more_bytes'])}: {', '.join(held)}")
    return "\n".join(lines)


def _fewer(change: float) -> str:
    return "more" if change > 0 else "fewer"


def _signed(seconds: float) -> str:
    return f"{'+' if seconds > 0 else '-'}{span(abs(seconds))}"


def _signed_bytes(number: float) -> str:
    return f"{'+' if number > 0 else '-'}{storage(abs(number))}"


def space_text(document: Mapping[str, Any]) -> str:
    """How many plans there are, and what became of them; the numbers add up."""
    parts = {**document["pruned"], **document["rejected"]}
    rows = [(f"{document['evaluated']:,}", "predicted one by one")]
    for name, number in sorted(parts.items(), key=lambda item: -item[1]):
        bound = " (pruned by a bound)" if name in document["pruned"] and name != "slower" else ""
        rows.append((f"{number:,}", _MEANING.get(name, name) + bound))
    return f"the whole space has {document['space']:,} plans:\n" + table(
        ("PLANS", "WHAT BECAME OF THEM"), rows, right=(0,)
    )


def why_text(document: Mapping[str, Any]) -> str:
    """Why a plan is not the best one.

    Args:
        document: From :func:`launcher.auto.why_document`.
    """
    asked = ", ".join(f"{name}={value}" for name, value in document["asked"].items())
    best = f"the best plan: {document['best']['plan_text']}, {span(document['best']['step_s'])} per step"
    if document["verdict"] == "best":
        return f"{asked}: this is the best plan.\n\n" + _table([document["plan"]])
    if document["verdict"] == "illegal":
        broken = [f"  - {one['rule']}: {one['message']}; {one['hint']}" for one in document["violations"]]
        return f"{asked} breaks {plural(len(broken), 'rule')}:\n" + "\n".join(broken) + f"\n\n{best}"
    if document["verdict"] == "too_large":
        one = document["violations"][0]
        return f"{asked} does not fit, whatever else is chosen.\n  {one['message']}\n  {one['hint']}\n\n{best}"
    head = f"{asked}: the best plan with it is legal and fits, and loses.\n\n" + _table([document["plan"]])
    return head + "\n\nagainst the best:\n" + indent(lost_text(document["lost"])) + f"\n\n{best}"

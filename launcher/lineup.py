"""Which nodes form the gang, in which order, and with which ranks. Pure.

Nodes stand in the order of their addresses: who shares a switch or a rack has neighbouring ones, as networks are laid
out, and the memory tier keeps the replicas of a node half a gang away (:mod:`launcher.host.persist.service`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any

from launcher import roster
from launcher.backend import AgentAddress
from launcher.gang_state import GangState
from launcher.progress import ResumePoint
from launcher.recovery import Action, Decision
from launcher.run import Run
from strategies.plan import ParallelPlan
from strategies.specs import ClusterSpec
from strategies.topology import nodes_needed, place


def line_up(before: Sequence[str], up: Mapping[str, str], need: int) -> list[str]:
    """Nodes in gang order: who was there keeps its place, others fill the gaps in the order of their addresses.

    Keeping places keeps what a node has in memory useful to its ranks, and makes the log easy to read.

    Args:
        before: Nodes of the last attempt, in gang order; empty at the first start.
        up: Node -> address of those that can be used now, at least ``need``.
        need: Nodes that the plan takes.
    """
    kept = [node if node in up else None for node in before[:need]]
    kept += [None] * (need - len(kept))
    fresh = sorted(up.keys() - set(before), key=lambda node: (_by_address(up[node]), _by_name(node)))
    late = [node for node in before[need:] if node in up]
    fill = iter([*fresh, *late])
    return [node if node is not None else next(fill) for node in kept]


def _by_address(address: str) -> tuple[int, int, list[str | int]]:
    """Sorts IP addresses by their numbers, and what is none behind them."""
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return 9, 0, _by_name(address)
    return number.version, int(number), []


def _by_name(name: str) -> list[str | int]:
    """Sorts names as people count: n9 before n10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def swapped(run: Run, state: GangState) -> Decision | None:
    """Which nodes have taken the places of others; None where none has, or where the plan is another one.

    Args:
        run: The attempts so far.
        state: The gang of the next one.
    """
    before, after = run.attempt.nodes if run.attempt else (), tuple(state.placement)
    if len(before) != len(after) or set(before) == set(after):
        return None
    places = [f"{new} takes the place of {old}" for old, new in zip(before, after, strict=True) if old != new]
    stand = "it stands" if len(places) == 1 else "they stand"
    words = f"{', '.join(places)}: {stand} by, so nothing is waited for and the plan stays as it is"
    return Decision(action=Action.SWAP, reason=words)


def form(
    run: Run,
    plan: ParallelPlan,
    up: Mapping[str, AgentAddress],
    cluster: ClusterSpec,
    *,
    point: ResumePoint,
    script: bool,
) -> GangState:
    """The gang of a new attempt, before any of its ranks exists.

    Args:
        run: The attempts so far.
        plan: Its plan.
        up: The agents of the nodes that can be used now, enough for the plan.
        cluster: How many ranks a node carries.
        point: Where it begins.
        script: The ranks are a user's script.
    """
    before = run.attempt.nodes if run.attempt else ()
    addresses = {node: agent.host for node, agent in up.items()}
    nodes = line_up(before, addresses, nodes_needed(plan, cluster.slots_per_node))
    placed = place(plan, nodes, cluster.slots_per_node)
    return GangState(
        attempt=len(run.attempts) + 1,
        plan=plan,
        placement={entry.node: entry.ranks for entry in placed.assignments},
        script=script,
        resume_from=point.path,
        first_step=point.step + 1,
        last_step=point.step,
    )


def told(run: Run, state: GangState, wanted: ParallelPlan, *, reason: str) -> dict[str, Any]:
    """What the log says of a new attempt: a plan that is not the one that is wanted, and the nodes that have changed.

    Args:
        run: The attempts so far.
        state: The gang of the new one.
        wanted: The plan of the run.
        reason: Why there is another attempt.
    """
    return {
        "plan": state.plan,
        "wanted": None if state.plan == wanted else wanted,
        **roster.fields(run.attempt.nodes if run.attempt else (), list(state.placement)),
        "resume_from": state.resume_from,
        "first_step": state.first_step,
        "reason": reason,
    }

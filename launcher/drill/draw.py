"""Faults drawn by a seed: a pure function of the seed and of what may be drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from launcher.drill.case import Aim, Case
from launcher.drill.toy import EVERY, NUMERIC_STEP, STEPS
from strategies.plan import ParallelPlan

T = TypeVar("T")
_PHASES = ("step_begin", "step_end", "checkpoint", "shards_written")


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One fault with the place where it strikes."""

    case: Case
    aim: Aim


def draws(cases: Sequence[Case], *, seed: int, count: int, plan: ParallelPlan, nodes: int) -> tuple[Draw, ...]:
    """Draw faults.

    Args:
        cases: What may be drawn.
        seed: The same seed draws the same faults.
        count: How many.
        plan: Plan of the rehearsal.
        nodes: Nodes of its gang.
    """
    return tuple(_one(cases, f"{seed}|{number}", plan, nodes) for number in range(count))


def _one(cases: Sequence[Case], text: str, plan: ParallelPlan, nodes: int) -> Draw:
    case = _pick(f"{text}|kind", cases)
    phase = "step_begin"
    if any("{phase}" in fault for fault in case.faults):
        phase = _pick(f"{text}|phase", _PHASES)
    steps = range(case.least_step, case.last_step + 1 if case.last_step else STEPS)
    if case.numeric:
        steps = range(NUMERIC_STEP, NUMERIC_STEP + 1)
    chosen = [step for step in steps if step % EVERY == 0] if case.saving or phase in _PHASES[2:] else list(steps)
    ranks = range(plan.world_size)
    if case.name == "loss_spike":  # the loss is made in the last pipeline stage
        ranks = ranks[plan.world_size - plan.world_size // plan.pp :]
    rank, node = _pick(f"{text}|rank", ranks), _pick(f"{text}|node", range(nodes))
    # The other node is not the one that is struck already: that of the node, or that of the rank.
    struck = node if any("{node}" in fault for fault in case.faults) else rank * nodes // plan.world_size
    return Draw(
        case=case,
        aim=Aim(
            rank=rank,
            node=node,
            other=(struck + 1) % nodes,
            step=_pick(f"{text}|step", chosen),
            phase=phase,
        ),
    )


def _pick(text: str, choice: Sequence[T]) -> T:
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return choice[number % len(choice)]

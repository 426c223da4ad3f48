"""How soon a fault must be known, and what it may cost. The promises of the README, for the judge of a drill. Pure.

=====================================  =================================================================
a rank that ends                       at once
a node or an agent that dies, a cut    ``recovery.detect_s``
a rank that stands still               3 x the 99th percentile of the run's own steps + 5 s
=====================================  =================================================================

Whatever else a fault does has no bound: numbers are judged when their step is complete, and a controller that was
killed is replaced when a person or the cluster does it.

Whatever strikes a gang that goes on by itself from memory may cost the steps between two copies there, once for every
strike; what is no failure costs none, nor does a controller whose gang is adopted, nor a node that is told to leave.
No bound have: damaged checkpoints (rehearsed without copies in memory), two nodes at once and the only node (the copies
go with them), numbers (the run goes back before them), and what a person resumes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from launcher.drill.case import Aim, Case
from launcher.hang_watch import ANSWERS_S, ASK_S
from launcher.recovery import Action, FailureKind
from launcher.request import LaunchRequest
from strategies.schedule import SampleSchedule

SLACK_S = 2.0
"""For a machine with more processes than cores: what has happened is read, and written down, when one is free."""

UNANSWERED_S = ANSWERS_S - ASK_S
"""A rank that stands still may be unable to say where; so long the others are waited for beyond the limit."""

HANG_FACTOR, HANG_MARGIN_S = 3.0, 5.0  # the promise, not what the watch goes by

_AT_ONCE = {FailureKind.RANK_KILLED, FailureKind.RANK_EXIT, FailureKind.RANK_ERROR, FailureKind.DEVICE_LOST}
_SILENCE = {FailureKind.NODE_LOST, FailureKind.PARTITIONED}


def within_s(case: Case, aim: Aim, request: LaunchRequest, lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Seconds from the fault until the controller must know of it, slack included; None for no bound.

    Args:
        case: The fault.
        aim: Where it strikes.
        request: What was run.
        lines: Lines of metrics.jsonl.
    """
    kinds = set(case.failures)
    if case.ambush or case.resumes or not kinds:
        return None
    if kinds <= _AT_ONCE:
        return SLACK_S
    if kinds <= _AT_ONCE | _SILENCE:
        return request.recovery.detect_s + SLACK_S
    if kinds == {FailureKind.HANG}:
        patience_s = request.recovery.save_timeout_s if case.saving else 0.0  # it is asked again when that is over
        return patience_s + hang_s(lines, growth(request, aim.step)) + UNANSWERED_S + SLACK_S
    return None


def most_lost(case: Case, request: LaunchRequest) -> int | None:
    """Steps that may have to be done again; None for no bound.

    Args:
        case: The fault.
        request: What was run.
    """
    kinds, strikes = set(case.failures) - set(Action), " ".join(case.faults)
    if case.adopted or not (case.fails or case.resumes):
        return 0
    every, of_ranks = request.job.checkpoint.memory_every, kinds <= _AT_ONCE | {FailureKind.HANG}
    two_nodes = "{node}" in strikes and "{other}" in strikes
    copies_left = of_ranks or (kinds <= _SILENCE and not two_nodes and request.cluster.nodes > 1)
    if case.ambush or case.resumes or not every or not copies_left:
        return None
    return every * (len(case.faults) + sum(not act.relief for act in case.acts))


def hang_s(lines: Iterable[Mapping[str, Any]], growth: float = 1.0) -> float:
    """3 x the 99th percentile of steps + 5 s.

    Args:
        lines: Lines of metrics.jsonl.
        growth: How many times more work the step that hangs has than the first; of a size that was not seen
            before it is known only that it takes at most so many times as long.
    """
    took = sorted(float(line["seconds"]) + float(line.get("stall_s", 0.0)) for line in lines)
    p99_s = took[math.ceil(0.99 * len(took)) - 1] if took else 0.0
    return HANG_FACTOR * growth * p99_s + HANG_MARGIN_S


def growth(request: LaunchRequest, step: int) -> float:
    """The batch of a step over that of the first: 1 unless it grows."""
    schedule = SampleSchedule.of(request.job.batch)
    return schedule.batch_at(max(1, step)) / schedule.batch_at(1)

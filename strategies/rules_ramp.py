"""Rules about a batch that grows: whether the ramp is possible, and whether every replica has work in its steps."""

from __future__ import annotations

import itertools

from strategies.cases import Case, Rule, divisors
from strategies.errors import Violation
from strategies.remedy import REACH, at_most, hint_of, mends, nearest_legal


def ramp_ends(case: Case) -> Violation | None:
    """A ramp says once when the batch has its full size, and that is after its last smaller size began."""
    ramp, seq = case.batch.ramp, case.batch.seq
    if ramp is None or seq < 1:
        return None
    if (ramp.samples > 0) == (ramp.tokens > 0):
        found = "both" if ramp.samples > 0 else "neither"
        return Violation(
            rule="ramp_ends",
            message=f"train.ramp has {found} of samples and tokens; one of them says when the batch has its full size",
            hint=f"train.ramp.samples=N, or train.ramp.tokens=N (1 sample has {seq} tokens)",
        )
    last = max((point.tokens for point in ramp.points), default=0.0)
    if ramp.points and ramp.length(seq) * seq <= last:
        return Violation(
            rule="ramp_ends",
            message=f"train.ramp ends after {ramp.length(seq) * seq:,} tokens, its last size begins at {last:,.0f}",
            hint=f"train.ramp.tokens above {last:,.0f}",
        )
    return None


def ramp_ascends(case: Case) -> Violation | None:
    """The sizes grow from 1 or more to the full batch, each from a later sample on."""
    ramp, full = case.batch.ramp, case.batch.global_batch
    if ramp is None:
        return None
    if not ramp.points:
        if 1 <= ramp.start < full:
            return None
        starts, rule = (range(1, min(full, REACH)) if ramp.start < 1 else _below(full)), "ramp_ascends"
        return Violation(
            rule=rule,
            message=f"train.ramp.start {ramp.start} does not ascend to the global batch of {full}",
            hint=nearest_legal(case, rule, "ramp.start", ramp.start, starts, "start")
            if full > 1
            else "leave train.ramp out",
        )
    sizes, tokens = [*(point.global_batch for point in ramp.points), full], [point.tokens for point in ramp.points]
    wrong = []
    if sizes[0] < 1 or any(later <= earlier for earlier, later in itertools.pairwise(sizes)):
        wrong.append(f"the sizes {', '.join(map(str, sizes))} do not ascend from 1 or more")
    if tokens[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(tokens)):
        wrong.append(f"the tokens {', '.join(f'{one:,.0f}' for one in tokens)} do not ascend from 0")
    if not wrong:
        return None
    message = "train.ramp.points: " + "; ".join(wrong)
    return Violation(rule="ramp_ascends", message=message, hint="every size is larger and begins later than the last")


def ramp_whole(case: Case) -> Violation | None:
    """Increments lead to the full batch exactly."""
    ramp, full = case.batch.ramp, case.batch.global_batch
    if ramp is None:
        return None
    if ramp.points:
        if not (ramp.start or ramp.increment):
            return None
        message, hint = "train.ramp has points, and start or increment beside them", "give one or the other"
        return Violation(rule="ramp_whole", message=message, hint=hint)
    way = full - max(1, ramp.start)
    if way < 1 or (ramp.increment >= 1 and way % ramp.increment == 0):
        return None
    return Violation(
        rule="ramp_whole",
        message=f"train.ramp.increment {ramp.increment} does not lead from {ramp.start} to {full} in whole steps",
        hint=nearest_legal(case, "ramp_whole", "ramp.increment", ramp.increment, divisors(way), "increment"),
    )


def _below(full: int) -> range:
    """The numbers just below a full batch."""
    return range(max(1, full - REACH), full)


def ramp_feeds_replicas(case: Case) -> Violation | None:
    """Steps that a plan does not divide are padded, but no replica computes on padding alone, in small steps either."""
    plan, ramp, full = case.plan, case.batch.ramp, case.batch.global_batch
    if ramp is None or min(plan.dp, plan.micro_batch) < 1:
        return None
    size, room = case.batch.smallest, plan.dp * plan.micro_batch
    if size < 1 or size >= room or room > full:  # the last is the business of replicas_within_batch
        return None
    rows = f"dp {plan.dp} x micro_batch {plan.micro_batch} = {room} rows at a time"
    rule = "ramp_feeds_replicas"
    options = _later_start(case, rule, room)
    options += at_most(case, rule, "dp", size // plan.micro_batch)
    options += at_most(case, rule, "micro_batch", size // plan.dp)
    return Violation(
        rule=rule,
        message=f"the ramp starts with {size} sequences per step, {rows}: a replica would compute on padding alone",
        hint=hint_of(options, "; or "),
    )


def _later_start(case: Case, rule: str, room: int) -> list[str]:
    """The smallest start that feeds every replica, from which the increments lead to the full batch."""
    ramp, full = case.batch.ramp, case.batch.global_batch
    if ramp is None or ramp.points:
        return [f"a ramp that starts at {room} or more"]
    first = full - (full - room) // ramp.increment * ramp.increment if ramp.increment > 0 else room
    found = next((one for one in (room, first) if one < full and mends(case, rule, {"ramp.start": one})), None)
    return [] if found is None else [f"a ramp that starts at {found} or more"]


RAMP_RULES: tuple[Rule, ...] = (ramp_ends, ramp_ascends, ramp_whole, ramp_feeds_replicas)
"""In the order in which they are reported."""

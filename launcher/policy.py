"""What follows from a failure: another try, after what pause and with what left out, or the end. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from launcher.recovery import BUDGET_OF, Action, Decision, Failure, FailureKind
from launcher.request import RecoverySpec
from launcher.rollback import Answer, answer
from launcher.run import Run


def decide(run: Run, failure: Failure, spec: RecoverySpec, *, spare: bool = False) -> Decision:
    """Restart or give up.

    Args:
        run: The run, its newest failure already folded in.
        failure: The cause.
        spec: Budgets and patience.
        spare: Another node stands by. Where it takes the place of one that is left out, there is nothing to wait for.
    """
    for judge in (_hopeless, _again, _unstable, _spent, _stuck):
        reason = judge(run, failure, spec)
        if reason:
            return Decision(action=Action.GIVE_UP, reason=reason)
    delay = 0.0
    idle = run.headway.idle_restarts
    if idle and failure.kind is not FailureKind.PREEMPTED and not (spare and _elsewhere(run, failure)):
        delay = min(spec.backoff_max_s, spec.backoff_s * 2 ** (idle - 1))
    skip, rollback = _answer(run, failure)
    return Decision(action=Action.RESTART, reason=failure.detail, delay_s=delay, skip=skip, rollback=rollback)


def _hopeless(run: Run, failure: Failure, spec: RecoverySpec) -> str:
    """The same input leads to the same end."""
    if failure.kind is FailureKind.BAD_CONFIG:
        return f"{failure.detail}. Another try would end alike"
    return ""


def _again(run: Run, failure: Failure, spec: RecoverySpec) -> str:
    """It has happened before, in the same way at the same place."""
    alike = [fall for fall in run.failures if failure.signature and fall.signature == failure.signature]
    times, nodes = len(alike), {fall.node for fall in alike}
    if failure.kind is FailureKind.DEVICE_FAULT and times >= spec.same_error_limit:
        return _of_the_program(failure, times, nodes) if len(nodes) > 1 or times > spec.same_error_limit else ""
    if times >= spec.same_error_limit and not (_elsewhere(run, failure) and len(nodes) == 1):
        return f"the same error at the same step {times} times: {failure.detail}{_advice(failure)}"
    return ""


def _answer(run: Run, failure: Failure) -> Answer:
    return answer(run, failure.step, failure.samples) if failure.kind is FailureKind.NUMERIC else (None, None)


def _unstable(run: Run, failure: Failure, spec: RecoverySpec) -> str:
    """Training does not get past a step, whatever it goes on from and with."""
    if failure.kind is not FailureKind.NUMERIC or any(_answer(run, failure)):
        return ""
    older = "older weights and " if failure.step <= run.rollback.step else ""
    return (
        f"{failure.detail}, again with {older}other samples: it is not the data. A lower learning rate (train.lr) "
        "may help; train.spike_sigmas=0 takes spikes as they come"
    )


def _of_the_program(failure: Failure, times: int, nodes: Collection[str]) -> str:
    """A device fails where it is; a kernel with a mistake fails at its step, wherever that is."""
    where = f"on {len(nodes)} nodes, so it is no device's" if len(nodes) > 1 else "and there was no other node"
    return (
        f"the same error at the same step {times} times, {where}: {failure.detail}. A kernel may read where it must "
        "not: CUDA_LAUNCH_BLOCKING=1 shows which one, compute-sanitizer where"
    )


def _elsewhere(run: Run, failure: Failure) -> bool:
    """The node that it happened on is left out from now on: what comes next is another try."""
    return run.excluded.get(failure.node, 0.0) > failure.time


def _spent(run: Run, failure: Failure, spec: RecoverySpec) -> str:
    """All restarts of this kind, or of all kinds together, are used."""
    now = run.failures[-1].time if run.failures else failure.time
    window = spec.budget_window_s
    recent = [one.kind for one in run.failures if window is None or now - one.time <= window]
    within = "" if window is None else f" within {window / 60:.0f} minutes"
    name = BUDGET_OF.get(failure.kind, "error")
    budget = getattr(spec.budgets, name)
    if budget is not None and sum(BUDGET_OF.get(FailureKind(kind)) == name for kind in recent) > budget:
        used = f"all {budget} restarts{within} after a failure of this kind are used (recovery.budgets.{name})"
        return f"{used}; last: {failure.detail}{_advice(failure)}"
    if failure.kind is FailureKind.PREEMPTED:
        return ""
    if sum(kind != FailureKind.PREEMPTED for kind in recent) > spec.max_restarts:
        return f"all {spec.max_restarts} restarts are used{within} (recovery.max_restarts); last: {failure.detail}"
    return ""


def _stuck(run: Run, failure: Failure, spec: RecoverySpec) -> str:
    """It fails again and again and gets nowhere."""
    made, limit = run.headway, spec.no_progress_limit
    if failure.kind is FailureKind.PREEMPTED or max(made.idle_restarts, made.fall_backs) < limit:
        return ""
    if made.idle_restarts >= limit:
        what = f"{made.idle_restarts} restarts in a row have led to no newer checkpoint and no step beyond {made.mark}"
    else:
        what = (
            f"it fell back to an older checkpoint {made.fall_backs} times and came to no step beyond {made.best_step}"
        )
    return f"{what} (recovery.no_progress_limit); last: {failure.detail}"


def _advice(failure: Failure) -> str:
    if failure.kind is FailureKind.OUT_OF_MEMORY:
        return ". Less memory: strategy.micro_batch, strategy.recompute, more shards; phalanx plan shows where it goes"
    return ""


def passed_over(run: Run, failure: Failure) -> dict[str, Any] | None:
    """The checkpoint that is not used any more after a failure, for the log; None for none.

    What is out of reach may be had in the next attempt, from a replica; when it could not be had twice, what is older
    is nearer. It was not read, so a person's resume looks again.

    Args:
        run: The run, the failure not yet folded in.
        failure: Why the attempt is over.
    """
    if failure.kind is FailureKind.CORRUPT_CHECKPOINT:
        return {"path": failure.path, "reason": failure.detail}
    if failure.kind is not FailureKind.UNREACHABLE or run.attempt is None:
        return None
    path = run.attempt.resume_from
    tried = any(one.failure == FailureKind.UNREACHABLE and one.resume_from == path for one in run.attempts)
    return {"path": path, "reason": failure.detail, "absent": True} if tried else None

"""When an attempt is over: its cause on record, what follows from it, and what a controller that comes then does.

The cause and the decision are two lines of the log, and a controller may fall between any two. So the decision is made
from the log alone, by whoever finds that there is none; and one that is there is kept, its pause and a run that was to
end included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher import exclusion, policy
from launcher.departure import CAUSE, REASON
from launcher.phase import Phase
from launcher.recovery import Action, Failure, FailureKind
from launcher.run import EventKind, Run

if TYPE_CHECKING:
    from launcher.controller import Controller
    from launcher.gang_state import GangState


def regroup(controller: Controller, state: GangState) -> None:
    """The ranks have left as they were asked to: that is no failure, and nothing is lost."""
    cause = CAUSE[state.leaving]
    controller.record(EventKind.GANG_STOPPED, cause=cause, failure="", signature="", last_step=state.last_step)
    controller.state, controller.start_reason = None, REASON[cause]
    controller.enter(Phase.GATHER)


def conclude(controller: Controller, failure: Failure) -> None:
    """The attempt is over: name the cause, decide, and do what was decided."""
    controller.record_faults()
    if (unfit := policy.passed_over(controller.run, failure)) is not None:
        controller.record(EventKind.CHECKPOINT_REJECTED, **unfit)
    controller.record(EventKind.GANG_STOPPED, **failure.verdict)
    _decide(controller, failure)


def go_on(controller: Controller) -> None:
    """Do what is left to do after the newest attempt, which has ended, or before the first one."""
    run = controller.run
    ruling, lost = run.ruling, _undecided(run)
    if lost is not None:
        _decide(controller, lost)
    elif ruling is not None and ruling.action == Action.GIVE_UP:
        controller.end(EventKind.RUN_FAILED, reason=ruling.reason)
    else:
        controller.start_reason = _reason_after(run)
        if ruling is not None and (left_s := ruling.left_s(controller.clock.time())) > 0:
            _pause(controller, left_s)


def _decide(controller: Controller, failure: Failure) -> None:
    """What follows from the newest failure, which is on record."""
    spec, attempt = controller.request.recovery, controller.run.attempt
    spare = controller.muster.stands_by(attempt.nodes if attempt else ())
    if (excluded := exclusion.after_failure(controller.run, spec, spare=spare)) is not None:
        controller.record(EventKind.NODE_EXCLUDED, **excluded.fields)
    controller.start_reason = "move" if failure.kind is FailureKind.PREEMPTED else "restart"
    decision = policy.decide(controller.run, failure, spec, spare=spare)
    controller.decide(decision)
    controller.state = None
    if controller.phase is not Phase.END:
        _pause(controller, decision.delay_s)


def _pause(controller: Controller, seconds: float) -> None:
    """Back off for so long, then gather."""
    controller.pause_until = controller.clock.monotonic() + seconds
    controller.enter(Phase.BACKOFF if seconds > 0 else Phase.GATHER)


def _undecided(run: Run) -> Failure | None:
    """The failure that has ended the newest attempt, as the log has it, if nothing was decided about it."""
    if (fall := run.undecided) is None or run.attempt is None:
        return None
    return Failure(
        kind=FailureKind(fall.kind),
        time=fall.time,
        node=fall.node,
        step=fall.step,
        detail=run.attempt.cause or "",
        signature=fall.signature,
        samples=fall.samples,
    )


def _reason_after(run: Run) -> str:
    """Why the next attempt will be made, after one that has ended."""
    if run.attempt is None:
        return "start"
    if run.failures and run.attempt.failure == FailureKind.PREEMPTED:
        return "move"
    return REASON.get(run.attempt.cause or "", "restart")

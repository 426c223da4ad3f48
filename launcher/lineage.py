"""What a gang goes on from, as the event log tells it: the history that its branch contains. Pure.

The records beside the checkpoints (:mod:`jobs.checkpoint.fence`) say the same to those who have no log at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jobs.checkpoint.fence import Branch, Row
from jobs.checkpoint.layout import Token, place_of
from jobs.checkpoint.memory import Generation, generation_of
from jobs.location import locate
from launcher.run import Run


def state_of(point: str) -> Generation | None:
    """The state that a resume point names, in memory or on disk; None for the beginning, and for a script's folder."""
    found = generation_of(point)
    if found is not None or not point:
        return found
    try:
        place = place_of(locate(point))
    except ValueError:
        return None
    return Generation(place.step, place.token)


def of(run: Run) -> Branch | None:
    """The branch of the newest attempt; None before the first."""
    if run.attempt is None:
        return None
    return Branch(
        epoch=run.attempt.epoch, attempt=run.attempt.number, history=_rows(_history(run, run.attempt.resume_from))
    )


def following(
    run: Run, token: Token, point: str, *, kept: Iterable[Token], passed: Iterable[str], finishing: bool
) -> Branch:
    """The branch of the attempt that comes next.

    Args:
        run: The attempts so far.
        token: The next one.
        point: Where it begins.
        kept: Gangs of which something is on disk; of others only that matters which the attempt begins with.
        passed: What was passed over, for it or before; what it would have been preferred to does not matter any more.
        finishing: Every node of the gang before has answered.
    """
    begins, history, there = state_of(point), _history(run, point), set(kept)
    telling = {one: step for one, step in history.items() if one in there or (begins and one == begins.token)}
    least = (begins.token, begins.step) if begins else ()
    over = [state for state in map(state_of, passed) if state is not None and (state.token, state.step) > least]
    return Branch(
        epoch=token.epoch,
        attempt=token.attempt,
        history=_rows(telling),
        passed=tuple((state.step, *state.token) for state in over),
        finishing=finishing and begins is not None,
    )


def _history(run: Run, point: str) -> Mapping[Token, int]:
    """Gangs that a state goes back to, and the last step of each that it contains, youngest first."""
    began = {Token(attempt.epoch, attempt.number): attempt.resume_from for attempt in run.attempts}
    history: dict[Token, int] = {}
    state = state_of(point)
    while state is not None and state.token not in history:
        history[state.token] = state.step
        state = state_of(began.get(state.token, ""))
    return history


def _rows(history: Mapping[Token, int]) -> tuple[Row, ...]:
    return tuple((step, *token) for token, step in history.items())

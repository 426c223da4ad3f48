"""How long it is waited for something that the next attempt can begin with, and when people hear of it.

Only time in which there were nodes for a gang counts: a store that nobody has asked has not been silent.
"""

from __future__ import annotations

from launcher.clock import Clock
from launcher.origin import NothingLeft, NothingOlder
from launcher.outset import NotYet
from launcher.recovery import Action, Decision

TELL_S = 60.0  # what lasts is told again after as long, then less and less often


class Vigil:
    """One wait after the other.

    Args:
        clock: Source of time.
        patience_s: How long a wait may last.
    """

    def __init__(self, clock: Clock, *, patience_s: float) -> None:
        self._clock, self._patience_s = clock, patience_s
        self._since: float | None = None  # when there was nothing to begin with for the first time (monotonic)
        self._tell_at_s = 0.0

    def end(self) -> None:
        """It is not waited any more; what is waited for later is another wait."""
        self._since, self._tell_at_s = None, 0.0

    def judge(self, nothing: NothingLeft, *, resumed: bool) -> Decision | None:
        """What to do about it that an attempt finds nothing to begin with; None where people know.

        Args:
            nothing: Why.
            resumed: A person has just asked for the attempt, and is told at once what cannot be had.
        """
        now = self._clock.monotonic()
        self._since = now if self._since is None else self._since
        waited_s = now - self._since
        asked = resumed and not isinstance(nothing, NotYet)
        if waited_s > self._patience_s or asked or isinstance(nothing, NothingOlder):
            return Decision(action=Action.GIVE_UP, reason=str(nothing))
        if waited_s < self._tell_at_s:
            return None
        self._tell_at_s = max(TELL_S, 2 * waited_s)
        return Decision(action=Action.WAIT, reason=str(nothing))

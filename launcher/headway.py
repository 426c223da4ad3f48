"""How far a run has come, and whether it still gets anywhere. Pure.

What counts as progress is a step beyond a mark. The mark is the highest step that any attempt has come to, until the
run has to fall back to an older checkpoint than its newest: from then on it is what was gone on from, or the run would
be told for all the steps in between that it gets nowhere. A run that falls back again and again ends all the same: only
a step beyond all others makes its fall-backs forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Headway:
    """The steps of a run.

    Attributes:
        committed_step: Newest step of which a checkpoint on disk is known; after a fall-back not the one that is gone.
        best_step: The highest step that any attempt has come to.
        mark: A step beyond this is progress.
        idle_restarts: Restarts in a row without a newer checkpoint and without progress.
        fall_backs: Attempts that began before the newest checkpoint, since a step was the highest of all.
    """

    committed_step: int = 0
    best_step: int = 0
    mark: int = 0
    idle_restarts: int = 0
    fall_backs: int = 0

    def planned(self, point: int, *, on_disk: bool, reason: str) -> Headway:
        """An attempt will begin.

        Args:
            point: The step that it goes on from; 0 for the beginning.
            on_disk: It goes on from there because that is the newest on disk; else from a copy in memory.
            reason: See :class:`launcher.attempts.Attempt`.
        """
        idle = {"restart": self.idle_restarts + 1, "move": self.idle_restarts}.get(reason, 0)
        committed = point if on_disk else min(point, self.committed_step)
        found = replace(self, idle_restarts=idle, committed_step=committed)
        if point >= self.committed_step:
            return found
        return replace(found, mark=point, fall_backs=0 if reason == "resume" else self.fall_backs + 1)

    def reached(self, step: int) -> Headway:
        """An attempt has come to a step. That is progress even if the step was lost afterwards."""
        if step <= self.mark:
            return self
        fall_backs = 0 if step > self.best_step else self.fall_backs
        best = max(step, self.best_step)
        return replace(self, mark=step, best_step=best, idle_restarts=0, fall_backs=fall_backs)

    def committed(self, step: int) -> Headway:
        """A checkpoint is on disk."""
        found = self.reached(step)
        if step <= self.committed_step:
            return found
        return replace(found, committed_step=step, idle_restarts=0)

    def renewed(self) -> Headway:
        """A person has asked to go on."""
        return replace(self, idle_restarts=0, fall_backs=0)

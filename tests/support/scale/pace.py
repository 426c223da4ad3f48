"""How far a gang has got: whole steps, one stall for the copy of both tiers, saves that commit late. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How fast a gang works and how it saves. Seconds, and steps between saves.

    Attributes:
        step_s: One step.
        copy_s: Stall of one save, whichever tier it is for.
        replica_s: Until a copy is also in a peer's memory.
        write_s: Until a copy is durable on disk; also how long it takes to read it.
        fetch_s: How long it takes to read the state from a peer's memory.
        memory_every: Steps between two saves to memory; 0 for none.
        disk_every: Steps between two saves to disk; a multiple of ``memory_every``.
        restart_s: From ranks that exist to their first step, without reading the state.
    """

    step_s: float
    copy_s: float
    replica_s: float
    write_s: float
    fetch_s: float
    memory_every: int
    disk_every: int
    restart_s: float

    @property
    def every(self) -> int:
        """Steps between two copies."""
        return self.memory_every or self.disk_every


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Steps that one attempt makes without a break.

    Attributes:
        pace: Its pace.
        begin_s: When its first step begins.
        base: The step that was restored.
    """

    pace: Pace
    begin_s: float
    base: int

    def copies(self, step: int, *, disk: bool = False) -> int:
        """Saves up to and with the one after ``step``: all of them, or those for the disk."""
        every = self.pace.disk_every if disk else self.pace.every
        return step // every - self.base // every

    def ends_s(self, step: int) -> float:
        """When ``step`` is done."""
        stalls = self.copies(step - 1) if step > self.base else 0
        return self.begin_s + (step - self.base) * self.pace.step_s + stalls * self.pace.copy_s

    def done(self, now_s: float) -> int:
        """The newest step that is done."""
        pace = self.pace
        step = self.base + max(0, int((now_s - self.begin_s) / (pace.step_s + pace.copy_s / pace.every)) - 1)
        while self.ends_s(step + 1) <= now_s:
            step += 1
        return step if step == self.base or self.ends_s(step) <= now_s else step - 1

    def committed_s(self, step: int, late_s: float) -> float:
        """When the save after ``step`` is committed."""
        return self.ends_s(step) + self.pace.copy_s + late_s

    def saved(self, now_s: float, *, disk: bool) -> int:
        """The newest step that a tier has committed in this stretch; 0 for none."""
        every, late_s = self._tier(disk)
        step = self.done(now_s) // every * every if every else 0
        while step > self.base and self.committed_s(step, late_s) > now_s:
            step -= every
        return step if step > self.base else 0

    def _tier(self, disk: bool) -> tuple[int, float]:
        pace = self.pace
        return (pace.disk_every, pace.write_s) if disk else (pace.memory_every, pace.replica_s)

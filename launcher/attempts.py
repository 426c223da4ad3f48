"""What a run has tried: its attempts, what ended them, and what was decided then. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One incarnation of the gang.

    Attributes:
        number: From 1.
        epoch: Controller that planned it.
        plan: The plan as JSON values.
        nodes: Nodes that carry its ranks, in gang order.
        started: When it was planned (UTC seconds).
        ended: When it ended, or None.
        cause: Why it ended, or None.
        failure: The kind of failure that ended it, or "".
        first_step: First step it ran (or was to run).
        last_step: Last step known to be complete.
        resume_from: Checkpoint it restored, or "".
        reason: ``start``, ``restart``, ``resume``, ``grow`` or ``move``.
        wanted: The plan that was asked for, if the attempt's own is smaller because nodes were missing.
        trained: When its first step began (UTC seconds), or None.
        restored_s: Seconds in which its slowest rank read the checkpoint, or None.
        idle_from: Since when, after its end, it was only waited for what the next one takes (UTC seconds), or None.
    """

    number: int
    epoch: int
    plan: Mapping[str, Any]
    nodes: tuple[str, ...]
    started: float
    ended: float | None = None
    cause: str | None = None
    failure: str = ""
    first_step: int
    last_step: int = 0
    resume_from: str = ""
    reason: str = "start"
    wanted: Mapping[str, Any] | None = None
    trained: float | None = None
    restored_s: float | None = None
    idle_from: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fall:
    """What ended an attempt.

    Attributes:
        kind: See :class:`launcher.recovery.FailureKind`.
        time: When it was concluded (UTC seconds).
        node: Node that it is put down to, or "".
        signature: See :class:`launcher.recovery.Failure`; so are ``step`` and ``samples``.
    """

    kind: str
    time: float
    node: str = ""
    signature: str = ""
    step: int = 0
    samples: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling:
    """What was decided while no gang lived.

    Attributes:
        action: See :class:`launcher.recovery.Action`.
        reason: One sentence for people.
        time: When (UTC seconds).
        delay_s: How long it is paused.
    """

    action: str
    reason: str
    time: float
    delay_s: float = 0.0

    def left_s(self, now: float) -> float:
        """What is left of the pause; never more than all of it, whatever the clock of a new controller says."""
        return min(self.delay_s, max(0.0, self.time + self.delay_s - now))

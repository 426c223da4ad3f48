"""What a run's time went into: the classes of seconds, and one incident per failure. Values only.

=================  ====================================================================================
start              from submit (or a person's resume) until ranks exist and have started, without restore
productive         optimizer steps that count
checkpoint_stall   steps waiting for a state to be copied, into memory or for the disk, for its replica, and to be
                   written, also where that has failed: as rank 0 has waited
detect             from the failure (or the last sign of life) until the controller knew
decide             from knowing until every old rank is gone and the decision is recorded; and, when ranks leave on
                   purpose at a checkpoint, until they are gone
place              from the decision until the new ranks exist, without a wait for nodes
restore            from the new ranks' existence until their first step begins
replay             work that was lost and done again
wait               backing off, waiting for nodes (from when they were found missing), or down until a person resumed
finish             from the last step to the recorded end: last digest, tear-down
=================  ====================================================================================

Of two classes an incident names parts, as far as they are known. They change nothing of the classes, and sum to at most
theirs; what is left of a restore is ranks that start and whatever nobody has measured.

=================  ====================================================================================
teardown           of decide: until the last old rank is gone, which a driver may hold up, or was found to be
device             of restore: taking the devices (:mod:`jobs.build_time`), as the slowest rank has told
communicators      of restore: rendezvous, process groups, NCCL, as told by the rank that waited least for others
engine             of restore: the rest of building the engine, as the slowest rank has told
state              of restore: reading the state back, as the slowest rank has told
=================  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

CLASSES = (
    "start",
    "productive",
    "checkpoint_stall",
    "detect",
    "decide",
    "place",
    "restore",
    "replay",
    "wait",
    "finish",
)

INCIDENT_CLASSES = ("detect", "decide", "place", "restore", "replay", "wait")
"""Classes that a failure costs."""

PARTS = {
    "teardown": "decide",
    "device": "restore",
    "communicators": "restore",
    "engine": "restore",
    "state": "restore",
}
"""Part of an incident -> the class that it is of; in the order in which they happen."""

ORPHANED = "orphaned"
"""Kind of an incident that nobody detected: controller and ranks were gone until a person resumed the run."""


@dataclass(kw_only=True, slots=True)
class Incident:
    """One failure and what it cost.

    Attributes:
        number: From 1.
        attempt: The attempt that it ended.
        kind: A :class:`launcher.recovery.FailureKind` (after all evidence), or :data:`ORPHANED`.
        cause: One sentence for people.
        node: Node that it happened on, or "".
        rank: Rank that it happened to, or -1.
        at: When it happened (UTC seconds).
        step: Last step that was complete.
        steps_lost: Complete steps that had to be done again.
        action: What was decided: ``restart``, ``shrink``, ``give_up``, ``resume`` (by a person), or "" so far.
        recovered: The ranks trained again; False while they do not yet, or if they never did before the next failure.
        seconds: Per class of :data:`INCIDENT_CLASSES`.
        parts: Per part of :data:`PARTS`, as far as known.
    """

    number: int
    attempt: int
    kind: str
    cause: str
    node: str = ""
    rank: int = -1
    at: float
    step: int
    steps_lost: int = 0
    action: str = ""
    recovered: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(INCIDENT_CLASSES, 0.0))
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        """All that it cost."""
        return sum(self.seconds.values())

    def name_parts(self, name: str, told: Mapping[str, float]) -> None:
        """Of the seconds of a class so many are known to be parts of it.

        Where that is more than have no name yet, each is shortened alike: ranks that were first have begun before the
        class did, and the slowest of one part may not be that of another.
        """
        left = self.unnamed_s(name)
        seconds = {part: max(0.0, min(told[part], left)) for part in told}
        share = min(1.0, left / whole) if (whole := sum(seconds.values())) else 1.0
        for part in seconds:
            self.parts[part] = self.parts.get(part, 0.0) + share * seconds[part]

    def unnamed_s(self, name: str) -> float:
        """Seconds of a class that are none of its parts."""
        named = sum(self.parts.get(part, 0.0) for part, inside in PARTS.items() if inside == name)
        return max(0.0, self.seconds[name] - named)

    @property
    def restart_s(self) -> float:
        """From its detection until the ranks trained again (or the next failure came)."""
        return sum(self.seconds[name] for name in ("decide", "place", "restore", "wait"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """A run's time.

    Attributes:
        seconds: Per class of :data:`CLASSES`, and ``wall``, their sum.
        incidents: Failures, oldest first.
        steps: Optimizer steps that count.
        saves: Checkpoints committed.
        failed_saves: Those that could not be written, every try counted.
        data_s: Of the productive seconds, those in which rank 0 waited for its samples. For another rank that waits all
            ranks do, in their exchanges: :mod:`launcher.straggler` names it.
        memory_s: Of the seconds of checkpoint stalls, those that copies have cost which only memory keeps.
    """

    seconds: Mapping[str, float]
    incidents: Sequence[Incident]
    steps: int
    saves: int
    failed_saves: int = 0
    data_s: float = 0.0
    memory_s: float = 0.0

    @property
    def data_share(self) -> float:
        """Share of the productive time that was waiting for samples."""
        return self.data_s / self.seconds["productive"] if self.seconds["productive"] else 0.0

    @property
    def disk_stall_s(self) -> float:
        """Seconds that steps have waited for checkpoints on disk."""
        return max(0.0, self.seconds["checkpoint_stall"] - self.memory_s)

    @property
    def goodput(self) -> float:
        """Share of the wall time that was productive."""
        return self.seconds["productive"] / self.seconds["wall"] if self.seconds["wall"] else 0.0

    @property
    def rest(self) -> dict[str, float]:
        """Seconds per class that belong to no incident; with the incidents they sum to ``seconds``."""
        inside = {name: sum(one.seconds[name] for one in self.incidents) for name in INCIDENT_CLASSES}
        return {name: self.seconds[name] - inside.get(name, 0.0) for name in CLASSES}

"""What a controller sees of its gang: values, and the box in which they wait to be looked at. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

ObservationKind = Literal[
    "agent_up",
    "agent_lost",
    "report",
    "exit",
    "killed",
    "dying",
    "spawned",
    "notice",
    "leaving",
    "pool",
    "stack",
    "holdings",
    "fenced",
    "cut_off",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """Something that was seen.

    Attributes:
        kind: ``agent_up`` (data: the welcome: ``attempt``, ``epoch_of_attempt``, ``ranks``, ``cursor``, ``slots``,
            ``leaves_in_s``: what is left of a notice, and
            then everything that the agent remembers of its attempt follows as if it happened now), ``agent_lost``
            (``why``; ``silent``: nothing was closed; its time is that of the last sign of life), ``report`` (a rank's
            report with ``rank`` and ``attempt``; its kind is ``data["kind"]``), ``exit`` (``rank``, ``attempt``,
            ``pid``, ``code``, ``signal``, ``requested``: we had it killed, ``oom``: what speaks for it that the kernel
            did, ``log_tail``), ``spawned`` (``attempt``, ``ranks``), ``killed`` (``attempt``), ``dying`` (``attempt``,
            ``left``: what was killed and has not ended, rows of ``rank``, ``pid`` and ``state``; ``waited_s``),
            ``leaving`` (``reason``), ``notice`` (``reason``, ``within_s``: the node will be taken away after so many
            seconds), ``pool`` (``state``, ``reason``), ``stack`` (``rank``, ``attempt``, ``state``, ``stack``: where a
            rank stands, see :mod:`launcher.host.stacks`), ``holdings`` (``id``, ``address``, ``held``: what the node
            holds in memory, see :mod:`launcher.memory_tier`), ``fenced`` (``epoch``: who owns the agent now),
            ``cut_off`` (of no node: nothing is heard of any; ``patience_s``: for how long they are waited for).
        node: The node.
        time: When it happened, UTC seconds: by the agent's clock if the agent said it, else by ours.
        data: The facts.
        heard: When we heard of it, by the monotonic clock of the gang (seconds): it may be looked at later.
    """

    kind: ObservationKind
    node: str
    time: float
    data: dict[str, Any]
    heard: float = 0.0

    def saves(self, attempt: int) -> bool:
        """Whether a rank of the attempt says that it makes a checkpoint from now on."""
        told = self.kind == "report" and self.data.get("kind") == "step" and self.data.get("next") == "save"
        return told and int(self.data.get("attempt", attempt)) == attempt

    @property
    def routine(self) -> bool:
        """Whether it only says that a rank goes from a step to the next one."""
        data = self.data
        return self.kind == "report" and data.get("kind") == "step" and data.get("next", "step") == "step"


@dataclass(slots=True)
class Inbox:
    """Observations that :meth:`Gang.poll` has not returned yet.

    Attributes:
        wall: UTC seconds.
        clock: Monotonic seconds.
        items: What was seen, oldest first.
        urgent: One of them is no routine.
    """

    wall: Callable[[], float]
    clock: Callable[[], float]
    items: list[Observation] = field(default_factory=list)
    urgent: bool = False

    def add(self, kind: ObservationKind, node: str, data: dict[str, Any]) -> None:
        """Put one in; its time is that of the data, else now."""
        when = data["time"] if "time" in data else self.wall()
        seen = Observation(kind=kind, node=node, time=when, data=data, heard=self.clock())
        self.items.append(seen)
        self.urgent = self.urgent or not seen.routine

    def take(self) -> list[Observation]:
        """Take all out, oldest first."""
        taken, self.items, self.urgent = self.items, [], False
        return taken

"""A gang in one process that runs into a hang: what every rank has entered is written by the code that real ranks use.

Each rank has a programme of collectives, transfers and places where it reads a number. On processes (as with gloo) an
entry blocks until all have come. On devices (as with NCCL) it is put into a stream and returns, the stream goes on
when the streams of all are there, and the process waits for its stream where it reads.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from jobs.course import Entry, Progress, decode
from jobs.own_time import OwnTime
from strategies.plan import ParallelPlan
from strategies.topology import Topology

HANG = "hang"
READ = "read"


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One instruction.

    Attributes:
        kind: ``all``, ``send``, ``recv``, :data:`READ` or :data:`HANG`.
        group: Name of the group.
        ranks: The ranks of the group, or the peer.
        code: What kind of collective.
    """

    kind: str
    group: str = ""
    ranks: tuple[int, ...] = ()
    code: int = 0


Meeting = tuple[str, str, int, int, int]


class _Event:
    """An event of a device: it has come when the stream has passed it."""

    def __init__(self, stream: deque[object]) -> None:
        self._stream = stream
        self._token: object = None

    def record(self) -> None:
        self._token = object()
        self._stream.append(self._token)

    def query(self) -> bool:
        return self._token not in self._stream

    def synchronize(self) -> None:
        assert self.query(), "the programme reads before a step ends"

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class Rank:
    """One rank, its process and its device."""

    def __init__(self, rank: int, programme: list[Op], *, on_device: bool) -> None:
        self.rank = rank
        self.ahead = deque(programme)
        self.stream: deque[object] = deque()  # tokens of events, and meetings
        self.clock = OwnTime((lambda: _Event(self.stream)) if on_device else None)
        self.course = self.clock._course
        self.on_device = on_device
        self.at: Meeting | None = None  # of the process, where it blocks
        self.entries: list[Entry] = []

    def enter(self, op: Op) -> tuple[list[Entry], Meeting]:
        lane = self.course.lane(op.kind, op.group, op.ranks)  # type: ignore[arg-type]
        entry = self.course.enter(lane, op.code)
        if op.kind == "all":
            return [entry], ("all", op.group, -1, -1, entry[1])
        sender, receiver = (self.rank, op.ranks[0]) if op.kind == "send" else (op.ranks[0], self.rank)
        return [entry], ("p2p", op.group, sender, receiver, entry[1])

    def turn(self) -> bool:
        """Let the process do one thing; False when it cannot."""
        if not self.ahead or self.at is not None or self.ahead[0].kind == HANG:
            return False
        op = self.ahead[0]
        if op.kind == READ:
            if self.here is not None:
                return False
            self.clock.end()
            self.clock.begin(1)
        else:
            entries, meeting = self.enter(op)
            if self.on_device:
                self.clock.wait(lambda: self.stream.append(meeting), entries)
            else:
                self.course.wait(entries)
                self.at, self.entries = meeting, entries
        self.ahead.popleft()
        return True

    @property
    def here(self) -> Meeting | None:
        """Where this rank can be met."""
        if not self.on_device:
            return self.at
        while self.stream and not isinstance(self.stream[0], tuple):
            self.stream.popleft()
        return self.stream[0] if self.stream else None  # type: ignore[return-value]

    def met(self) -> None:
        """The meeting is over."""
        if self.on_device:
            self.stream.popleft()
        else:
            self.course.wait(())
            self.course.leave(self.entries)
            self.at = None

    def progress(self) -> Progress:
        self.clock.look()
        return decode(bytes(self.course._memory), time.monotonic_ns())


class ToyGang:
    """All ranks.

    Args:
        programmes: What each rank does.
        members: Of each group.
        on_device: Devices, not processes, communicate.
        broken: Two ranks whose link breaks after so many meetings: what both take part in never ends.
    """

    def __init__(
        self,
        programmes: Mapping[int, list[Op]],
        members: Mapping[str, tuple[int, ...]],
        *,
        on_device: bool,
        broken: tuple[int, int, int] | None = None,
    ) -> None:
        self.ranks = {rank: Rank(rank, ops, on_device=on_device) for rank, ops in programmes.items()}
        self._members = members
        self._broken = broken
        self._met = 0
        for rank in self.ranks.values():
            rank.clock.begin(1)

    def run(self) -> dict[int, Progress]:
        """Go on until nobody can, and say how far everybody has come."""
        while self._turn():
            pass
        return {number: rank.progress() for number, rank in self.ranks.items()}

    @property
    def done(self) -> bool:
        """Every programme has come to its end."""
        return not any(rank.ahead or rank.stream or rank.at for rank in self.ranks.values())

    def _turn(self) -> bool:
        moved = [rank.turn() for rank in self.ranks.values()]
        for meeting in {rank.here for rank in self.ranks.values()} - {None}:
            assert meeting is not None
            moved.append(self._meet(meeting))
        return any(moved)

    def _meet(self, meeting: Meeting) -> bool:
        kind, group, sender, receiver, _ = meeting
        expected = self._members[group] if kind == "all" else (sender, receiver)
        if any(self.ranks[rank].here != meeting for rank in expected):
            return False
        if self._broken is not None and self._met >= self._broken[2] and {*self._broken[:2]} <= {*expected}:
            return False
        self._met += 1
        for rank in expected:
            self.ranks[rank].met()
        return True


@functools.cache
def groups(plan: ParallelPlan) -> dict[str, tuple[int, ...]]:
    """Names and ranks of the groups of a plan."""
    topology, found = Topology(plan), {"world": tuple(range(plan.world_size))}
    places = {rank: topology.coordinates(rank) for rank in range(plan.world_size)}
    for rank, at in places.items():
        keys: dict[str, Callable[[int], bool]] = {
            f"tp{at.pipe}.{at.data}": lambda r, at=at: (places[r].pipe, places[r].data) == (at.pipe, at.data),  # type: ignore[misc]
            f"dp{at.pipe}.{at.model}": lambda r, at=at: (places[r].pipe, places[r].model) == (at.pipe, at.model),  # type: ignore[misc]
        }
        for name, inside in keys.items():
            found[name] = tuple(r for r in places if inside(r))
        assert rank in found[f"tp{at.pipe}.{at.data}"]
    return found


def programme(plan: ParallelPlan, rank: int, steps: int) -> list[Op]:
    """What a rank does in so many steps; every step reads its result."""
    return list(_step(plan, rank)) * steps


@functools.cache
def _step(plan: ParallelPlan, rank: int) -> tuple[Op, ...]:
    return tuple(_ops(plan, rank))


def _ops(plan: ParallelPlan, rank: int) -> Iterator[Op]:
    topology, members = Topology(plan), groups(plan)
    at = topology.coordinates(rank)
    stride = plan.world_size // plan.pp
    before, after = rank - stride, rank + stride
    tensor = Op(kind="all", group=f"tp{at.pipe}.{at.data}", ranks=members[f"tp{at.pipe}.{at.data}"])
    data = Op(kind="all", group=f"dp{at.pipe}.{at.model}", ranks=members[f"dp{at.pipe}.{at.model}"], code=1)
    layers = [tensor] * (2 + at.pipe) if plan.tp > 1 else []
    for source, target in ((before, after), (after, before)):  # forward, backward
        for _ in range(plan.grad_accum):
            if 0 <= source < plan.world_size:
                yield Op(kind="recv", group="world", ranks=(source,), code=2)
            yield from layers
            if 0 <= target < plan.world_size:
                yield Op(kind="send", group="world", ranks=(target,), code=3)
    if plan.dp > 1:
        yield from (data, data)
    yield Op(kind="all", group="world", ranks=members["world"])
    yield Op(kind=READ)

"""Who holds the gang up? Judged from how far every rank has come (:mod:`jobs.course`). Pure.

In synchronous training one rank that stands still makes all others wait. Where they wait says little: on devices a
collective returns at once, and a process waits wherever it happens to read a number. So this follows who waits for
whom: from a rank to what its process or its device is in, and from there to those who have not entered it. All these
ways end at the culprit: a rank that waits for nothing and does not come. If they end where everybody has come, a link
or a device is stuck, and if they end nowhere, ranks wait for each other; then the one that has gone another way than in
the step before has led them there. Where none of this is plain nobody is named: the node would be blamed for it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from jobs.course import Lane, Progress

_FRAME = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+|\?\?\?) in (?P<function>.+)')
_COMMUNICATION = re.compile(r"torch/distributed/|deepspeed/comm/|deepspeed/runtime/pipe/p2p|/multiprocessing/")
_UNSEEN = re.compile(r"torch/distributed/")
_STORAGE = re.compile(r"jobs/(checkpoint/|sample\.py)")
_INJECTED = re.compile(r"jobs/fault(s|_acts)\.py$")  # no accident has such frames, so they are no evidence
_INNERMOST = 8  # a collective is entered a few frames above the wait
_STOPPED = {
    "T": "is stopped by a signal",
    "t": "is held by a debugger",
    "Z": "is dead but not reaped",
    "": "has no process any more",
}
_IN_KERNEL = "stuck in the kernel (disk, driver)"

Meeting = tuple[str, str, int, int, int]  # kind, group, sender, receiver (-1 for collectives), number


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """Where one rank stands.

    Attributes:
        step: Last step that it has completed.
        state: The kernel's letter for its process (R, S, D, T, ...); "" when it is gone, ``?`` when nobody has said.
        stack: Frames, innermost first, one per line as faulthandler writes them; "" when it did not answer.
        progress: What it has entered; None when it is not known.
    """

    step: int
    state: str = ""
    stack: str = ""
    progress: Progress | None = None

    @property
    def frames(self) -> tuple[tuple[str, str], ...]:
        """(file, function) of every frame, innermost first, without those of an injected fault."""
        found = ((m["file"], m["function"]) for m in map(_FRAME.match, self.stack.splitlines()) if m)
        return tuple((file, function) for file, function in found if not _INJECTED.search(file))

    @property
    def communicates(self) -> bool:
        """Its process waits in a collective or a transfer."""
        return any(_COMMUNICATION.search(file) for file, _ in self.frames[:_INNERMOST])

    @property
    def stores(self) -> bool:
        """It writes or reads a checkpoint, on its own and not waiting for anybody."""
        return not self.communicates and any(_STORAGE.search(file) for file, _ in self.frames)


def culprit(standings: Mapping[int, Standing]) -> tuple[int, str]:
    """The rank that the others wait for, and why it is the one.

    Returns:
        (-1, why) when the evidence points at nobody.
    """
    found = _stopped(standings) or _silent(standings) or _waited_for(standings)
    stuck = [rank for rank, at in standings.items() if at.state == "D"]
    return (stuck[0], f"is {_IN_KERNEL}") if found[0] < 0 and len(stuck) == 1 else found


def late_at_the_start(standings: Mapping[int, Standing]) -> tuple[int, str]:
    """The rank that the others wait for before the first step, when little of what they enter is counted yet.

    Returns:
        (-1, why) when the evidence points at nobody.
    """
    rank, why = culprit(standings)
    apart = [one for one, at in standings.items() if at.stack and not at.communicates]
    if rank < 0 and len(apart) == 1 and len(standings) > 1 and all(at.stack for at in standings.values()):
        return apart[0], f"does not come to where the others wait: it is in {_top(standings[apart[0]])}"
    return rank, why


def _stopped(standings: Mapping[int, Standing]) -> tuple[int, str] | None:
    for rank, at in sorted(standings.items()):
        if at.state in _STOPPED:
            return rank, _STOPPED[at.state]
    return None


def _silent(standings: Mapping[int, Standing]) -> tuple[int, str] | None:
    """One of which nothing is known while all is known of the others."""
    silent = [rank for rank, at in standings.items() if not at.stack and at.progress is None]
    if len(silent) == 1 and len(standings) > 1:
        return silent[0], "does not say where it stands, and the others do"
    return None


def _waited_for(standings: Mapping[int, Standing]) -> tuple[int, str]:
    unknown = sum(at.progress is None for at in standings.values())
    if unknown:
        return -1, f"nobody can be named: it is not known what {unknown} of {len(standings)} ranks have entered"
    known = {rank: at.progress for rank, at in standings.items() if at.progress is not None}
    waits = _Waits.among(known)
    busy = waits.awaited - waits.waiting
    if len(busy) == 1 and waits.reach(busy) == waits.waiting and not waits.stuck:
        (rank,) = busy
        if any(_UNSEEN.search(file) for file, _ in standings[rank].frames[:_INNERMOST]):
            return -1, f"nobody can be named: rank {rank} is in a communication that is not counted"
        missed = waits.missed(rank)
        others = "1 other rank waits" if len(waits.waiting) == 1 else f"{len(waits.waiting)} other ranks wait"
        return rank, f"does not come to what {others} for, {missed}: it is in {_top(standings[rank])}"
    return _astray(known) or (-1, _nobody(waits, busy))


def _astray(known: Mapping[int, Progress]) -> tuple[int, str] | None:
    """The one that has gone another way than in the step before."""
    astray = [(rank, at.astray) for rank, at in known.items() if at.astray]
    if len(astray) != 1:
        return None
    rank, why = astray[0]
    return rank, f"is in a collective or transfer out of turn: {why}"


def _nobody(waits: _Waits, busy: frozenset[int]) -> str:
    if len(busy) > 1:
        told = ", ".join(map(str, sorted(busy)))
        return f"nobody can be named: ranks {told} do not come to what others wait for"
    if busy or not waits.waiting:
        return "nobody can be named: what the ranks wait for does not lead to one of them"
    if waits.stuck:
        return "all ranks have come to what they wait in: a link or a device, not a process, is stuck"
    return "ranks wait for each other, and none has gone another way than in the step before"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waits:
    """Who waits for whom.

    Attributes:
        at: What each rank that waits is in.
        missing: Who has not come to each of these.
        lanes: Of a rank that is in it, for people.
    """

    at: dict[int, tuple[Meeting, ...]] = field(default_factory=dict)
    missing: dict[Meeting, frozenset[int]] = field(default_factory=dict)
    lanes: dict[Meeting, Lane] = field(default_factory=dict)

    @classmethod
    def among(cls, known: Mapping[int, Progress]) -> _Waits:
        """Read it from what all ranks have entered."""
        found = cls()
        lanes = {rank: {_place(rank, lane): lane for lane in at.lanes} for rank, at in known.items()}
        for rank, at in known.items():
            meetings = [(_meeting(rank, at.lanes[index], number), at.lanes[index]) for index, number in at.waits]
            if meetings:
                found.at[rank] = tuple(meeting for meeting, _ in meetings)
                found.lanes.update(meetings)
        for meeting, lane in found.lanes.items():
            expected = lane.members if meeting[0] == "all" else meeting[2:4]
            absent = (rank for rank in known.keys() & {*expected} if not found._has_come(rank, meeting, known, lanes))
            found.missing[meeting] = frozenset(absent)
        return found

    def _has_come(
        self,
        rank: int,
        meeting: Meeting,
        known: Mapping[int, Progress],
        lanes: Mapping[int, Mapping[tuple[str, str, int], Lane]],
    ) -> bool:
        """Whether a rank, or its device where it has one, has come to what others are in."""
        if meeting in self.at.get(rank, ()):
            return True
        kind, group, sender, receiver, number = meeting
        place = (kind, group, receiver)
        if kind == "send" and rank == receiver:
            place = ("recv", group, sender)
        lane = lanes.get(rank, {}).get(place)
        if lane is None or lane.entered < number:
            return False
        return lane.left >= number or not known[rank].device  # begun by a process; a device is before it

    @property
    def waiting(self) -> frozenset[int]:
        """Ranks that wait."""
        return frozenset(self.at)

    @property
    def awaited(self) -> frozenset[int]:
        """Ranks that others wait for."""
        return frozenset().union(*self.missing.values())

    @property
    def stuck(self) -> bool:
        """Some rank is in what all have come to."""
        return any(not any(self.missing[meeting] for meeting in meetings) for meetings in self.at.values())

    def reach(self, ends: frozenset[int]) -> frozenset[int]:
        """Ranks whose waiting leads to one of ``ends``."""
        missed: dict[int, list[Meeting]] = defaultdict(list)
        there: dict[Meeting, list[int]] = defaultdict(list)
        for meeting, missing in self.missing.items():
            for rank in missing:
                missed[rank].append(meeting)
        for rank, meetings in self.at.items():
            for meeting in meetings:
                there[meeting].append(rank)
        reached: set[int] = set()
        ahead = list(ends)
        while ahead:
            for meeting in missed.pop(ahead.pop(), ()):
                fresh = set(there.pop(meeting, ())) - reached
                reached |= fresh
                ahead += fresh
        return frozenset(reached)

    def missed(self, rank: int) -> str:
        """What a rank does not come to, for people."""
        meeting = next(one for one, missing in self.missing.items() if rank in missing)
        kind, _, sender, receiver, number = meeting
        if kind == "send":
            return f"transfer {number} from rank {sender} to rank {receiver}"
        return f"collective {number} of {self.lanes[meeting]}"


def _place(rank: int, lane: Lane) -> tuple[str, str, int]:
    return lane.kind, lane.group, -1 if lane.kind == "all" else lane.ranks[0][0]


def _meeting(rank: int, lane: Lane, number: int) -> Meeting:
    """The name of an entry, the same for all who take part in it."""
    if lane.kind == "all":
        return "all", lane.group, -1, -1, number
    peer = lane.ranks[0][0]
    sender, receiver = (rank, peer) if lane.kind == "send" else (peer, rank)
    return "send", lane.group, sender, receiver, number


def _top(at: Standing) -> str:
    file, function = at.frames[0] if at.frames else ("", "an unknown place")
    where = f"{function} ({file.rsplit('/', 1)[-1]})" if file else function
    return f"{where}, {_IN_KERNEL}" if at.state == "D" else where

"""How far a rank has come in every group that it communicates with. Pure.

A hang is judged by this: the rank that the others wait for is the one that has not entered what they are in. A rank
keeps it in a piece of memory of its own, which its agent finds by name and reads without the rank's help: one that is
stopped or holds the interpreter's lock cannot answer. An entry costs a rank about two microseconds.

A *lane* is a group of ranks and what is done in it: collectives (``all``), or transfers to or from one other rank
(``send``, ``recv``). Ranks enter the entries of a lane in one order, so numbers identify them: the third transfer that
rank 0 sends to rank 2 is the third that rank 2 receives from rank 0.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

NAME = "phalanx-course"
LANES = 512
TRACE = 1 << 14  # entries of a step that are remembered
BEAT_S = 0.5  # how often a device is looked at
STALE_S = 4 * BEAT_S  # one that was not looked at for so long: the rank runs no Python code
_OPERATIONS = 32
_TEXT_BYTES = 1 << 16
_AT_ONCE = 8  # operations of one call
_MAGIC = 0x70686C78_00000001
_WORDS = struct.Struct(
    "<8Q"
)  # magic, bytes of text, beat (ns), current half of the trace, ops waited for by host, device
_WAITS = struct.Struct("<" + "QQ" * _AT_ONCE)
_HALF = struct.Struct("<4Q")  # micro-batches, entries, whether the step is over, unused
_HOST_AT = _WORDS.size
_DEVICE_AT = _HOST_AT + _WAITS.size
_COUNTS_AT = _DEVICE_AT + _WAITS.size
_TEXT_AT = _COUNTS_AT + LANES * 16
_TRACE_AT = _TEXT_AT + _TEXT_BYTES
_HALF_BYTES = _HALF.size + 2 * TRACE
SIZE = _TRACE_AT + 2 * _HALF_BYTES

Kind = Literal["all", "send", "recv"]
Entry = tuple[int, int]  # lane, and the number of the entry in it, from 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """One lane of one rank.

    Attributes:
        kind: Collectives, or transfers to or from a peer.
        group: Name of the process group, the same on all its ranks.
        ranks: The ranks of the group, or the peer, as runs: first, last, stride.
        entered: Entries that the rank has begun.
        left: Entries that are over for it.
    """

    kind: Kind
    group: str
    ranks: tuple[tuple[int, int, int], ...]
    entered: int = 0
    left: int = 0

    @property
    def members(self) -> Iterator[int]:
        """The ranks."""
        return (rank for first, last, stride in self.ranks for rank in range(first, last + 1, stride))

    def __str__(self) -> str:
        if self.kind == "all":
            return f"ranks {_told(self.ranks)}"
        return f"rank {self.ranks[0][0]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far one rank has come.

    Attributes:
        lanes: All it has entered.
        waits: What it waits in now: lane (its index) and number of the entry; empty when it waits in nothing.
        device: There is a device, and what is over and waited for is said of it, whatever the process does.
        astray: How what it has entered in this step departs from the step before; "" where it does not, and where
            that says nothing: the first step, another number of micro-batches.
    """

    lanes: tuple[Lane, ...] = ()
    waits: tuple[Entry, ...] = ()
    device: bool = False
    astray: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the wire, and for people."""
        lanes = [[lane.kind, lane.group, lane.ranks, lane.entered, lane.left] for lane in self.lanes]
        return {"lanes": lanes, "waits": self.waits, "device": self.device, "astray": self.astray}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Progress:
        """The inverse.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        lanes = tuple(
            Lane(kind=kind, group=group, ranks=tuple((a, b, c) for a, b, c in ranks), entered=entered, left=left)
            for kind, group, ranks, entered, left in data["lanes"]
        )
        waits = tuple((lane, number) for lane, number in data["waits"])
        if any(not 0 <= lane < len(lanes) for lane, _ in waits):
            raise ValueError("a rank waits in a lane that it does not have")
        return cls(lanes=lanes, waits=waits, device=bool(data["device"]), astray=str(data["astray"]))


class Course:
    """The rank's side.

    Args:
        device: Something else than the process says what the device waits for, and calls :meth:`beat`.
    """

    def __init__(self, *, device: bool = False) -> None:
        memory = _shared()
        self._memory = memoryview(memory)
        self._counts = self._memory[_COUNTS_AT:_TEXT_AT].cast("Q")
        self._words = self._memory[: _WORDS.size].cast("Q")
        self._by_host = self._memory[_HOST_AT:_DEVICE_AT].cast("Q")
        self._by_device = self._memory[_DEVICE_AT:_COUNTS_AT].cast("Q")
        halves = [self._memory[_TRACE_AT + i * _HALF_BYTES :][:_HALF_BYTES] for i in range(2)]
        self._heads = [half[: _HALF.size].cast("Q") for half in halves]
        self._traces = [half[_HALF.size :].cast("H") for half in halves]
        self._lanes: dict[tuple[str, str, int], int] = {}
        self._half, self._tracing = 0, False
        self._words[0] = _MAGIC
        if device:
            self.beat()

    def lane(self, kind: Kind, group: str, ranks: Sequence[int]) -> int:
        """Index of a lane; -1 when there is no room for another.

        Args:
            kind: See :class:`Lane`.
            group: Name of the process group.
            ranks: The ranks of the group in ascending order, or the peer alone.
        """
        key = (kind, group, -1 if kind == "all" else ranks[0])
        if key not in self._lanes:
            text = json.dumps([kind, group, runs(ranks)]).encode() + b"\n"
            used = self._words[1]
            if len(self._lanes) >= LANES or used + len(text) > _TEXT_BYTES:
                return -1
            self._memory[_TEXT_AT + used : _TEXT_AT + used + len(text)] = text
            self._words[1] = used + len(text)
            self._lanes[key] = len(self._lanes)
        return self._lanes[key]

    def enter(self, lane: int, operation: int) -> Entry:
        """An entry of a lane begins; ``operation`` (below 32) says what it is."""
        number = self._counts[2 * lane] + 1
        self._counts[2 * lane] = number
        if self._tracing:
            head = self._heads[self._half]
            if head[1] < TRACE:
                self._traces[self._half][head[1]] = lane * _OPERATIONS + operation
                head[1] += 1
        return lane, number

    def leave(self, entries: Iterable[Entry]) -> None:
        """Entries are over, and all before them in their lanes."""
        for lane, number in entries:
            if number > self._counts[2 * lane + 1]:
                self._counts[2 * lane + 1] = number

    def wait(self, entries: Sequence[Entry]) -> None:
        """The process waits in entries; in none when there are none."""
        self._words[4] = 0
        if entries:
            self._words[4] = _put(self._by_host, entries)

    def wait_on_device(self, entries: Sequence[Entry]) -> None:
        """The device waits in entries; in none when there are none."""
        self._words[5] = 0
        self._words[5] = _put(self._by_device, entries)
        self.beat()

    def beat(self) -> None:
        """The device was looked at."""
        self._words[2] = time.monotonic_ns()

    def begin(self, micro_batches: int) -> None:
        """A step of so many micro-batches begins."""
        if self._heads[self._half][2]:  # over: it is the one to compare with
            self._half = 1 - self._half
        head = self._heads[self._half]
        head[0], head[1], head[2] = micro_batches, 0, 0
        self._words[3] = self._half
        self._tracing = True

    def end(self) -> None:
        """It ends; what is entered between steps is not compared."""
        self._heads[self._half][2] = 1
        self._tracing = False
        now, before = self._half, 1 - self._half
        same_size = self._heads[before][2] and self._heads[before][0] == self._heads[now][0]
        self._words[6] = int(bool(same_size) and self._entered(now) != self._entered(before))

    def _entered(self, half: int) -> memoryview:
        at = _TRACE_AT + half * _HALF_BYTES + _HALF.size
        return self._memory[at : at + 2 * self._heads[half][1]]


def _put(where: memoryview, entries: Sequence[Entry]) -> int:
    """Write entries down, as many as there is room for; returns how many."""
    at = 0
    for entry in entries[:_AT_ONCE]:
        where[at], where[at + 1] = entry
        at += 2
    return at // 2


def _shared() -> mmap.mmap | bytearray:
    """Memory that the agent finds; without it all else works."""
    try:
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE)
        return mmap.mmap(fd, SIZE)
    except OSError:
        return bytearray(SIZE)


def progress_of(pid: int) -> Progress | None:
    """How far a rank has come, by its process; None when it keeps no course, or none can be read."""
    with contextlib.suppress(OSError, ValueError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{name}"
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(path).startswith(f"/memfd:{NAME}"):
                    with open(path, "rb", buffering=0) as file:
                        return decode(file.read(SIZE), time.monotonic_ns())
    return None


def decode(data: bytes, now_ns: int) -> Progress:
    """Read what a rank has written, at a moment of the node's monotonic clock.

    Raises:
        ValueError: It is not that.
    """
    if len(data) != SIZE:
        raise ValueError(f"the course of a rank has {SIZE} bytes, not {len(data)}")
    magic, used, beat_ns, half, by_host, by_device, astray, _ = _WORDS.unpack_from(data)
    if magic != _MAGIC or used > _TEXT_BYTES or half > 1:
        raise ValueError("this is not the course of a rank")
    texts = data[_TEXT_AT : _TEXT_AT + used].splitlines()
    counts = struct.unpack_from(f"<{2 * len(texts)}Q", data, _COUNTS_AT)
    lanes = tuple(_lane(text, *counts[2 * i : 2 * i + 2]) for i, text in enumerate(texts))
    device = bool(beat_ns) and now_ns - beat_ns <= STALE_S * 1e9  # else what is said of it may be long over
    at, count = (_DEVICE_AT, by_device) if device and by_device else (_HOST_AT, by_host)
    words = _WAITS.unpack_from(data, at)[: 2 * min(count, _AT_ONCE)]
    waits = tuple((lane, number) for lane, number in zip(words[::2], words[1::2], strict=True) if lane < len(lanes))
    told = "it entered other things in the step before than in the one before that" if astray else ""
    return Progress(lanes=lanes, waits=waits, device=device, astray=told or _astray(data, half, lanes))


def _lane(text: bytes, entered: int, left: int) -> Lane:
    kind, group, ranks = json.loads(text)
    return Lane(kind=kind, group=group, ranks=tuple((a, b, c) for a, b, c in ranks), entered=entered, left=left)


def _astray(data: bytes, half: int, lanes: Sequence[Lane]) -> str:
    now, before = (_trace(data, which) for which in (half, 1 - half))
    if not before.over or now.micro_batches != before.micro_batches:
        return ""
    for number, (here, there) in enumerate(zip(now.entries, before.entries, strict=False), 1):
        if here // _OPERATIONS == there // _OPERATIONS and here != there:
            return f"entry {number} of its step is another operation with {_of(here, lanes)} than in the step before"
        if here != there:
            return f"entry {number} of its step is with {_of(here, lanes)}, in the step before with {_of(there, lanes)}"
    if len(now.entries) > len(before.entries) < TRACE:
        return f"it has entered {len(now.entries)} things in its step, {len(before.entries)} in the step before"
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trace:
    """What was entered in a step, in order."""

    micro_batches: int
    entries: tuple[int, ...]
    over: bool


def _trace(data: bytes, half: int) -> _Trace:
    at = _TRACE_AT + half * _HALF_BYTES
    micro_batches, count, over, _ = _HALF.unpack_from(data, at)
    entries = struct.unpack_from(f"<{min(count, TRACE)}H", data, at + _HALF.size)
    return _Trace(micro_batches=micro_batches, entries=entries, over=bool(over))


def _of(entry: int, lanes: Sequence[Lane]) -> str:
    lane = entry // _OPERATIONS
    return f"{lanes[lane]} (group {lanes[lane].group})" if lane < len(lanes) else "others"


def runs(ranks: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Ascending ranks as few runs: first, last, stride."""
    result: list[tuple[int, int, int]] = []
    for rank in ranks:
        if result:
            first, last, stride = result[-1]
            if first == last or rank - last == stride:
                result[-1] = (first, rank, rank - last)
                continue
        result.append((rank, rank, 1))
    return tuple(result)


def _told(ranks: Sequence[tuple[int, int, int]]) -> str:
    """Runs, for people."""
    words = []
    for first, last, stride in ranks:
        if first == last:
            words.append(f"{first}")
        elif last == first + stride:
            words.append(f"{first}, {last}")
        else:
            words.append(f"{first} to {last}" + (f" in steps of {stride}" if stride > 1 else ""))
    return ", ".join(words)

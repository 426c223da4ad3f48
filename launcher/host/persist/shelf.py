"""What a node holds in memory: the newest generations of its own ranks, and replicas of others'.

A *stream* is all that one rank of one attempt hands in. Of each stream the two newest sealed parts stay, and a third
buffer is being filled; a part that is being written to disk or sent elsewhere is never overwritten. What an earlier
attempt left stays until the present one has sealed its third generation on some rank here: by then every rank has
sealed its first, and the replica of it is where it belongs (a rank begins to copy a step only once the replica of the
step before has been confirmed).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jobs.checkpoint.image import Image, image_of
from jobs.checkpoint.layout import Token
from jobs.checkpoint.memory import Generation, Holding, StreamInfo
from launcher.host.persist.buffers import Buffer

_KEPT = 2
_PROVEN = 3  # this many sealed generations of an attempt make those of earlier attempts superfluous


@dataclass(slots=True, eq=False)
class Held:
    """One part: being filled, or sealed.

    Attributes:
        stream: What it belongs to.
        buffer: Its data.
        step: Step of the state; 0 until it is sealed.
        record: What goes with the data: rank state, trainer state, extra.
        pins: How many are busy with it.
    """

    stream: Stream
    buffer: Buffer
    step: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    pins: int = 0

    @property
    def sealed(self) -> bool:
        """Whether it is whole."""
        return self.step > 0

    @property
    def holding(self) -> Holding:
        """What the controller is told of it."""
        info = self.stream.info
        return Holding(
            step=self.step,
            epoch=info.epoch,
            attempt=info.attempt,
            rank=info.rank,
            world=info.world,
            bytes=self.buffer.size,
            own=self.stream.own,
            skips=info.skips,
        )


@dataclass(slots=True, eq=False)
class Stream:
    """All that one rank of one attempt hands in.

    Attributes:
        info: What is the same for all of it.
        image: Layout of its buffers.
        own: The rank is on this node; a replica otherwise.
        most: Buffers beside those that are being written to disk or sent.
        parts: Oldest first; the last may be unsealed.
        free: Buffers that wait for the next part.
        seals: How many parts were sealed.
    """

    info: StreamInfo
    image: Image
    own: bool
    most: int
    parts: list[Held] = field(default_factory=list)
    free: list[Buffer] = field(default_factory=list)
    seals: int = 0


class Shelf:
    """Every stream of this node. Safe for any number of threads."""

    def __init__(self) -> None:
        self.changed = threading.Condition()  # reentrant
        self.toil_s = 0.0
        """Seconds of a core that replicas have taken so far, sent and received."""
        self._streams: list[Stream] = []
        self._spare: list[Buffer] = []

    @contextmanager
    def toiling(self) -> Iterator[None]:
        """What this thread does meanwhile is for replicas."""
        begin = time.thread_time()
        try:
            yield
        finally:
            with self.changed:
                self.toil_s += time.thread_time() - begin

    def open(self, info: StreamInfo, *, own: bool, in_memory: bool, restored: Generation | None) -> Stream:
        """Begin a stream.

        Args:
            info: What it is.
            own: Whether its rank is on this node.
            in_memory: Generations are kept for their own sake; otherwise a buffer is only on its way to the disk.
            restored: What the attempt has been restored from: all else that earlier attempts left is superfluous.
                None leaves it alone (replicas).
        """
        image = image_of(info.image)
        stream = Stream(info, image, own, _KEPT + 1 if in_memory else _KEPT)
        with self.changed:
            if own:
                self._drop_older(info.token, restored)
            self._drop([one for one in self._streams if _key(one) == _key(stream)])
            fitting = [buffer for buffer in self._spare if buffer.size == image.bytes]
            stream.free = fitting[: stream.most]
            self._spare = [buffer for buffer in self._spare if buffer not in stream.free]
            self._streams.append(stream)
        while own and len(stream.free) < stream.most:
            buffer = Buffer(image.bytes)
            buffer.fault_in()
            stream.free.append(buffer)
        return stream

    def _drop_older(self, token: Token, restored: Generation | None) -> None:
        """Parts of earlier attempts but for what was restored; those that are pinned go later."""
        for stream in [one for one in self._streams if one.info.token < token]:
            kept = [p for p in stream.parts if p.pins or (restored and (p.step, stream.info.token) == restored)]
            self._spare += [part.buffer for part in stream.parts if part not in kept] + stream.free
            stream.parts, stream.free = kept, []
            if not kept:
                self._streams.remove(stream)

    def _drop(self, streams: list[Stream]) -> None:
        for stream in streams:
            self._spare += [part.buffer for part in stream.parts if not part.pins] + stream.free
            stream.parts, stream.free = [], []
            self._streams.remove(stream)

    @contextmanager
    def filling(self, stream: Stream) -> Iterator[Held]:
        """A buffer for the next part, discarded unless it is sealed.

        It is pinned: who fills it from a connection that is dead, and does not know, must not find it in other hands,
        also when the stream has been dropped for one that began after it.
        """
        held = self.begin(stream, pins=1)
        try:
            yield held
        finally:
            self.unpin(held)
            self.discard(held)

    def begin(self, stream: Stream, *, pins: int = 0) -> Held:
        """A buffer for the next part; what was in it is gone. Waits while every buffer is busy."""
        with self.changed:
            buffer = self._room(stream)
            while buffer is None:
                self.changed.wait()
                buffer = self._room(stream)
            held = Held(stream, buffer, pins=pins)
            stream.parts.append(held)
        buffer.wait()
        return held

    def _room(self, stream: Stream) -> Buffer | None:
        for part in [part for part in stream.parts if not part.sealed and not part.pins]:  # its writer is gone
            stream.parts.remove(part)
            stream.free.append(part.buffer)
        if stream.free:
            return stream.free.pop()
        old = stream.parts[:-_KEPT] if stream.most > _KEPT else stream.parts[:-1]
        for part in old:
            if not part.pins:
                stream.parts.remove(part)
                return part.buffer
        if len(stream.parts) <= stream.most:  # one more than usual while the disk is being written
            return Buffer(stream.image.bytes)
        return None

    def seal(self, held: Held, step: int, record: dict[str, Any]) -> None:
        """The part is whole."""
        with self.changed:
            held.record, held.step = record, step
            held.stream.seals += 1
            if held.stream.own and held.stream.seals == 1:
                self._give_back(held.stream.info.token)
            if held.stream.seals == _PROVEN:
                self._forget_before(held.stream.info.token)
            self.changed.notify_all()

    def _give_back(self, token: Token) -> None:
        """Close spare buffers of a size that no rank here has now. All of them have begun: one has made a step."""
        sizes = {stream.image.bytes for stream in self._streams if stream.info.token == token}
        for buffer in [buffer for buffer in self._spare if buffer.size not in sizes]:
            self._spare.remove(buffer)
            buffer.close()

    def _forget_before(self, token: Token) -> None:
        self._drop([one for one in self._streams if one.info.token < token])
        for buffer in self._spare:
            buffer.close()
        self._spare.clear()

    def discard(self, held: Held) -> None:
        """The part will not be whole: its writer is gone. Does nothing to one that is sealed."""
        with self.changed:
            if held in held.stream.parts and not held.sealed:
                held.stream.parts.remove(held)
                held.stream.free.append(held.buffer)
                self.changed.notify_all()

    def pin(self, held: Held) -> None:
        """Nobody overwrites the part until :meth:`unpin`."""
        with self.changed:
            held.pins += 1

    def unpin(self, held: Held) -> None:
        """The counterpart of :meth:`pin`."""
        with self.changed:
            held.pins -= 1
            if not held.pins and held not in held.stream.parts:
                held.buffer.close()  # its stream was dropped meanwhile
            self.changed.notify_all()

    @contextmanager
    def pinned(self, held: Held) -> Iterator[Held]:
        """Nobody overwrites the part meanwhile."""
        self.pin(held)
        try:
            yield held
        finally:
            self.unpin(held)

    def find(self, generation: Generation, rank: int) -> Held | None:
        """The sealed part of a rank, its own or a replica."""
        with self.changed:
            for stream in self._streams:
                if stream.info.rank == rank and stream.info.token == generation.token:
                    for part in stream.parts:
                        if part.step == generation.step:
                            return part
        return None

    def holdings(self) -> list[Holding]:
        """All sealed parts."""
        with self.changed:
            return [part.holding for stream in self._streams for part in stream.parts if part.sealed]


def _key(stream: Stream) -> tuple[Token, int, bool]:
    return stream.info.token, stream.info.rank, stream.own

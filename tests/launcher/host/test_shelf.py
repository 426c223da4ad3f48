"""What a persister holds, without its process: who may write into which memory, and how much of it there is."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs import frames
from jobs.checkpoint.image import Image
from jobs.checkpoint.layout import Token
from jobs.checkpoint.memory import Generation, StreamInfo
from jobs.checkpoint.slices import whole
from jobs.frames import FrameError
from jobs.location import locate
from launcher.host.persist import buffers, peering, shelf
from launcher.host.persist.buffers import Buffer
from launcher.host.persist.flush import Flusher
from launcher.host.persist.peering import checksum
from launcher.host.persist.service import Guests
from launcher.host.persist.shelf import Shelf, Stream
from strategies.codec import to_json
from tests.support.persisters import eventually

ELEMENTS = 1 << 14


def info_of(*, attempt: int = 1, rank: int = 0, elements: int = ELEMENTS) -> StreamInfo:
    image = Image(slices=(whole("w", (elements,)),))
    return StreamInfo(epoch=1, attempt=attempt, rank=rank, world=2, image=tuple(image.rows()), about={})


def put(held: Shelf, stream: Stream, step: int) -> None:
    held.seal(held.begin(stream), step, {})


@contextmanager
def collected(errors: list[FrameError]) -> Iterator[None]:
    try:
        yield
    except FrameError as error:
        errors.append(error)


class Sender:
    """A connection that brings replicas, and the thread at its other end."""

    def __init__(self, guests: Guests, steps: Sequence[int]) -> None:
        self.sock, other = socket.socketpair()
        self.failed: list[FrameError] = []
        self._guests = guests
        self._thread = threading.Thread(target=self._serve, args=(other, steps), daemon=True)
        self._thread.start()

    def _serve(self, sock: socket.socket, steps: Sequence[int]) -> None:
        with sock, collected(self.failed):
            self._guests.handle({"op": "stream", "info": to_json(info_of())}, sock)
            for step in steps:
                question = {"op": "replica", "token": Token(1, 1), "rank": 0, "step": step, "record": {}}
                self._guests.handle(question | {"payload": 12 * ELEMENTS}, sock)

    def bring(self, step: int) -> None:
        data = bytes([step]) * (12 * ELEMENTS)
        self.sock.sendall(data)
        frames.send(self.sock, {"checksum": checksum(data)})

    def join(self) -> None:
        """Wait for the other end, and close this one."""
        self._thread.join(10)
        self.sock.close()
        assert not self._thread.is_alive()


def guests_of(held: Shelf, folder: Path) -> Guests:
    return Guests(held, Flusher(held, locate(str(folder)), lambda token, message: None))


def test_a_dead_connection_writes_into_nothing_that_others_have(tmp_path: Path) -> None:
    """A link falls silent in the middle of a replica; its sender connects anew; then the rest of the old comes."""
    held = Shelf()
    guests = guests_of(held, tmp_path)
    old = Sender(guests, [1])
    old.sock.sendall(b"\x11" * 100)
    assert eventually(lambda: any(stream.parts for stream in held._streams))
    new = Sender(guests, [4, 5, 6])
    for step in (4, 5, 6):
        new.bring(step)
    new.join()
    old.sock.sendall(b"\xee" * 5000)
    old.sock.close()
    old.join()
    assert len(old.failed) == 1
    assert sorted(one.step for one in held.holdings()) == [4, 5, 6]
    for step in (4, 5, 6):
        part = held.find(Generation(step, Token(1, 1)), 0)
        assert part is not None
        assert set(bytes(part.buffer.view)) == {step}


def test_a_connection_that_falls_silent_in_a_replica_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peering, "PATIENCE_S", 0.05)
    held = Shelf()
    sender = Sender(guests_of(held, tmp_path), [1])
    sender.sock.sendall(b"\x11" * 100)
    sender.join()
    assert [str(error) for error in sender.failed] == ["TimeoutError"]
    (stream,) = held._streams
    assert (stream.parts, len(stream.free)) == ([], 1)


def test_a_replica_that_breaks_off_leaves_its_buffer_to_the_next(tmp_path: Path) -> None:
    held = Shelf()
    first = Sender(guests_of(held, tmp_path), [1, 2])
    first.bring(1)
    first.sock.sendall(b"\x11" * 100)
    first.sock.close()
    first.join()
    (stream,) = held._streams
    assert [(part.step, part.pins) for part in stream.parts] == [(1, 0)]
    assert len(stream.free) == 1


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Size of every buffer that has not been closed, by its number."""
    sizes: dict[int, int] = {}

    class Counted(Buffer):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            sizes[self.number] = size

        def close(self) -> None:
            super().close()
            del sizes[self.number]

    monkeypatch.setattr(shelf, "Buffer", Counted)
    return sizes


@pytest.mark.parametrize("elements", [ELEMENTS * 3 // 2, ELEMENTS // 2])
def test_buffers_that_fit_no_more_go_with_the_first_copy(alive: dict[int, int], elements: int) -> None:
    """After a shrink or a growth a node must not hold more than was checked: the old ones are of no use."""
    held = Shelf()
    own = held.open(info_of(), own=True, in_memory=True, restored=None)
    replica = held.open(info_of(rank=1), own=False, in_memory=True, restored=None)
    for step in range(1, 7):
        put(held, own, step)
        put(held, replica, step)
    assert len(alive) == 6
    later = info_of(attempt=2, elements=elements)
    own = held.open(later, own=True, in_memory=True, restored=Generation(6, Token(1, 1)))
    put(held, own, 7)
    kept = [size for size in alive.values() if size == 12 * ELEMENTS]
    assert len(kept) == 2, "what was restored, and nothing else"
    assert len(alive) == 2 + 3


def test_buffers_that_fit_are_used_again(alive: dict[int, int]) -> None:
    held = Shelf()
    own = held.open(info_of(), own=True, in_memory=True, restored=None)
    for step in range(1, 4):
        put(held, own, step)
    before = set(alive)
    own = held.open(info_of(attempt=2), own=True, in_memory=True, restored=None)
    for step in range(1, 4):
        put(held, own, step)
    assert set(alive) == before


def test_a_buffer_that_is_closed_early_is_not_filled_through_its_old_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of a closed descriptor is the next file's, maybe a shard's."""
    real: Callable[[int, bytes, int], int] = os.pwrite
    at_work, go = threading.Event(), threading.Event()

    def late(fd: int, data: bytes, offset: int) -> int:
        at_work.set()
        assert go.wait(10)
        return real(fd, data, offset)

    monkeypatch.setattr(buffers, "_ZEROS", bytes(4096))
    monkeypatch.setattr(os, "pwrite", late)
    buffer = Buffer(1 << 20)
    number = buffer.fd
    buffer.fault_in()
    assert at_work.wait(10)
    buffer.close()
    shard = os.open(tmp_path / "shard", os.O_CREAT | os.O_WRONLY)
    if shard != number:  # a smaller one was free
        os.dup2(shard, number)
        os.close(shard)
        shard = number
    try:
        go.set()
        buffer.wait()
        assert os.fstat(shard).st_size == 0
    finally:
        os.close(shard)

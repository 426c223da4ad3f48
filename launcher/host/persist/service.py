"""What a rank asks of the persister of its node, one connection per rank.

``hello``    where this persister listens for others, and why it has no room for generations of the node's ``share``
``open``     begin a stream: ``info``, ``peers`` (every rank's persister), ``in_memory``, ``replica``, ``restored``,
             ``keep``; answers ``toil_s`` as ``settle`` does, most of which was for earlier streams
``begin``    a buffer to copy into; waits until the replica of the part before is confirmed
``seal``     the buffer is full: ``step``, ``record`` (its ``rank_state`` only if it is another than before), and with
             ``flush`` it goes to the disk, too (``base``: the last checkpoint there, whose data are not written again
             where they have not changed; ``again``: what was written of it before failed and counts for nothing)
``settle``   wait until the replica of the newest part is confirmed, or will not be: ``broken`` says why not; and what
             replicas have taken of the cores of this node so far (``toil_s``)
``durable``  wait until this rank's part is on the disk; ``release`` lets the commit go on (after ``hold``)
``outcome``  rank 0: what became of the checkpoint of ``step``, once; waits ``wait_s`` for that, null for ever
``part``     a part of a generation to restore: its record, and the descriptor if it lies here
``read``     bytes of a part that lies elsewhere
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from jobs import frames
from jobs.cgroup import usable_memory
from jobs.checkpoint.layout import Token
from jobs.checkpoint.memory import Address, Generation, StreamInfo
from jobs.frames import FrameError, Garbled, Message, Payload
from launcher.host.persist.flush import Flusher, Writing
from launcher.host.persist.peering import PeerLink, pull
from launcher.host.persist.replica import Replicator
from launcher.host.persist.shelf import Held, Shelf, Stream
from strategies.codec import from_json, to_json
from strategies.failures import GENERATIONS, HOST_SHARE

_ATTEMPTS = 4


class Directory:
    """The persisters of the ranks of each attempt, and links to those that have been talked to.

    Args:
        secret: The run's secret.
    """

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self._lock = threading.Lock()
        self._links: dict[Address, PeerLink] = {}
        self._of: dict[Token, list[Address]] = {}

    def learn(self, token: Token, peers: Sequence[Address]) -> None:
        """The persisters of an attempt, in the order of its ranks."""
        with self._lock:
            known = self._of | {token: list(peers)}  # an earlier attempt may still be on its way to the disk
            self._of = {one: known[one] for one in sorted(known)[-_ATTEMPTS:]}

    def coordinator(self, token: Token) -> Address | None:
        """The persister of rank 0's node; None for an attempt that was replaced long ago."""
        with self._lock:
            where = self._of.get(token)
        return where[0] if where else None

    def is_newest(self, token: Token) -> bool:
        """Whether no later attempt is known here."""
        with self._lock:
            return token == max(self._of, default=token)

    def ask(self, address: Address, message: Message) -> tuple[Message, bytes]:
        """Ask another persister; a link that has broken is made anew, once. Raises FrameError."""
        with self._lock:
            link = self._links.get(address)
        if link is not None:
            with contextlib.suppress(FrameError):
                return link.ask(message)
            link.close()
        link = PeerLink(self.secret, address)
        with self._lock:
            self._links[address] = link
        return link.ask(message)


class Desk:
    """One rank's connection.

    Args:
        shelf: What this node holds.
        flusher: The disk tier.
        directory: The other persisters.
        own: Where this persister listens.
    """

    def __init__(self, shelf: Shelf, flusher: Flusher, directory: Directory, own: Address) -> None:
        self._shelf = shelf
        self._flusher = flusher
        self._directory = directory
        self._own = own
        self._stream: Stream | None = None
        self._replicator: Replicator | None = None
        self._filling: Held | None = None
        self._writing: Writing | None = None
        self._accepted: Writing | None = None  # not begun yet
        self._told: set[int] = set()
        self._keep = 1
        self._rank_state: Any = None  # as it was told last; a rank tells it again when it has changed

    def serve(self, sock: socket.socket) -> None:
        """Answer until the rank is gone; what it had sealed goes its way without it."""
        handlers: dict[str, Callable[[Message], tuple[Message, Payload, list[int]]]] = {
            "hello": self._hello,
            "open": self._open,
            "begin": self._begin,
            "seal": self._seal,
            "settle": self._settle,
            "durable": self._durable,
            "release": self._release,
            "outcome": self._outcome,
            "part": self._part,
            "read": self._read,
        }
        try:
            with sock, contextlib.suppress(FrameError):
                while True:
                    message, _ = frames.receive(sock)
                    try:
                        answer, data, fds = handlers[message["op"]](message)
                    except (FrameError, OSError, LookupError, TypeError, ValueError) as error:
                        garbled = isinstance(error, Garbled)
                        answer, data, fds = {"error": f"{type(error).__name__}: {error}", "garbled": garbled}, b"", []
                    try:
                        frames.send(sock, answer, data, fds)
                    finally:
                        self._start_writing()
        finally:
            self._leave()

    def _start_writing(self) -> None:
        """Only now that its rank has been answered, and trains on: digests take all of a core."""
        writing, self._accepted = self._accepted, None
        if writing is not None:
            self._flusher.start(writing)

    def _leave(self) -> None:
        if self._filling is not None:
            self._shelf.discard(self._filling)
        if self._writing is not None:
            self._writing.released.set()
        if self._replicator is not None:
            self._replicator.end()

    def _hello(self, message: Message) -> tuple[Message, Payload, list[int]]:
        refused = no_room(int(message.get("share", 0)), usable_memory())
        return {"address": to_json(self._own), "refused": refused}, b"", []

    # -- writing ---------------------------------------------------------------------------------------------------

    def _open(self, message: Message) -> tuple[Message, Payload, list[int]]:
        info = from_json(StreamInfo, message["info"])
        peers = [from_json(Address, one) for one in message["peers"]]
        self._directory.learn(info.token, peers)
        restored, in_memory = message["restored"], bool(message["in_memory"])
        self._keep = int(message["keep"])
        self._stream = self._shelf.open(
            info,
            own=True,
            in_memory=in_memory,
            restored=Generation(restored[0], Token(*restored[1])) if restored else None,
        )
        target = other_node(self._own, peers) if in_memory else None
        if target is not None:
            self._replicator = Replicator(self._shelf, self._directory.secret, target)
        return {"toil_s": self._shelf.toil_s}, b"", []

    def _begin(self, message: Message) -> tuple[Message, Payload, list[int]]:
        assert self._stream is not None
        if self._replicator is not None:
            self._replicator.settle()
        self._filling = held = self._shelf.begin(self._stream)
        number = held.buffer.number
        fds = [] if number in self._told else [held.buffer.fd]
        self._told.add(number)
        return {"buffer": number, "bytes": held.buffer.size}, b"", fds

    def _seal(self, message: Message) -> tuple[Message, Payload, list[int]]:
        held, self._filling = self._filling, None
        assert held is not None
        self._rank_state = message["record"].setdefault("rank_state", self._rank_state)
        self._shelf.seal(held, int(message["step"]), message["record"])
        if message["flush"]:
            hold, again, base = bool(message["hold"]), bool(message.get("again")), str(message.get("base", ""))
            accepted = self._flusher.accept(held, hold=hold, keep=self._keep, base=base, again=again)
            self._writing = self._accepted = accepted
        if self._replicator is not None:
            self._replicator.submit(held)
        return {"replica": self._replicator is not None}, b"", []

    def _settle(self, _: Message) -> tuple[Message, Payload, list[int]]:
        if self._replicator is None:
            return {"broken": "", "toil_s": self._shelf.toil_s}, b"", []
        self._replicator.settle()
        return {"broken": self._replicator.broken, "toil_s": self._shelf.toil_s}, b"", []

    def _durable(self, _: Message) -> tuple[Message, Payload, list[int]]:
        assert self._writing is not None
        self._writing.durable.wait()
        return {}, b"", []

    def _release(self, _: Message) -> tuple[Message, Payload, list[int]]:
        assert self._writing is not None
        self._writing.released.set()
        return {}, b"", []

    def _outcome(self, message: Message) -> tuple[Message, Payload, list[int]]:
        token = Token(*message["token"])
        return {"done": self._flusher.outcome(token, int(message["step"]), wait_s=message["wait_s"])}, b"", []

    # -- restoring -------------------------------------------------------------------------------------------------

    def _part(self, message: Message) -> tuple[Message, Payload, list[int]]:
        generation, rank, where = wanted(message), int(message["rank"]), from_json(Address, message["where"])
        held = self._shelf.find(generation, rank)
        if held is not None:
            return describe(held) | {"local": True}, b"", [held.buffer.fd]
        question = {"op": "record", "step": generation.step, "token": generation.token, "rank": rank}
        answer, _ = self._directory.ask(where, question)
        return answer | {"local": False}, b"", []

    def _read(self, message: Message) -> tuple[Message, Payload, list[int]]:
        where = from_json(Address, message["where"])
        answer, data = self._directory.ask(where, message | {"where": None})
        return answer, data, []


def wanted(message: Message) -> Generation:
    """The generation that a message is about."""
    return Generation(int(message["step"]), Token(*message["token"]))


def describe(held: Held) -> Message:
    """The record of a part, for readers."""
    return {"record": held.record, "info": to_json(held.stream.info), "bytes": held.buffer.size}


def other_node(own: Address, peers: Sequence[Address]) -> Address | None:
    """Who keeps the replicas of a node: the one half a gang away in the order of ranks; None when there is no other.

    Neighbours share a switch and its failures: :mod:`launcher.lineup` puts those beside each other that do.
    """
    nodes = list(dict.fromkeys(peers))
    if own not in nodes or len(nodes) < 2:
        return None
    return nodes[(nodes.index(own) + len(nodes) // 2) % len(nodes)]


def no_room(share: int, host: int) -> str:
    """Why a node keeps no generations in memory; empty when there is room for them, as the planner reckons.

    Args:
        share: Bytes of one generation of all ranks of the node.
        host: Bytes of memory that it may use.
    """
    if share * GENERATIONS <= host * HOST_SHARE:
        return ""
    return (
        f"{GENERATIONS} copies of {share / 1e9:.2f} GB are more than {HOST_SHARE:.0%} of the {host / 1e9:.1f} GB that "
        "this host may use (checkpoint.memory_every=0 asks for none)"
    )


class Guests:
    """Answers other persisters: replicas that they bring, parts that their ranks restore, news of the disk tier.

    Args:
        shelf: What this node holds.
        flusher: The disk tier.
    """

    def __init__(self, shelf: Shelf, flusher: Flusher) -> None:
        self._shelf = shelf
        self._flusher = flusher
        self._lock = threading.Lock()
        self._streams: dict[tuple[Token, int], Stream] = {}

    def handle(self, message: Message, sock: socket.socket) -> tuple[Message, Payload]:
        """One question; the payload of it is read here."""
        handlers: dict[str, Callable[[Message, socket.socket], tuple[Message, Payload]]] = {
            "stream": self._stream,
            "replica": self._receive,
            "record": self._record,
            "read": self._read,
            "part": self._news,
        }
        handler = handlers.get(str(message.get("op")))
        if handler is None:
            raise FrameError(f"unknown question {message.get('op')!r}")
        try:
            return handler(message, sock)
        except (LookupError, TypeError, ValueError, OSError) as error:
            return {"error": f"{type(error).__name__}: {error}"}, b""

    def _stream(self, message: Message, _: socket.socket) -> tuple[Message, Payload]:
        info = from_json(StreamInfo, message["info"])
        stream = self._shelf.open(info, own=False, in_memory=True, restored=None)
        with self._lock:  # all ranks of a node begin at once
            self._streams = {key: one for key, one in self._streams.items() if key[0] >= info.token}
            self._streams[info.token, info.rank] = stream
        return {}, b""

    def _receive(self, message: Message, sock: socket.socket) -> tuple[Message, Payload]:
        with self._shelf.toiling():
            return self._replica(message, sock)

    def _replica(self, message: Message, sock: socket.socket) -> tuple[Message, Payload]:
        with self._shelf.filling(self._streams[Token(*message["token"]), int(message["rank"])]) as held:
            view = held.buffer.view
            if len(view) != message["payload"]:
                raise FrameError(f"a replica of {message['payload']} bytes, where {len(view)} were announced")
            pull(sock, view)
            self._shelf.seal(held, int(message["step"]), message["record"])
        return {}, b""

    def _held(self, message: Message) -> Held:
        held = self._shelf.find(wanted(message), int(message["rank"]))
        if held is None:
            raise LookupError(f"{wanted(message)} of rank {message['rank']} is not here")
        return held

    def _record(self, message: Message, _: socket.socket) -> tuple[Message, Payload]:
        return describe(self._held(message)), b""

    def _read(self, message: Message, _: socket.socket) -> tuple[Message, Payload]:
        with self._shelf.pinned(self._held(message)) as held:
            return {}, os.pread(held.buffer.fd, int(message["count"]), int(message["offset"]))

    def _news(self, message: Message, _: socket.socket) -> tuple[Message, Payload]:
        self._flusher.take(message)
        return {}, b""

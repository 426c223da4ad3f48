"""The agent's side of its connections: accept, handshake, one owner at a time, readers of logs beside it.

The owner is the controller with the highest epoch. It is fed from the agent's event log: what it has not read waits
there, where it is bounded, and not in a buffer of the connection.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from launcher.host import wire
from launcher.host.events import EventLog
from launcher.host.wire import Message, Stream

_MAX_UNPROVEN = 64
_MAX_READERS = 16
_READ_AHEAD_BYTES = 1 << 16


@dataclass(slots=True, eq=False)
class Peer:
    """One connection. ``role`` is empty until the other side has proved itself."""

    stream: Stream
    nonce: str
    since: float
    role: str = ""
    epoch: int = 0
    sent: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What the agent proves and what a proof for it must name."""

    secret: bytes
    incarnation: str


class Peers:
    """All connections of an agent.

    Args:
        listener: Listening socket; owned from now on.
        selector: The agent's loop; callbacks take no argument.
        identity: Secret and incarnation.
        log: Events for the owner.
        welcome: Makes the state part of a welcome.
        on_message: Called for each message of a proven peer.
    """

    def __init__(
        self,
        *,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        identity: Identity,
        log: EventLog,
        welcome: Callable[[], Message],
        on_message: Callable[[Peer, Message], None],
    ) -> None:
        self._listener = listener
        self._selector = selector
        self._identity = identity
        self._log = log
        self._welcome = welcome
        self._on_message = on_message
        self._peers: list[Peer] = []
        self.owner: Peer | None = None
        self.highest_epoch = 0
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # out of file descriptors, or gone again: the oldest stranger makes room
            self._drop_oldest("")
            return
        self._limit("", _MAX_UNPROVEN)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = Peer(Stream(sock, limit=wire.MAX_HELLO_BYTES), wire.new_nonce(), time.monotonic())
        self._peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._readable(peer))
        peer.stream.send({"op": "challenge", "nonce": peer.nonce})

    def _limit(self, role: str, most: int) -> None:
        while sum(peer.role == role for peer in self._peers) >= most:
            self._drop_oldest(role)

    def _drop_oldest(self, role: str) -> None:
        oldest = next((peer for peer in self._peers if peer.role == role), None)
        if oldest is not None:
            self.drop(oldest, "too many connections")

    def _readable(self, peer: Peer) -> None:
        for message in peer.stream.receive():
            if peer.stream.closed:
                break
            if peer.role:
                self._on_message(peer, message)
            else:
                self._hello(peer, message)
        self._settle(peer)

    def _hello(self, peer: Peer, message: Message) -> None:
        role, epoch, client_nonce = message.get("role", "controller"), message.get("epoch"), message.get("nonce")
        well_formed = role in ("controller", "reader") and type(epoch) is int and isinstance(client_nonce, str)
        if not well_formed or message.get("op") != "hello":
            self.drop(peer, "no hello")
            return
        secret, incarnation = self._identity.secret, self._identity.incarnation
        expected = wire.client_proof(secret, role, incarnation, peer.nonce, str(client_nonce), int(str(epoch)))
        if not wire.same(message.get("proof"), expected):
            self.drop(peer, "wrong proof")
            return
        peer.epoch = int(str(epoch))
        if role == "controller" and peer.epoch < self.highest_epoch:
            self._refuse(peer)
            return
        peer.stream.reader.limit = wire.MAX_LINE_BYTES
        if role == "reader":
            self._limit("reader", _MAX_READERS)
        else:
            self._take_over(peer)
        peer.role = role
        proof = wire.agent_proof(secret, incarnation, peer.nonce, str(client_nonce))
        known = {"op": "welcome", "proof": proof, "cursor": self._log.last, "clock": time.time()}
        peer.stream.send(known | self._welcome())
        self.pump()

    def _take_over(self, peer: Peer) -> None:
        self.highest_epoch = peer.epoch
        if self.owner is not None:
            self._refuse(self.owner)
        self.owner = peer

    def _refuse(self, peer: Peer) -> None:
        peer.stream.send({"op": "refused", "reason": "stale epoch", "epoch": self.highest_epoch})
        self.drop(peer, "stale epoch")

    def pump(self) -> None:
        """Send the owner what it has not read yet, as far as it keeps up."""
        peer = self.owner
        while peer is not None and peer.role and peer.stream.pending < _READ_AHEAD_BYTES:
            following = self._log.after(peer.sent)
            if following is None:
                break
            peer.sent = following[0]
            peer.stream.send_line(following[1])
        if peer is not None:
            self._settle(peer)

    def send(self, peer: Peer, message: Message) -> None:
        """Send one message to one peer."""
        peer.stream.send(message)
        self._settle(peer)

    def _settle(self, peer: Peer) -> None:
        """Bring the selector in line with what became of the peer's stream."""
        if peer.stream.closed:
            self.drop(peer, peer.stream.closed)
        elif peer in self._peers:
            wants = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.stream.pending else 0)
            if self._selector.get_key(peer.stream.sock).events != wants:
                self._selector.modify(peer.stream.sock, wants, lambda: self._ready(peer))

    def _ready(self, peer: Peer) -> None:
        peer.stream.flush()
        if peer is self.owner:
            self.pump()
        self._readable(peer)

    def drop(self, peer: Peer, reason: str) -> None:
        """End a connection, without a word to the other side."""
        if peer not in self._peers:
            return
        self._peers.remove(peer)
        if self.owner is peer:
            self.owner = None
        self._selector.unregister(peer.stream.sock)  # finds it even when it is closed
        peer.stream.close(reason)

    def tick(self, now: float) -> None:
        """Drop those who did not prove themselves in time."""
        for peer in [peer for peer in self._peers if not peer.role and now - peer.since > wire.HANDSHAKE_S]:
            self.drop(peer, "no proof in time")

    @property
    def has_strangers(self) -> bool:
        """Whether a connection is still unproven."""
        return any(not peer.role for peer in self._peers)

    def close(self, *, linger_s: float) -> None:
        """Send what is waiting, for at most ``linger_s``, then end all connections."""
        deadline = time.monotonic() + linger_s
        self.pump()
        while self.owner is not None and self.owner.stream.pending and time.monotonic() < deadline:
            self.owner.stream.sock.settimeout(max(0.01, deadline - time.monotonic()))
            self.pump()
            self._flush_owner()
        for peer in list(self._peers):
            self.drop(peer, "the agent ends")
        self._selector.unregister(self._listener)
        self._listener.close()

    def _flush_owner(self) -> None:
        if self.owner is not None:
            self.owner.stream.flush()
            self._settle(self.owner)

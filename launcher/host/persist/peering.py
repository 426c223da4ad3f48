"""Connections between persisters: who may speak, and what they ask of each other.

The handshake is that of :mod:`launcher.host.wire` in a role of its own: both sides prove that they know the secret of
the run, and the proof names the incarnation of the persister that is called.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

import xxhash

from jobs import frames
from jobs.checkpoint.memory import Address
from jobs.frames import FrameError, Garbled, Message, Payload
from launcher.host import wire

ROLE = "persister"
PATIENCE_S = 10.0
PIECE_BYTES = 4 << 20
_HELLO_BYTES = 4096


def checksum(data: Payload) -> int:
    """What travels with bytes over the network: more than TCP's own sixteen bits, and hardly dearer than a look."""
    return xxhash.xxh3_64_intdigest(data)


def pull(sock: socket.socket, view: memoryview) -> None:
    """The other end of :meth:`PeerLink.push`: fill ``view``; raises FrameError if it is not what was sent.

    In the middle of it the other side is silent for ``PATIENCE_S`` at most: it has given up long before.
    """
    seen, patience_s = xxhash.xxh3_64(), sock.gettimeout()
    sock.settimeout(PATIENCE_S)
    for at in range(0, len(view), PIECE_BYTES):
        piece = view[at : at + PIECE_BYTES]
        frames.read_into(sock, piece)
        seen.update(piece)
    trailer, _ = frames.receive(sock, limit=_HELLO_BYTES)
    sock.settimeout(patience_s)
    if trailer.get("checksum") != seen.intdigest():
        raise Garbled("what arrived is not what was sent")


class PeerLink:
    """A connection to another persister. One question at a time; raises FrameError for all that goes wrong.

    Args:
        secret: The run's secret.
        address: The other one.
        patience_s: Longest silence in the middle of something.
    """

    def __init__(self, secret: bytes, address: Address, patience_s: float = PATIENCE_S) -> None:
        self._lock = threading.Lock()
        try:
            self._sock = socket.create_connection((address.host, address.port), timeout=patience_s)
        except OSError as error:
            raise FrameError(f"{address.host}:{address.port}: {error.strerror or error}") from error
        try:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._greet(secret, address.incarnation)
        except BaseException:
            self._sock.close()
            raise

    def _greet(self, secret: bytes, incarnation: str) -> None:
        challenge, _ = frames.receive(self._sock, limit=_HELLO_BYTES)
        nonce, own = str(challenge.get("nonce")), wire.new_nonce()
        proof = wire.client_proof(secret, ROLE, incarnation, nonce, own, 0)
        frames.send(self._sock, {"op": "hello", "nonce": own, "proof": proof})
        welcome, _ = frames.receive(self._sock, limit=_HELLO_BYTES)
        if not wire.same(welcome.get("proof"), wire.agent_proof(secret, incarnation, nonce, own)):
            raise FrameError("it is not a persister of this run")

    def ask(self, message: Message, payload: Payload = b"") -> tuple[Message, bytes]:
        """Send a question and return the answer with its payload."""
        with self._lock:
            frames.send(self._sock, message, payload)
            answer, _ = frames.receive(self._sock)
            data = frames.read(self._sock, answer["payload"])
        if "error" in answer:
            raise FrameError(str(answer["error"]))
        if data and answer.get("checksum") != checksum(data):
            raise Garbled("what arrived is not what was sent")
        return answer, data

    def push(self, message: Message, data: memoryview) -> None:
        """Send much; it is checked on its way, piece by piece, so that the answer does not wait for a second look."""
        with self._lock:
            frames.send(self._sock, message, announced=len(data))
            seen = xxhash.xxh3_64()
            try:
                for at in range(0, len(data), PIECE_BYTES):
                    piece = data[at : at + PIECE_BYTES]
                    seen.update(piece)
                    self._sock.sendall(piece)
            except OSError as error:
                raise FrameError(error.strerror or type(error).__name__) from error
            frames.send(self._sock, {"checksum": seen.intdigest()})
            answer, _ = frames.receive(self._sock)
        if "error" in answer:
            raise FrameError(str(answer["error"]))

    def close(self) -> None:
        """End the connection."""
        self._sock.close()


Answer = tuple[Message, Payload]
Handler = Callable[[Message, socket.socket], Answer]


class PeerServer:
    """Answers other persisters, each connection in a thread.

    Args:
        host: Address to listen on.
        secret: The run's secret.
        handle: Answers a question; it must read the payload of the question from the socket.

    Attributes:
        address: Where it listens.
    """

    def __init__(self, host: str, secret: bytes, handle: Handler) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=64)
        self._secret = secret
        self._handle = handle
        self.address = Address(host=host, port=self._listener.getsockname()[1], incarnation=wire.new_nonce())

    def start(self) -> None:
        """Serve in the background, as long as the process lives."""
        threading.Thread(target=self._accept, daemon=True, name="peers").start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(FrameError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(wire.HANDSHAKE_S)
            if not self._prove(sock):
                return
            sock.settimeout(None)
            while True:
                question, _ = frames.receive(sock)
                answer, data = self._handle(question, sock)
                frames.send(sock, answer | ({"checksum": checksum(data)} if len(data) else {}), data)

    def _prove(self, sock: socket.socket) -> bool:
        nonce, incarnation = wire.new_nonce(), self.address.incarnation
        frames.send(sock, {"op": "challenge", "nonce": nonce})
        hello, _ = frames.receive(sock, limit=_HELLO_BYTES)
        other = str(hello.get("nonce"))
        if not wire.same(hello.get("proof"), wire.client_proof(self._secret, ROLE, incarnation, nonce, other, 0)):
            return False
        frames.send(sock, {"op": "welcome", "proof": wire.agent_proof(self._secret, incarnation, nonce, other)})
        return True

"""The control connection between the controller and a host agent: framing, limits and the handshake.

One JSON object per line over TCP. The agent opens with a fresh nonce and nothing else; the other side proves that it
knows the run's secret, then the agent proves the same. Both proofs name the agent's incarnation, so that somebody who
took over the port of a dead agent cannot pass a proof on to another agent, and the role, so that the proof of a reader
of logs is none of a controller. A peer that fails is dropped without a word.

The proof protects against other users of the hosts and of the network between them who can connect; it does not
encrypt, so an attacker who can rewrite packets in flight is out of its reach: keep the network private.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import threading
from pathlib import Path
from typing import Any, Literal

from strategies.errors import StorageError

Role = Literal["controller", "reader"]
Message = dict[str, Any]

MAX_LINE_BYTES = 1 << 20
MAX_HELLO_BYTES = 4096
HANDSHAKE_S = 2.0
BEATS = 4
"""Signs of life that an agent gives in the time after which it is taken for lost: three may come late."""
_READ_BYTES = 1 << 18
_ENCODER = json.JSONEncoder(separators=(",", ":"))  # json.dumps would make one for every message
_DECODER = json.JSONDecoder()


class WireError(Exception):
    """The other side broke the protocol."""


def make_secret(path: Path) -> bytes:
    """Make the secret of a run, once; an existing one is kept.

    Raises:
        StorageError: The file cannot be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_secret(path)
    except OSError as error:
        raise StorageError(f"Cannot write {path}.", why=str(error)) from error
    with os.fdopen(fd, "w") as file:
        file.write(secrets.token_hex(32))
        file.flush()
        os.fsync(file.fileno())
    return read_secret(path)


def read_secret(path: Path) -> bytes:
    """Read the secret of a run.

    Raises:
        StorageError: It is missing, empty or unreadable.
    """
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise StorageError(
            f"Cannot read {path}.", why=str(error), hint="Check that the run directory is shared."
        ) from error
    if not secret:
        raise StorageError(f"{path} is empty.", hint="Delete it; the next controller of the run makes a new one.")
    return secret


def new_nonce() -> str:
    """A number used once."""
    return secrets.token_hex(16)


def client_proof(secret: bytes, role: str, incarnation: str, nonce: str, client_nonce: str, epoch: int) -> str:
    """What a client answers to ``nonce``."""
    return _proof(secret, role, incarnation, nonce, client_nonce, str(epoch))


def agent_proof(secret: bytes, incarnation: str, nonce: str, client_nonce: str) -> str:
    """What the agent answers to ``client_nonce``."""
    return _proof(secret, "agent", incarnation, nonce, client_nonce)


def _proof(secret: bytes, *parts: str) -> str:
    return hmac.new(secret, json.dumps(parts).encode(), hashlib.sha256).hexdigest()


def same(left: Any, right: str) -> bool:
    """Compare proofs in constant time; anything that is not ASCII text differs."""
    return isinstance(left, str) and left.isascii() and hmac.compare_digest(left, right)


def encode(message: Message) -> bytes:
    """One line; raises :class:`WireError` when it would be too long for the other side."""
    line = _ENCODER.encode(message).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise WireError(f"a message of {len(line)} bytes is longer than {MAX_LINE_BYTES}")
    return line


class LineReader:
    """Cuts bytes into lines of limited length, so that a flood of junk cannot grow memory.

    Args:
        limit: Most bytes of one line.
    """

    def __init__(self, limit: int = MAX_LINE_BYTES) -> None:
        self.limit = limit
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes; returns the lines that they complete, raises :class:`WireError` for one that is too long."""
        if not self._rest and data.find(b"\n") == len(data) - 1 <= self.limit:
            return [data[:-1]]  # one short message, as nearly always
        self._rest += data
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest
        if len(rest) > self.limit or any(len(line) > self.limit for line in lines):
            self._rest.clear()
            raise WireError(f"a line is longer than {self.limit} bytes")
        return [bytes(line) for line in lines]


def decode(line: bytes) -> Message:
    """One message; raises :class:`WireError` unless it is a JSON object."""
    try:
        message = _DECODER.decode(line.decode())
    except (ValueError, RecursionError) as error:
        raise WireError("a line is not JSON") from error
    if not isinstance(message, dict):
        raise WireError("a line is not a JSON object")
    return message


class Stream:
    """A non-blocking connection that carries messages. Never raises for what the network or the other side does.

    It is one thread's; of all its methods only :meth:`nudge` may be called by another.

    Args:
        sock: A connected or connecting socket; owned by the stream from now on.
        limit: Most bytes of one incoming line.
        max_pending: Bytes that may wait for a slow reader before the stream is closed.

    Attributes:
        closed: Why the stream is over; empty as long as it is not.
        sent: Bytes that the kernel has taken so far.
        received: Bytes that were read so far.
    """

    def __init__(self, sock: socket.socket, *, limit: int = MAX_LINE_BYTES, max_pending: int = 8 << 20) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.reader = LineReader(limit)
        self.closed = ""
        self.sent = self.received = 0
        self._max_pending = max_pending
        self._pending = bytearray()
        self._sending = threading.RLock()

    @property
    def pending(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._pending)

    def receive(self) -> list[Message]:
        """Read what is there, at most 256 KiB, and return the messages that are complete."""
        if self.closed:
            return []
        try:
            data = self.sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            self.close(error.strerror or type(error).__name__)
            return []
        if not data:
            self.close("the connection was closed")
            return []
        self.received += len(data)
        try:
            return [decode(line) for line in self.reader.feed(data)]
        except WireError as error:
            self.close(str(error))
            return []

    def send(self, message: Message) -> None:
        """Queue a message and send what the kernel takes now."""
        self.send_line(encode(message))

    def send_line(self, line: bytes) -> None:
        """Queue an encoded message and send what the kernel takes now."""
        with self._sending:
            if self.closed:
                return
            self._pending += line
            if len(self._pending) > self._max_pending:
                self.close("the other side does not read")
                return
            self.flush()

    def flush(self) -> None:
        """Send what the kernel takes now."""
        with self._sending:
            if self.closed or not self._pending:
                return
            try:
                taken = self.sock.send(self._pending)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self.close(error.strerror or type(error).__name__)
                return
            self.sent += taken
            del self._pending[:taken]

    def nudge(self, line: bytes) -> None:
        """Send an encoded message from another thread or, as long as others wait to be sent, those in its place.

        What is wrong with the connection is for its own thread to see.
        """
        with self._sending, contextlib.suppress(OSError):
            if self.closed:
                return
            if not self._pending:
                self._pending += line
            taken = self.sock.send(self._pending)
            self.sent += taken
            del self._pending[:taken]

    def close(self, reason: str) -> None:
        """End the connection; the first reason stays."""
        with self._sending:
            if not self.closed:
                self.closed = reason
                self._pending.clear()
                self.sock.close()

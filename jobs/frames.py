"""Messages between a rank, the persister of its node and other persisters: a JSON object, and bytes behind it.

A frame is the length of the text (4 bytes, little-endian), the text, and as many bytes of payload as its ``payload``
says; over a UNIX socket file descriptors travel with it. Blocking; standard library only.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
Payload = bytes | memoryview

MAX_TEXT_BYTES = 256 << 20
_MAX_FDS = 8


class FrameError(Exception):
    """The other side is gone, or does not keep to the protocol."""


class Garbled(FrameError):
    """What arrived is not what was sent."""


def send(
    sock: socket.socket, message: Message, payload: Payload = b"", fds: Sequence[int] = (), *, announced: int = 0
) -> None:
    """Send a message; ``announced`` bytes of payload are the caller's to send. Raises FrameError."""
    text = json.dumps(message | {"payload": len(payload) or announced}, separators=(",", ":")).encode()
    head = len(text).to_bytes(4, "little") + text
    try:
        sent = socket.send_fds(sock, [head], list(fds)) if fds else 0
        sock.sendall(memoryview(head)[sent:])
        if len(payload):
            sock.sendall(payload)
    except OSError as error:
        raise FrameError(error.strerror or type(error).__name__) from error


def receive(sock: socket.socket, *, limit: int = MAX_TEXT_BYTES) -> tuple[Message, list[int]]:
    """The next message and its descriptors; its payload is still to be read. Raises FrameError."""
    fds: list[int] = []
    try:
        if sock.family == socket.AF_UNIX:
            head, fds, _, _ = socket.recv_fds(sock, 4, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        else:
            head = sock.recv(4)
        if not head:
            raise FrameError("the connection was closed")
        head += read(sock, 4 - len(head))
        length = int.from_bytes(head, "little")
        if length > limit:
            raise FrameError(f"a message of {length} bytes is longer than {limit}")
        message = json.loads(read(sock, length))
    except (OSError, ValueError) as error:
        for fd in fds:
            os.close(fd)
        raise FrameError(str(error)) from error
    if not isinstance(message, dict) or not isinstance(message.get("payload"), int):
        raise FrameError("a message is not an object with a payload")
    return message, fds


def read_into(sock: socket.socket, view: memoryview) -> None:
    """Fill ``view`` with what comes next; raises FrameError."""
    while len(view):
        try:
            count = sock.recv_into(view)
        except OSError as error:
            raise FrameError(error.strerror or type(error).__name__) from error
        if not count:
            raise FrameError("the connection was closed")
        view = view[count:]


def read(sock: socket.socket, count: int) -> bytes:
    """The next ``count`` bytes; raises FrameError."""
    data = bytearray(count)
    read_into(sock, memoryview(data))
    return bytes(data)


def connect_unix(path: str) -> socket.socket:
    """Connect to a socket of the file system whose path may be longer than the kernel's 108 bytes.

    Raises:
        FrameError: Nobody listens.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = -1
    try:
        folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
        sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    except OSError as error:
        sock.close()
        raise FrameError(f"{path}: {error.strerror}") from error
    finally:
        if folder >= 0:
            os.close(folder)
    return sock


def listen_unix(path: str) -> socket.socket:
    """A listening socket of the file system; raises OSError."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        sock.listen(64)
    finally:
        os.close(folder)
    return sock

"""Reads logs of ranks from their node, beside the controller and without disturbing it."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

from launcher.backend import AgentAddress
from launcher.host import wire
from launcher.host.wire import LineReader, Message
from strategies.errors import ClusterError, NotFound


@dataclass(frozen=True, kw_only=True, slots=True)
class LogPiece:
    """A piece of a log.

    Attributes:
        text: What was read.
        offset: Where it begins, in bytes.
        next: Where to go on reading.
        size: Size of the log, in bytes; smaller than an earlier one when the log was cut meanwhile.
    """

    text: str
    offset: int
    next: int
    size: int


class LogReader:
    """A connection to one agent that can only read logs.

    Args:
        address: Where the agent is.
        secret: The run's secret.
        timeout_s: Longest wait for each answer.

    Raises:
        ClusterError: The agent cannot be reached, or it is not the agent of this run.
    """

    def __init__(self, address: AgentAddress, secret: bytes, *, timeout_s: float = 5.0) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._reader = LineReader()
        self._waiting: list[Message] = []
        try:
            self._sock = socket.create_connection((address.host, address.port), timeout=timeout_s)
        except OSError as error:
            raise self._unreachable(str(error)) from error
        try:
            self._greet(secret)
        except BaseException:
            self.close()
            raise

    def _greet(self, secret: bytes) -> None:
        nonces = str(self._receive("challenge").get("nonce")), wire.new_nonce()
        incarnation = self._address.incarnation
        proof = wire.client_proof(secret, "reader", incarnation, *nonces, 0)
        self._send({"op": "hello", "role": "reader", "epoch": 0, "nonce": nonces[1], "proof": proof})
        welcome = self._receive("welcome")
        if not wire.same(welcome.get("proof"), wire.agent_proof(secret, incarnation, *nonces)):
            raise self._unreachable("it is not the agent of this run")

    def read(self, attempt: int, rank: int, offset: int, limit: int) -> LogPiece:
        """Read at most ``limit`` bytes from ``offset``; a negative offset counts from the end.

        Raises:
            ClusterError: The agent is gone.
            NotFound: The node has no such log.
        """
        place = {"attempt": attempt, "rank": rank, "offset": offset, "limit": limit}
        self._send({"op": "tail", "id": 0} | place)
        answer = self._receive("tail")
        if "error" in answer:
            raise NotFound(f"Node {self._address.node} has no log of rank {rank} in attempt {attempt}.")
        return LogPiece(
            text=str(answer["data"]), offset=int(answer["offset"]), next=int(answer["next"]), size=int(answer["size"])
        )

    def _send(self, message: Message) -> None:
        try:
            self._sock.sendall(wire.encode(message))
        except OSError as error:
            raise self._unreachable(str(error)) from error

    def _receive(self, op: str) -> Message:
        deadline = time.monotonic() + self._timeout_s
        while True:
            while self._waiting:
                message = self._waiting.pop(0)
                if message.get("op") == op:
                    return message
            try:
                self._sock.settimeout(max(0.01, deadline - time.monotonic()))
                data = self._sock.recv(1 << 16)
                self._waiting += [wire.decode(line) for line in self._reader.feed(data)]
            except (OSError, wire.WireError) as error:
                raise self._unreachable(str(error)) from error
            if not data:
                raise self._unreachable("it closed the connection")

    def _unreachable(self, why: str) -> ClusterError:
        where = f"{self._address.host}:{self._address.port}"
        return ClusterError(f"Cannot read logs from the agent of {self._address.node} at {where}.", why=why)

    def close(self) -> None:
        """End the connection."""
        self._sock.close()

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

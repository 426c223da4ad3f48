"""One simulated node: the host agent's real protocol, without processes behind it."""

from __future__ import annotations

import os
import secrets
import selectors
import socket
from collections.abc import Callable
from typing import Any

from jobs.checkpoint.memory import Address
from launcher.backend import AgentAddress
from launcher.host import wire
from launcher.host.events import EventLog
from launcher.host.peers import Identity, Peer, Peers
from launcher.host.wire import Message
from strategies.codec import to_json
from tests.support.scale.storage import Shelf

Heard = Callable[["SimNode", Message], None]


class SimNode:
    """An agent that listens on a port of its own.

    Args:
        name: Name of the node.
        slots: Its devices.
        secret: The run's secret.
        selector: The loop of all agents; callbacks take no argument.
        wall: UTC seconds.
        heard: Called with ``spawn``, ``kill`` and ``shutdown`` of the controller.
    """

    def __init__(
        self,
        *,
        name: str,
        slots: int,
        secret: bytes,
        selector: selectors.BaseSelector,
        wall: Callable[[], float],
        heard: Heard,
    ) -> None:
        self._selector = selector
        self._wall = wall
        self._heard = heard
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = AgentAddress(
            node=name,
            host="127.0.0.1",
            port=self._listener.getsockname()[1],
            pid=os.getpid(),
            slots=slots,
            incarnation=secrets.token_hex(8),
        )
        self.log = EventLog()
        self.attempt = self.epoch = self.step = 0
        self.ranks: list[int] = []
        self.silent = self.gone = False
        self.shelf: Shelf | None = None
        self.peers = Peers(
            listener=self._listener,
            selector=selector,
            identity=Identity(secret=secret, incarnation=self.address.incarnation),
            log=self.log,
            welcome=self._welcome,
            on_message=self._obey,
        )

    @property
    def name(self) -> str:
        """Name of the node."""
        return self.address.node

    def _welcome(self) -> Message:
        at = self.address
        ranks = [{"rank": rank, "pid": self._pid(rank), "exited": None} for rank in self.ranks]
        identity = {"node": at.node, "incarnation": at.incarnation, "pid": at.pid, "slots": at.slots, "pool": at.pid}
        told = {"attempt": self.attempt, "epoch_of_attempt": self.epoch, "ranks": ranks}
        return identity | told | {"clock": self._wall()}  # it lives in simulated time; else its clock would be off

    def _pid(self, rank: int) -> int:
        return 1000 + rank

    def _obey(self, peer: Peer, message: Message) -> None:
        op = message["op"]
        if peer is not self.peers.owner or op == "beat":
            return
        if op == "reserve":
            self.say("reserved", attempt=message["attempt"], port=self.address.port)
        elif op == "spawn":
            self._spawn(message)
        elif op == "kill":
            self._kill(int(message["attempt"]))
        elif op == "dump":
            self._dump(int(message["attempt"]))
        elif op == "holdings":
            self._tell_holdings(peer, message)
        self._heard(self, message)

    def _spawn(self, order: Message) -> None:
        if order["attempt"] <= self.attempt:
            return
        self.log.begin_attempt()
        self.attempt, self.epoch, self.step = order["attempt"], order["epoch"], 0
        self.ranks = [entry["rank"] for entry in order["ranks"]]
        pids = [{"rank": rank, "pid": self._pid(rank)} for rank in self.ranks]
        self.say("spawned", attempt=self.attempt, ranks=pids)

    def _kill(self, attempt: int) -> None:
        if attempt >= self.attempt:
            self.ranks = []
        self.say("killed", attempt=attempt)

    def _dump(self, attempt: int) -> None:
        for rank in self.ranks if attempt == self.attempt else []:
            self.say("stack", attempt=attempt, rank=rank, state="S", stack="")

    def _tell_holdings(self, peer: Peer, message: Message) -> None:
        at = Address(host=self.address.host, port=self.address.port, incarnation=self.address.incarnation)
        held = self.shelf.told() if self.shelf is not None else []
        self.peers.send(peer, {"op": "holdings", "id": message["id"], "address": to_json(at), "held": held})

    def say(self, kind: str, **data: Any) -> None:
        """Write an event, and send it as far as the controller keeps up."""
        self.log.append({"kind": kind, "time": self._wall()} | data)
        self.peers.pump()

    def report(self, kind: str, **data: Any) -> None:
        """What the first rank of this node reports."""
        if kind == "step":
            self.step = max(self.step, int(data["step"]))
        self.say(kind, rank=self.ranks[0], attempt=self.attempt, **data)

    def beat(self) -> None:
        """A sign of life."""
        if self.peers.owner is not None:
            self.peers.send(self.peers.owner, {"op": "beat", "step": self.step})

    def delivered(self, stream: wire.Stream) -> bool:
        """Everything between the controller's end of the connection and ours has been read."""
        owner = self.peers.owner
        if owner is None or owner.stream.pending or stream.pending:
            return False
        return owner.stream.sent == stream.received and stream.sent == owner.stream.received

    def die(self) -> None:
        """Everything ends, and so do the connections."""
        if self.silent:
            if self.peers.owner is not None:
                self.peers.owner.stream.close("the node is switched off")
            self._listener.close()
        elif not self.gone:
            self.peers.close(linger_s=0.0)
        self.gone = True

    def fall_silent(self) -> None:
        """Nothing is heard of the node any more, and nothing reaches it; its connections stay."""
        self.silent = True
        self._selector.unregister(self._listener)
        if self.peers.owner is not None:
            self._selector.unregister(self.peers.owner.stream.sock)

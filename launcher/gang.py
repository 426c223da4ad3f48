"""The controller's side of its agents: one connection per node, and what is seen through them.

A loop in one thread that never blocks longer than :meth:`Gang.poll` is told to. Its controller may, in its disk, which
agents must not take for its end: :meth:`Gang.beat_aside` is for another thread. A node is lost when its connection
ends or when nothing was heard of it for most of ``detect_s`` (:mod:`launcher.silence`). From a cut link to the decision
of the survivors it takes ``detect_s``. When nobody at all is heard it is this process that is cut off, and it waits.

One wake-up costs what it brings, not what the gang has of nodes: thousands of agents beat all the time.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.backend import AgentAddress
from launcher.clocks import difference
from launcher.host import wire
from launcher.host.events import AGENT_KINDS
from launcher.host.wire import Message, Stream
from launcher.listening import HandfulSelector
from launcher.observation import Inbox, Observation
from launcher.silence import Silence
from launcher.spawn_order import EnvOf, SpawnOrder
from strategies.errors import ClusterError

_CONNECT_S = 10.0
TOGETHER_S = 0.05
"""Ranks that go from a step to the next one say so, each at its own moment. What comes so soon after the first of them
is looked at with it: a turn of the controller costs as much for one as for all."""
ASIDE_S = 1800.0
"""A controller that has waited for a disk for longer is as good as gone: its agents end what they have."""

__all__ = ["EnvOf", "Gang", "Link", "Observation"]


@dataclass(slots=True, eq=False)
class Link:
    """Connection to one agent.

    Attributes:
        address: Where the agent is.
        up: The handshake is done.
        step: Newest step that the agent told of.
        asked: When it was greeted: UTC seconds, and by the gang's clock.
    """

    address: AgentAddress
    stream: Stream
    up: bool = False
    greeted: bool = False
    leaving: bool = False
    step: int = 0
    nonces: tuple[str, str] = ("", "")
    asked: tuple[float, float] = (0.0, 0.0)


class Gang:
    """All agents of a run, as the controller of one epoch sees them.

    Args:
        secret: The run's secret.
        epoch: Incarnation of the controller.
        clock: Monotonic seconds.
        detect_s: From the silence of a node until it counts as lost, and everything is decided that follows from it.
        lease_s: Agents that hear nothing of us for so long give up, and so do we if we hear nobody; six beats are sent
            in it, or, where none is given, in ``detect_s``.
        wall: UTC seconds.
        selector: Where it waits; a simulation brings one that moves ``clock``. Owned by the gang from now on.

    Attributes:
        links: Node to its living link, in the order of their connection; not all need be up yet.
    """

    def __init__(
        self,
        secret: bytes,
        epoch: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        detect_s: float = 5.0,
        lease_s: float = 0.0,
        wall: Callable[[], float] = time.time,
        selector: selectors.BaseSelector | None = None,
    ) -> None:
        self.links: dict[str, Link] = {}
        self._secret = secret
        self._epoch = epoch
        self._clock = clock
        self._detect_s = detect_s
        self._listen_s = detect_s / wire.BEATS  # how often agents beat
        self._beat_s = (lease_s or detect_s) / 6
        self._selector = selector or HandfulSelector()
        self._inbox, self._wall = Inbox(wall, clock), wall
        self._lost: set[str] = set()
        self._order: SpawnOrder | None = None
        self._lease_s, self._beat_at = lease_s, clock()
        self._silence: Silence[Link] = Silence(
            detect_s=detect_s, beat_s=self._listen_s, patience_s=lease_s, now=self._beat_at
        )

    @property
    def in_doubt(self) -> bool:
        """Nobody is heard any more, or nobody was until just now: that says nothing about the ranks."""
        return self._silence.in_doubt

    # -- connections -----------------------------------------------------------------------------------------------

    def connect(self, addresses: Sequence[AgentAddress]) -> None:
        """Begin to connect to the agents that are not linked yet; an incarnation that was lost is left alone."""
        for address in addresses:
            known = self.links.get(address.node)
            if address.incarnation in self._lost or (known and known.address.incarnation == address.incarnation):
                continue
            if known is not None:
                self._lose(known, "another agent has taken its place")
            self._connect(address)

    def _connect(self, address: AgentAddress) -> None:
        sock = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
        link = Link(address, Stream(sock))
        self.links[address.node] = link
        self._silence.add(link)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.connect((address.host, address.port))
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(link, f"cannot connect to {address.host}:{address.port}: {error.strerror or error}")
            return
        self._selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, link)

    def _lose(self, link: Link, why: str, *, silent_s: float = 0.0) -> None:
        """End a link. It was lost when its agent was last heard, ``silent_s`` ago."""
        if self.links.get(link.address.node) is not link:
            return
        del self.links[link.address.node]
        self._silence.remove(link)
        self._lost.add(link.address.incarnation)
        if link.stream.sock in self._selector.get_map():
            self._selector.unregister(link.stream.sock)
        link.stream.close(why)
        if not link.leaving:
            data: dict[str, Any] = {"why": why, "incarnation": link.address.incarnation, "silent": bool(silent_s)}
            if silent_s:
                data["time"] = self._inbox.wall() - silent_s
            self._inbox.add("agent_lost", link.address.node, data)

    def drop(self, node: str, why: str) -> None:
        """Give a node up: its link ends with ``agent_lost``, and this incarnation of its agent is not met again."""
        if node in self.links:
            self._lose(self.links[node], why)

    # -- listening -------------------------------------------------------------------------------------------------

    def poll(self, timeout_s: float) -> list[Observation]:
        """Wait until something is seen, at most ``timeout_s``, and return it; what is there already comes at once.

        That a rank goes from a step to the next one ends no wait until ``TOGETHER_S`` are over.
        """
        deadline = self._clock() + timeout_s
        while True:
            now = self._clock()
            if self._inbox.items:
                deadline = min(deadline, now if self._inbox.urgent else now + TOGETHER_S)
            wait = max(0.0, min(deadline, self._beat_at, now + self._listen_s) - now)
            for key, events in self._selector.select(wait):
                self._serve(key.data, events)
            self._beat()
            self._judge_silence()
            if self._inbox.urgent or self._clock() >= deadline:
                return self._inbox.take()

    def _serve(self, link: Link, events: int) -> None:
        if self.links.get(link.address.node) is not link:
            return
        if not link.greeted and self._failed_to_connect(link):
            return
        if events & selectors.EVENT_WRITE:
            link.stream.flush()
        messages = link.stream.receive()
        if messages:
            self._silence.heard(link)
        for message in messages:
            self._hear(link, message)
            if link.stream.closed:
                break
        if link.stream.closed or link.stream.pending or events & selectors.EVENT_WRITE:
            self._settle(link)

    def _failed_to_connect(self, link: Link) -> bool:
        code = link.stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code not in (0, errno.EINPROGRESS):
            address = link.address
            self._lose(link, f"cannot connect to {address.host}:{address.port}: {os.strerror(code)}")
            return True
        return False

    def _settle(self, link: Link) -> None:
        """Bring the selector in line with what became of the stream."""
        if link.stream.closed:
            self._lose(link, link.stream.closed)
        elif self.links.get(link.address.node) is link:
            wants = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.stream.pending else 0)
            if self._selector.get_key(link.stream.sock).events != wants:
                self._selector.modify(link.stream.sock, wants, link)

    def _send(self, link: Link, message: Message) -> None:
        link.stream.send(message)
        self._settle(link)

    def _send_all(self, message: Message) -> None:
        """One message to every agent, made once."""
        line = wire.encode(message)
        for link in [link for link in self.links.values() if link.up]:
            link.stream.send_line(line)
            if link.stream.closed or link.stream.pending:  # else the selector knows all there is
                self._settle(link)

    def _beat(self) -> None:
        now = self._clock()
        if now < self._beat_at:
            return
        self._beat_at = now + self._beat_s
        self._send_all({"op": "beat"})

    def beat_aside(self) -> None:
        """Beat in the place of the gang's own thread, as long as that waits for a disk; to be called by another one."""
        if 0.0 <= self._clock() - self._beat_at <= ASIDE_S:
            line = wire.encode({"op": "beat"})
            for link in list(self.links.values()):
                if link.up:
                    link.stream.nudge(line)

    def _judge_silence(self) -> None:
        before = self._silence.cut_off
        for link in self._silence.late(self._clock()):
            silent_s = self._silence.silent_s(link)
            if link.up:
                why = f"nothing was heard for {silent_s:.1f} s, and nothing was closed"
                self._lose(link, why, silent_s=silent_s)
            elif silent_s > max(self._detect_s, _CONNECT_S):
                self._lose(link, f"no answer from {link.address.host}:{link.address.port}")
        if self._silence.cut_off and not before:
            self._inbox.add("cut_off", "", {"patience_s": self._lease_s})

    def _hear(self, link: Link, message: Message) -> None:
        try:
            if link.up:
                self._hear_agent(link, message)
            else:
                self._greet(link, message)
        except (KeyError, TypeError, ValueError) as error:
            self._lose(link, f"the agent sent a malformed message ({error!r})")

    def _greet(self, link: Link, message: Message) -> None:
        op, incarnation = message["op"], link.address.incarnation
        if op == "challenge" and not link.greeted:
            link.nonces, link.greeted = (str(message["nonce"]), wire.new_nonce()), True
            proof = wire.client_proof(self._secret, "controller", incarnation, *link.nonces, self._epoch)
            hello = {"op": "hello", "role": "controller", "epoch": self._epoch, "nonce": link.nonces[1]}
            link.asked = self._wall(), self._clock()
            self._send(link, hello | {"proof": proof})
        elif op == "refused":
            self._fenced(link, message)
        elif op == "welcome" and wire.same(message["proof"], wire.agent_proof(self._secret, incarnation, *link.nonces)):
            link.up = True
            data = {name: value for name, value in message.items() if name not in ("op", "proof", "clock")}
            if "clock" in message:
                asked, since = link.asked
                data |= difference(asked, self._clock() - since, float(message["clock"]))
            self._inbox.add("agent_up", link.address.node, data)
        else:
            self._lose(link, "it is not the agent of this run")

    def _fenced(self, link: Link, message: Message) -> None:
        self._inbox.add("fenced", link.address.node, {"epoch": int(message["epoch"]), "reason": message["reason"]})
        link.leaving = True
        self._lose(link, "a newer controller owns it")

    def _hear_agent(self, link: Link, message: Message) -> None:
        op = message["op"]
        if op == "beat":
            link.step = max(link.step, int(message["step"]))
        elif op == "refused":
            self._fenced(link, message)
        elif op == "holdings":
            self._inbox.add("holdings", link.address.node, message)
        elif op == "event":
            self._hear_event(link, message["event"])

    def _hear_event(self, link: Link, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "reserved":
            self._on_reserved(link, event)
            return
        if kind == "step":
            link.step = max(link.step, int(event["step"]))
        self._inbox.add(kind if kind in AGENT_KINDS else "report", link.address.node, event)

    # -- orders ----------------------------------------------------------------------------------------------------

    def spawn(
        self,
        attempt: int,
        placement: Mapping[str, Sequence[int]],
        env_of: EnvOf,
        kind: Literal["pretrain", "script"] = "pretrain",
        argv: Sequence[str] | None = None,
        cwd: str = "",
    ) -> None:
        """Begin an attempt: reserve the rendezvous port on rank 0's node, then spawn everywhere. Returns at once.

        Args:
            attempt: Number of the attempt, higher than every earlier one.
            placement: Node to its ranks; the order of the nodes is that of their ranks.
            env_of: Makes a rank's variables once the rendezvous port is known.
            kind: Our own worker, or the command ``argv``.
            argv: Command of a script.
            cwd: Folder in which ranks start; the agent's log folder when empty.

        Raises:
            ClusterError: A node of the placement has no living agent.
        """
        missing = [node for node in placement if node not in self.links or not self.links[node].up]
        if missing:
            raise ClusterError(f"No living agent on {', '.join(missing)}.", hint="Place the attempt on other nodes.")
        first = next(node for node, ranks in placement.items() if 0 in ranks)
        self._order = SpawnOrder(
            attempt=attempt, placement=dict(placement), first=first, env_of=env_of, kind=kind, argv=argv, cwd=cwd
        )
        self._send(self.links[first], {"op": "reserve", "attempt": attempt})

    def _on_reserved(self, link: Link, event: dict[str, Any]) -> None:
        order = self._order
        if order is None or event["attempt"] != order.attempt or link.address.node != order.first:
            return
        self._order = None
        for node_rank, (node, ranks) in enumerate(order.placement.items()):
            if node in self.links:  # a node lost meanwhile was observed; the attempt fails by that
                message = order.message(self._epoch, node_rank, ranks, link.address.host, int(event["port"]))
                self._send(self.links[node], message)

    def kill(self, attempt: int, grace_s: float = 0.0) -> None:
        """End the ranks of an attempt everywhere: SIGTERM, after ``grace_s`` SIGKILL; each node answers ``killed``."""
        if self._order is not None and self._order.attempt == attempt:  # what is left of an old one stops no new one
            self._order = None
        self._send_all({"op": "kill", "attempt": attempt, "grace_s": grace_s})

    def leave(self, attempt: int, after: int, *, in_memory: bool = False) -> None:
        """Ask every rank of an attempt to save, or only to copy, and leave when it has completed step ``after``."""
        self._send_all({"op": "leave", "attempt": attempt, "after": after, "in_memory": in_memory})

    def dump(self, attempt: int) -> None:
        """Ask every node where the ranks of an attempt stand; each rank answers with ``stack``."""
        self._send_all({"op": "dump", "attempt": attempt})

    def ask_holdings(self, number: int) -> set[str]:
        """Ask what every node holds in memory; each answers with ``holdings``, and the returned nodes were asked."""
        asked = [link for link in self.links.values() if link.up]
        for link in asked:
            self._send(link, {"op": "holdings", "id": number})
        return {link.address.node for link in asked}

    def shutdown_agents(self) -> None:
        """Tell every agent to end its ranks and itself; the links vanish without ``agent_lost``."""
        self._order = None
        for link in [link for link in self.links.values() if link.up]:
            link.leaving = True
        self._send_all({"op": "shutdown"})

    def close(self) -> None:
        """Drop every connection; agents and ranks go on, and can be adopted."""
        for link in self.links.values():
            link.stream.flush()
            link.stream.close("closed")
        self.links.clear()
        self._silence.clear()
        self._selector.close()

"""The host agent: one per node, the hands of the controller there, and the keeper of its lease.

A loop over sockets and pipes in one thread; what touches the run directory is done beside it, as a share may not
answer for long (:mod:`launcher.host.beside`). It imports neither torch nor ray, so it starts at once and can live in
the thread of an actor or as a process of its own (``python -P -m launcher.host.agent --run-dir D --node NAME --bind
ADDR --slots N``). It never gives up running ranks lightly: a controller that goes away is waited for, and only when
no controller has been heard *and* no step was completed for the whole lease are the ranks killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths
from launcher.backend import AgentAddress
from launcher.host import announce, scratch, wire
from launcher.host.beside import PATIENCE_S, Beside
from launcher.host.environment import Environments
from launcher.host.events import EventLog
from launcher.host.logs import MAX_LOG_BYTES, RankLogs
from launcher.host.peers import Identity, Peer, Peers
from launcher.host.persister_link import PersisterLink
from launcher.host.pool_link import PoolEvents, PoolLink
from launcher.host.ranks import Ranks
from launcher.host.stacks import Stacks
from launcher.host.wire import Message
from launcher.spawn_order import check_order
from strategies.errors import PhalanxError

_LOOK_ROUND_S = 5.0
_WITHDRAW_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentOptions:
    """How an agent behaves. Durations in seconds.

    Attributes:
        detect_s: The controller takes an agent for lost when it is silent for so long; four beats are sent in it.
        lease_s: Without controller and without progress for so long, the agent ends its ranks and itself.
        grace_s: From SIGTERM to SIGKILL of the ranks when the agent itself is told to leave.
        preempt_grace_s: From the notice that the node will be taken away to the end of its ranks.
        kill_patience_s: An agent that ends waits for so long until its ranks are dead.
        warm: ``module:function`` that warms the pool up; empty for a pool that starts every rank afresh.
        target: ``module:function`` that a rank of our own runs.
        env: Variables added to the environment of pool and ranks.
        log_parent: Folder for the private folder of logs; the system's temporary folder when empty.
        max_log_bytes: Size at which a rank's log is cut.
        incarnation: Random word; made when empty.
    """

    detect_s: float = 5.0
    lease_s: float = 60.0
    grace_s: float = 5.0
    preempt_grace_s: float = 25.0
    kill_patience_s: float = 60.0
    warm: str = "jobs.warm:warm"
    target: str = "jobs.worker:main"
    env: Mapping[str, str] = field(default_factory=dict)
    log_parent: str = ""
    max_log_bytes: int = MAX_LOG_BYTES
    incarnation: str = ""


class HostAgent:
    """One node's agent; :meth:`serve` does everything.

    Args:
        run_dir: The run directory; holds the secret and receives the announcement.
        node: The node's name.
        bind: Address to listen on; ranks on other nodes reach this node by it.
        slots: Number of devices here.
        options: Behaviour.

    Attributes:
        address: Where the agent listens.

    Raises:
        StorageError: The secret cannot be read.
        OSError: The address cannot be bound.
    """

    def __init__(
        self, *, run_dir: str | Path, node: str, bind: str, slots: int, options: AgentOptions | None = None
    ) -> None:
        self._options = options or AgentOptions()
        self._paths = RunPaths(run_dir)
        self._secret = wire.read_secret(self._paths.secret)
        self._beside = Beside(patience_s=min(PATIENCE_S, self._options.detect_s / (2 * wire.BEATS)))
        family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        self._listener = socket.create_server((bind, 0), family=family, backlog=64)
        self.address = AgentAddress(
            node=node,
            host=bind,
            port=self._listener.getsockname()[1],
            pid=os.getpid(),
            slots=slots,
            incarnation=self._options.incarnation or secrets.token_hex(8),
        )
        self._wakeup, self._wakeup_write = socket.socketpair()
        self._asked_to_stop = ""
        self._noticed = ""
        self._notice_until: float | None = None
        self._leaving = ""
        self._leave_by: float | None = None
        self._left = ""
        self._log_folder_stays = True

    def stop(self, reason: str) -> None:
        """Ask the agent to leave; safe from any thread and from a signal handler."""
        self._asked_to_stop = self._asked_to_stop or reason
        with contextlib.suppress(OSError):
            self._wakeup_write.send(b"x", socket.MSG_DONTWAIT)

    def notice(self, reason: str) -> None:
        """The node will be taken away: let the ranks leave in good order, for at most ``preempt_grace_s``.

        Safe from any thread and from a signal handler. A second notice means at once.
        """
        if self._noticed:
            self.stop(reason)
            return
        self._noticed = reason
        with contextlib.suppress(OSError):
            self._wakeup_write.send(b"x", socket.MSG_DONTWAIT)

    def serve(self) -> str:
        """Run until shut down, told to leave, or out of its lease; every process it started is gone then.

        Returns:
            Why it ended: ``shutdown``, ``lease`` or the reason given to :meth:`stop`.
        """
        with contextlib.ExitStack() as cleanup:
            # Last of all: what runs here is ended whether the run directory answers or not.
            withdraw = partial(announce.remove, self._paths, self.address)
            cleanup.callback(self._beside.do, withdraw, None, patience_s=_WITHDRAW_S)
            self._set_up(cleanup)
            announce.write(self._paths, self.address)
            while not self._left:
                for key, _ in self._selector.select(self._timeout()):
                    key.data()
                self._tick()
        return self._left

    def _set_up(self, cleanup: contextlib.ExitStack) -> None:
        options = self._options
        self._selector = selectors.DefaultSelector()
        cleanup.callback(self._selector.close)
        for end in (self._wakeup, self._wakeup_write):
            cleanup.callback(end.close)
            end.setblocking(False)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._woken)
        self._heard = self._beat_at = self._look_at = time.monotonic()
        self._events = EventLog()
        self._logs = RankLogs(
            self._paths,
            self.address.node,
            self._beside,
            parent=options.log_parent or None,
            max_bytes=options.max_log_bytes,
        )
        cleanup.callback(self._put_logs_away)
        environments = Environments(os.environ, address=self.address.host, extra=options.env)
        self._persister = PersisterLink(
            selector=self._selector,
            environments=environments,
            run_dir=self._paths.root,
            host=self.address.host,
            folder=self._logs.folder,
            incarnation=self.address.incarnation,
            died=self._on_persister_died,
        )
        self._ranks = Ranks(
            selector=self._selector,
            environments=environments,
            events=self._events,
            logs=self._logs,
            persister=self._persister.path,
        )
        self._pool = PoolLink(
            selector=self._selector,
            environments=environments,
            events=PoolEvents(
                ready=self._on_pool_ready,
                spawned=self._ranks.on_spawned,
                failed=self._ranks.on_failed,
                exited=self._ranks.on_exited,
                died=self._on_pool_died,
            ),
            folder=self._logs.folder,
            incarnation=self.address.incarnation,
            warm=options.warm,
            target=options.target,
        )
        cleanup.callback(self._clear_disks)
        cleanup.callback(self._pool.close)
        cleanup.callback(self._persister.close)  # first: the pool ends by killing all that carries our mark
        self._ranks.attach(self._pool)
        self._stacks = Stacks(self._logs)
        self._peers = Peers(
            listener=self._listener,
            selector=self._selector,
            identity=Identity(secret=self._secret, incarnation=self.address.incarnation),
            log=self._events,
            welcome=self._welcome,
            on_message=self._on_message,
        )
        cleanup.callback(self._peers.close, linger_s=1.0)

    # -- the loop --------------------------------------------------------------------------------------------------

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakeup.recv(4096)

    def _timeout(self) -> float:
        now = time.monotonic()
        deadlines = [self._beat_at, now + 0.5 if self._peers.has_strangers else self._beat_at]
        possible = [self._ranks.next_deadline(), self._stacks.due, self._notice_until, self._leave_by]
        possible += [self._pool.due(now), self._persister.due(now)]
        deadlines += [at for at in possible if at is not None]
        return max(0.0, min(deadlines) - now)

    def _tick(self) -> None:
        now = time.monotonic()
        self._pool.tick()
        self._persister.tick()
        self._ranks.tick(now)
        self._peers.tick(now)
        for answer in self._stacks.collect(now):
            self._events.append({"kind": "stack", "attempt": self._ranks.attempt} | answer)
        if self._asked_to_stop:
            self._leave(self._asked_to_stop, self._options.grace_s)
        elif self._noticed:
            self._heed_notice(now)
        if now >= self._beat_at:
            self._beat_at = now + self._options.detect_s / wire.BEATS
            if self._peers.owner is not None:
                self._peers.send(self._peers.owner, {"op": "beat", "step": self._ranks.step})
        if now >= self._look_at:
            self._look_at = now + _LOOK_ROUND_S
            self._ranks.look_round()
        if now - max(self._heard, self._ranks.progress_at) > self._options.lease_s:
            self._leave("lease", 0.0)
        if self._leave_by is not None and now >= self._leave_by:
            self._end()
        self._peers.pump()

    def _heed_notice(self, now: float) -> None:
        """Stay as long as ranks of ours may still leave in good order; a script is told by its own SIGTERM."""
        if not self._ranks.alive or self._ranks.kind == "script" or self._peers.owner is None:
            script = self._ranks.kind == "script"
            self._leave(self._noticed, self._options.preempt_grace_s if script else self._options.grace_s)
        elif self._notice_until is None:
            self._notice_until = now + self._options.preempt_grace_s
            self._events.append({"kind": "notice", "reason": self._noticed, "within_s": self._options.preempt_grace_s})
        elif now >= self._notice_until:
            self._leave(self._noticed, 0.0)

    def _leave(self, reason: str, grace_s: float) -> None:
        """Tell the owner, end the ranks, then end the loop."""
        if self._leaving:
            return
        self._leaving, self._notice_until = reason, None
        self._leave_by = time.monotonic() + grace_s + self._options.kill_patience_s
        self._events.append({"kind": "leaving", "reason": reason})
        self._ranks.kill(self._ranks.attempt, grace_s, self._end)

    def _end(self) -> None:
        self._left = self._leaving

    def _clear_disks(self) -> None:
        scratch.clear(self._ranks, self._paths, self._beside, mark=f"{self.address.incarnation}.")

    def _put_logs_away(self) -> None:
        if not self._log_folder_stays or not self._logs.has_any:
            self._logs.remove()

    # -- the pool --------------------------------------------------------------------------------------------------

    def _on_pool_ready(self, reason: str) -> None:
        state = "failed" if reason else "ready"
        self._events.append({"kind": "pool", "state": state, "reason": reason, "pid": self._pool.pid})
        self._ranks.start_waiting()

    def _on_pool_died(self, reason: str) -> None:
        self._events.append({"kind": "pool", "state": "failed", "reason": reason})
        self._ranks.on_pool_died()

    def _on_persister_died(self, reason: str) -> None:
        self._events.append({"kind": "pool", "state": "persister", "reason": reason})

    # -- the controller --------------------------------------------------------------------------------------------

    def _welcome(self) -> Message:
        address = self.address
        identity = {"node": address.node, "incarnation": address.incarnation, "pid": address.pid}
        described = {"slots": address.slots, "pool": self._pool.pid} | identity | self._ranks.describe()
        if self._notice_until is not None:
            described["leaves_in_s"] = max(0.0, self._notice_until - time.monotonic())
        return described

    def _on_message(self, peer: Peer, message: Message) -> None:
        try:
            self._obey(peer, message)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            # A malformed order, or one that this node cannot carry out: its controller goes on without the node.
            print(f"dropped a peer for {message.get('op')!r}: {error!r}", file=sys.stderr, flush=True)
            self._peers.drop(peer, "the order cannot be carried out")

    def _obey(self, peer: Peer, message: Message) -> None:
        op = message["op"]
        if op == "tail":
            self._tail(peer, message)
            return
        if peer is not self._peers.owner:
            return
        self._heard = time.monotonic()
        actions: dict[str, Callable[[], None]] = {
            "beat": lambda: None,
            "reserve": lambda: self._ranks.reserve(self.address.host, int(message["attempt"])),
            "spawn": lambda: self._spawn(peer, message),
            "holdings": lambda: self._persister.ask(lambda held: self._tell_holdings(peer, message, held)),
            "dump": lambda: self._dump(int(message["attempt"])),
            "leave": lambda: self._ranks.leave(message),
            "kill": lambda: self._kill(int(message["attempt"]), float(message.get("grace_s", 0.0))),
            "shutdown": self._shut_down,
        }
        actions[op]()

    def _spawn(self, peer: Peer, message: Message) -> None:
        check_order(message)
        if message["epoch"] == peer.epoch and not self._leaving and not self._noticed:
            self._ranks.spawn(message)

    def _tell_holdings(self, peer: Peer, message: Message, held: Message) -> None:
        if peer is self._peers.owner:
            self._peers.send(peer, {"op": "holdings", "id": message["id"]} | held)

    def _dump(self, attempt: int) -> None:
        """Ask our own ranks where they stand; a script would die of the signal."""
        if attempt == self._ranks.attempt and self._ranks.kind == "pretrain":
            self._stacks.ask(self._ranks.running(), time.monotonic())

    def _kill(self, attempt: int, grace_s: float) -> None:
        self._ranks.kill(attempt, grace_s, lambda: self._events.append({"kind": "killed", "attempt": attempt}))

    def _shut_down(self) -> None:
        self._log_folder_stays = False
        self._leave("shutdown", 0.0)

    def _tail(self, peer: Peer, message: Message) -> None:
        path = self._ranks.log_path(int(message["attempt"]), int(message["rank"]))
        piece = self._logs.piece_of(path, int(message["offset"]), int(message["limit"]))
        self._peers.send(peer, {"op": "tail", "id": message["id"]} | piece)


def main(argv: list[str] | None = None) -> int:
    """Entry point of an agent that is a process of its own."""
    parser = argparse.ArgumentParser(prog="launcher.host.agent")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--bind", required=True)
    parser.add_argument("--slots", type=int, required=True)
    durations = [(name, float) for name in ("detect-s", "lease-s", "grace-s", "preempt-grace-s", "kill-patience-s")]
    for name, kind in (*durations, ("max-log-bytes", int)):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    for name in ("warm", "target", "log-parent", "incarnation"):
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS)
    given: dict[str, Any] = vars(parser.parse_args(argv))
    place = {name: given.pop(name) for name in ("run_dir", "node", "bind", "slots")}
    try:
        agent = HostAgent(**place, options=AgentOptions(**given))
    except (PhalanxError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda number, _: agent.notice(signal.Signals(number).name))
    print(f"agent of {agent.address.node} ended: {agent.serve()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

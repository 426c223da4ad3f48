"""The ranks of one node: at most one attempt at a time, from the order to spawn them until the last one is gone."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.checkpoint.persister import PERSISTER
from jobs.orders import OrderBook
from launcher.host import process, wire
from launcher.host.child import EXIT_CANNOT_START
from launcher.host.environment import Environments
from launcher.host.events import AGENT_KINDS, EventLog
from launcher.host.killing import Killing, Target
from launcher.host.logs import RankLogs
from launcher.host.oom import VictimWatch
from launcher.host.pool_link import PoolLink
from launcher.host.wire import LineReader, Message

_MAX_REPORT_BYTES = 1 << 16


@dataclass(slots=True, eq=False)
class Rank:
    """One rank of the current attempt.

    Attributes:
        rank: Global rank.
        key: ``attempt/rank``, how the pool knows it.
        log: Where it writes.
        report: Read end of its report pipe; -1 for a script and after its end.
        pid: Process id; 0 until it runs.
        born: When that process was started (:func:`launcher.host.process.birth`).
        status: How it ended (the ``exit`` event); None while it has not.
    """

    rank: int
    key: str
    log: Path
    report: int = -1
    pid: int = 0
    born: int = 0
    fell: bool = False
    status: dict[str, Any] | None = None
    reader: LineReader = field(default_factory=lambda: LineReader(_MAX_REPORT_BYTES))


class Ranks:
    """Spawns, hears and kills the ranks of this node.

    Args:
        selector: The agent's loop; callbacks take no argument.
        environments: Makes the ranks' environments.
        events: Where everything that happens is written.
        logs: Log files.
        persister: Path of the persister's socket.
    """

    def __init__(
        self,
        *,
        selector: selectors.BaseSelector,
        environments: Environments,
        events: EventLog,
        logs: RankLogs,
        persister: str = "",
    ) -> None:
        self._selector = selector
        self._environments = environments
        self._events = events
        self._logs = logs
        self._persister = {PERSISTER: persister} if persister else {}
        self._pool: PoolLink | None = None
        self._by_key: dict[str, Rank] = {}
        self._order: Message | None = None
        self._store: socket.socket | None = None
        self._orders: OrderBook | None = None
        self._killing = Killing(self._targets, self._tell_dying)
        self._stopping = False
        self._published = False
        self._on_empty: list[Callable[[], None]] = []
        self._victims = VictimWatch()
        self.attempt = 0
        self.kind = ""
        self.epoch = 0
        self.step = 0
        self.progress_at = time.monotonic()

    # -- what the agent asks for -----------------------------------------------------------------------------------

    def attach(self, pool: PoolLink) -> None:
        """Use this pool."""
        self._pool = pool

    def reserve(self, address: str, attempt: int) -> None:
        """Bind the rendezvous port of an attempt and keep it until its rank 0 is spawned here."""
        self._close_store()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._store = socket.create_server((address, 0), family=family)
        port = self._store.getsockname()[1]
        self._events.append({"kind": "reserved", "attempt": attempt, "port": port})

    def spawn(self, order: Message) -> None:
        """Start the ranks of an attempt; those of an older attempt are killed first, an older order is ignored."""
        if order["attempt"] <= self.attempt:
            return
        if self.alive:
            self.kill(self.attempt, 0.0, lambda: self.spawn(order))
            return
        self._events.begin_attempt()
        self.attempt, self.epoch, self.step = order["attempt"], order["epoch"], 0
        self.kind = order["kind"]
        self.progress_at = time.monotonic()
        self._by_key.clear()
        self._stopping, self._published = False, False
        self._logs.forget_old_attempts(self.attempt)
        self._renew_orders()
        for entry in order["ranks"]:
            key = f"{self.attempt}/{entry['rank']}"
            self._by_key[key] = Rank(entry["rank"], key, self._logs.path(self.attempt, entry["rank"]))
        self._order = order
        self.start_waiting()

    def start_waiting(self) -> None:
        """Hand the waiting ranks to the pool, as soon as it is ready."""
        if self._order is None or self._pool is None or not self._pool.ready:
            return
        order, self._order = self._order, None
        if order["kind"] == "script":
            self._close_store()  # a script binds the port itself: it is free from here on
        for entry in order["ranks"]:
            self._start(self._by_key[f"{self.attempt}/{entry['rank']}"], order, entry.get("env", {}))
        self._close_store()

    def _start(self, rank: Rank, order: Message, variables: dict[str, str]) -> None:
        assert self._pool is not None
        ours = order["kind"] == "pretrain"
        try:
            fds = self._descriptors(rank, ours=ours)
        except OSError as error:
            self._ended(rank, EXIT_CANNOT_START, None, f"the rank could not be started: {error}")
            return
        variables = order.get("env", {}) | variables | (self._persister if ours else {})
        message = {
            "key": rank.key,
            "name": f"phalanx:r{rank.rank}",
            "env": self._environments.rank(variables, ours=ours, mark=self._pool.mark),
            "cwd": order.get("cwd") or str(self._logs.folder),
            "argv": None if ours else order["argv"],
        }
        self._pool.spawn(message, fds)

    def _descriptors(self, rank: Rank, *, ours: bool) -> dict[str, int]:
        """Everything that the rank inherits, by name."""
        log, rank.log = self._logs.open(self.attempt, rank.rank)
        fds = {"log": log}
        if ours:
            try:
                rank.report, fds["report"] = os.pipe()
            except OSError:
                os.close(log)
                raise
            os.set_blocking(rank.report, False)
            self._selector.register(rank.report, selectors.EVENT_READ, lambda: self._read(rank))
            if self._orders is not None:
                fds["order"] = self._orders.share()
        if ours and rank.rank == 0 and self._store is not None:
            fds["store"] = self._store.detach()
        return fds

    def kill(self, attempt: int, grace_s: float, then: Callable[[], None]) -> None:
        """End every rank of an attempt: SIGTERM, after ``grace_s`` SIGKILL; calls ``then`` when none is left."""
        if attempt < self.attempt or not self.alive:
            then()
            return
        self._on_empty.append(then)
        if not self._stopping:
            self._note_the_fallen()
        self._stopping = True
        self._close_store()
        if self._order is not None:  # nothing was handed to the pool yet
            self._order = None
            self._by_key.clear()
        self._killing.begin(self._pool, grace_s, time.monotonic())
        self._check_empty()

    def _note_the_fallen(self) -> None:
        """Ranks that are dying already did not die of our order, even if it is here before the news of their end."""
        for rank in self._living():
            rank.fell = bool(rank.pid) and process.is_ending(rank.pid)

    def leave(self, told: Message) -> None:
        """Tell the ranks of an attempt to leave after a step; see :class:`jobs.orders.OrderBook`."""
        if int(told["attempt"]) == self.attempt and self._orders is not None:
            self._orders.leave(int(told["after"]), reached=self.step, in_memory=bool(told.get("in_memory")))

    def _renew_orders(self) -> None:
        if self._orders is not None:
            self._orders.close()
        self._orders = None
        if self.kind == "pretrain":
            with contextlib.suppress(OSError):  # without it nobody can be asked to leave, and all else works
                self._orders = OrderBook()

    # -- state -----------------------------------------------------------------------------------------------------

    def _living(self) -> list[Rank]:
        return [rank for rank in self._by_key.values() if rank.status is None]

    def running(self) -> list[tuple[int, int, Path]]:
        """(rank, process id, log) of every rank that runs."""
        return [(rank.rank, rank.pid, rank.log) for rank in self._living() if rank.pid]

    @property
    def alive(self) -> bool:
        """Whether a rank runs or is about to."""
        return bool(self._living())

    def describe(self) -> Message:
        """The part of the welcome that an adopting controller needs."""
        ranks = [{"rank": rank.rank, "pid": rank.pid, "exited": rank.status} for rank in self._by_key.values()]
        leave_after = self._orders.after if self._orders is not None else 0
        described = {"attempt": self.attempt, "epoch_of_attempt": self.epoch, "ranks": ranks}
        return described | {"leave_after": leave_after}

    def log_path(self, attempt: int, rank: int) -> Path:
        """Where the log of a rank of this or an earlier attempt is."""
        known = self._by_key.get(f"{attempt}/{rank}")
        return known.log if known is not None else self._logs.path(attempt, rank)

    def next_deadline(self) -> float | None:
        """When :meth:`tick` has something to do."""
        return self._killing.due

    # -- what happens ----------------------------------------------------------------------------------------------

    def on_spawned(self, key: str, pid: int, fresh: str) -> None:
        """A rank runs."""
        rank = self._by_key.get(key)
        if rank is None:
            return
        rank.pid, rank.born = pid, process.birth(pid)
        self._victims.begin(pid)
        if fresh:
            self._events.append({"kind": "pool", "state": "fresh", "reason": fresh, "rank": rank.rank})
        if self._stopping:
            self._killing.send(self._pool, signal.SIGKILL)
        if all(other.pid for other in self._by_key.values()):
            ranks = [{"rank": other.rank, "pid": other.pid} for other in self._by_key.values()]
            self._events.append({"kind": "spawned", "attempt": self.attempt, "ranks": ranks})

    def on_failed(self, key: str, reason: str) -> None:
        """A rank could not be started."""
        rank = self._by_key.get(key)
        if rank is not None:
            self._ended(rank, EXIT_CANNOT_START, None, f"the rank could not be started: {reason}")

    def on_exited(self, key: str, code: int | None, signum: int | None) -> None:
        """A rank's process is gone."""
        rank = self._by_key.get(key)
        if rank is not None and rank.status is None:
            self._ended(rank, code, signum, "")

    def on_pool_died(self) -> None:
        """Every rank of the pool is gone with it; ranks that still wait will be started by the next pool."""
        for rank in self._living():
            if self._order is None:
                self._ended(rank, None, int(signal.SIGKILL), "")

    def _read(self, rank: Rank) -> None:
        """Pass on what a rank reports, at most 64 KiB at a time."""
        if rank.report < 0:
            return
        try:
            data = os.read(rank.report, _MAX_REPORT_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._close_report(rank)
            return
        self._report(rank, data)

    def _report(self, rank: Rank, data: bytes) -> None:
        try:
            lines = rank.reader.feed(data)
        except wire.WireError:
            return
        for line in lines:
            try:
                report = wire.decode(line)
            except wire.WireError:
                continue
            if report.get("kind") in AGENT_KINDS:  # a rank does not speak for its agent
                continue
            if report.get("kind") == "step" and isinstance(report.get("step"), int):
                self.step = max(self.step, report["step"])
                self.progress_at = time.monotonic()
            self._events.append(report | {"rank": rank.rank, "attempt": self.attempt})

    def _drain(self, rank: Rank) -> None:
        """Read the rest of the reports: what a rank said last must come before its exit."""
        while rank.report >= 0:
            try:
                data = os.read(rank.report, _MAX_REPORT_BYTES)
            except BlockingIOError:
                break  # a process that the rank left behind still holds the pipe
            if not data:
                break
            self._report(rank, data)
        self._close_report(rank)

    def _close_report(self, rank: Rank) -> None:
        if rank.report >= 0:
            self._selector.unregister(rank.report)
            os.close(rank.report)
            rank.report = -1

    def _ended(self, rank: Rank, code: int | None, signum: int | None, reason: str) -> None:
        self._drain(rank)
        log_tail = "\n".join(filter(None, [self._logs.tail(rank.log), reason]))
        requested = self._stopping and not rank.fell
        rank.status = {
            "kind": "exit",
            "rank": rank.rank,
            "attempt": self.attempt,
            "pid": rank.pid,
            "code": code,
            "signal": signum,
            "requested": requested,
            "oom": "" if requested else self._victims.verdict(rank.pid, code, signum),
            "log_tail": log_tail,
            "time": time.time(),
        }
        self._events.append(rank.status)
        if code != 0 and not self._stopping and not self._published:
            self._published = True
            self._logs.publish(self.attempt, rank.rank, rank.log)
        self._check_empty()

    def _check_empty(self) -> None:
        if not self.alive:
            self._killing.end()
            waiting, self._on_empty = self._on_empty, []
            for then in waiting:
                then()

    # -- killing ---------------------------------------------------------------------------------------------------

    def _targets(self) -> list[Target]:
        return [Target(rank.rank, rank.key, rank.pid, rank.born) for rank in self._living()]

    def _tell_dying(self, rows: list[dict[str, Any]], waited_s: float) -> None:
        told = {"attempt": self.attempt, "left": rows, "waited_s": round(waited_s, 1)}
        self._events.append({"kind": "dying"} | told)

    def tick(self, now: float) -> None:
        """Go on with killing."""
        self._killing.tick(self._pool, now)

    def look_round(self) -> None:
        """Cut logs that have grown too large, and see whom the kernel has killed; to be called every few seconds."""
        self._victims.look()
        for rank in self._living():
            self._logs.limit(rank.log)

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

"""Asks the nodes what they hold in memory, before a gang is started."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from jobs.checkpoint.memory import Address, Holding
from jobs.spec import JobSpec
from launcher import lineage
from launcher.clock import Clock
from launcher.generations import Stock, choose
from launcher.observation import Observation
from launcher.progress import OnDisk, ResumePoint
from launcher.run import Run
from launcher.store import write_atomic
from strategies.codec import from_json
from strategies.errors import ConfigError

PATIENCE_S = 1.0  # from then on those that have answered do, if they hold all of a state that is new enough ...
SILENT_S = 30.0  # ... and from then on in any case: a host may be loaded, but its node is up, so somebody is stuck
_TOLD = 3  # nodes by name


class Asks(Protocol):
    """What is needed of the gang."""

    def ask_holdings(self, number: int) -> set[str]:
        """See :meth:`launcher.gang.Gang.ask_holdings`."""


class MemoryTier:
    """One question to all nodes at a time.

    Args:
        clock: Source of time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._number = 0
        self._asked_at = 0.0
        self._asked: set[str] = set()
        self._waiting: set[str] = set()
        self._stocks: dict[str, Stock] = {}
        self._enough: bool | None = None  # whether what is known will do; None when it has changed since
        self._copying: tuple[int, int] = (0, 0)  # attempt, and steps between two copies, as its ranks have told last

    def settle(self, path: Path, point: ResumePoint) -> None:
        """The next attempt begins at ``point``: tell its ranks where the parts are. What is known is old from here on.

        Raises:
            StorageError: The file cannot be written.
        """
        if point.memory is not None:
            write_atomic(path, json.dumps(point.memory.table()).encode())
        self._asked.clear()
        self._waiting.clear()
        self._stocks.clear()
        self._enough = None

    def ready(self, gang: Asks, up: Collection[str], run: Run, job: JobSpec) -> bool:
        """Ask those who were not asked yet; then whether what is known will do.

        It does when every node that is up has answered; a node that is dead is up no longer. One that takes its time is
        waited for, since without it the steps since the last checkpoint on disk may be lost; but not when the others
        hold all of a state that is as new as any can be.

        Args:
            gang: Asks.
            up: Nodes that answer.
            run: The run as its log tells it.
            job: What it does.
        """
        if not self._asked.issuperset(up):
            self._number += 1
            self._asked_at = self._clock.monotonic()
            self._asked = set(up)
            self._waiting = gang.ask_holdings(self._number)
        waiting = self._waiting & set(up)
        waited_s = self._clock.monotonic() - self._asked_at
        if not waiting or waited_s <= PATIENCE_S:
            return not waiting
        if waited_s > SILENT_S:
            told = ", ".join(sorted(waiting)[:_TOLD]) + (", ..." if len(waiting) > _TOLD else "")
            print(f"warning: what {told} may hold in memory is not known after {SILENT_S:.0f} s", flush=True)
            self._waiting.clear()
            return True
        if self._enough is None:
            self._enough = self._will_do(run, job)
        return self._enough

    def _will_do(self, run: Run, job: JobSpec) -> bool:
        if not run.attempts or not job.checkpoint.memory_every:
            return True  # there is nothing that could be held
        number, stocks, skips = run.attempts[-1].number, list(self._stocks.values()), (*job.skips, *run.skips)
        before = run.rollback.before
        found = choose(stocks, beyond=None, branch=None, skips=skips, rejected=run.rejected, before=before)
        # No state is whole that is newer than what a rank's own node has of it.
        own = [held.step for stock in stocks for held in stock.held if held.own and held.attempt == number]
        if found is None or found.attempt != number or not own:
            return False
        told, every = self._copying
        return found.step >= max(own) - max(job.checkpoint.memory_every, every if told == number else 0)

    def note(self, seen: Observation) -> None:
        """Take in what a node says, if it answers the present question; a node that is lost holds nothing.

        And how far apart copies lie (``checkpoint.memory_share``), which ranks tell with their steps.
        """
        if seen.kind == "report" and "copies_every" in seen.data:
            self._copying = int(seen.data["attempt"]), int(seen.data["copies_every"])
        if seen.kind == "agent_lost":
            self._waiting.discard(seen.node)
            self._stocks.pop(seen.node, None)
            self._enough = None
        if seen.kind != "holdings" or seen.data.get("id") != self._number:
            return
        self._waiting.discard(seen.node)
        self._enough = None
        try:
            held = tuple(Holding.read(row) for row in seen.data["held"])
            if held:
                address = from_json(Address, seen.data["address"])
                self._stocks[seen.node] = Stock(node=seen.node, address=address, held=held)
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            print(f"warning: what {seen.node} holds in memory cannot be understood: {error}", flush=True)

    def contents(self) -> frozenset[Stock]:
        """What the nodes hold now."""
        return frozenset(self._stocks.values())

    def better(self, run: Run, job: JobSpec) -> Callable[[OnDisk], ResumePoint]:
        """What finds the newest generation that the nodes hold now, if it is newer than what is on disk; else that."""
        stocks = list(self._stocks.values())

        def choice(disk: OnDisk) -> ResumePoint:
            found = choose(
                stocks,
                beyond=lineage.state_of(disk.point.path),
                branch=disk.branch,
                skips=job.skips,
                rejected=run.rejected,
                before=run.rollback.before,
            )
            if found is None:
                return disk.point
            return ResumePoint(path=str(found.generation), step=found.step, memory=found)

        return choice

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

PATIENCE_S = 1.0  # a node that has not answered by then holds nothing that could be waited for


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

    def ready(self, gang: Asks, up: Collection[str]) -> bool:
        """Ask those who were not asked yet; then whether every node that is up has answered, or has had its time."""
        if not self._asked.issuperset(up):
            self._number += 1
            self._asked_at = self._clock.monotonic()
            self._asked = set(up)
            self._waiting = gang.ask_holdings(self._number)
        waiting = self._waiting & set(up)
        return not waiting or self._clock.monotonic() - self._asked_at > PATIENCE_S

    def note(self, seen: Observation) -> None:
        """Take in what a node says, if it answers the present question; a node that is lost holds nothing."""
        if seen.kind == "agent_lost":
            self._waiting.discard(seen.node)
            self._stocks.pop(seen.node, None)
        if seen.kind != "holdings" or seen.data.get("id") != self._number:
            return
        self._waiting.discard(seen.node)
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
            )
            if found is None:
                return disk.point
            return ResumePoint(path=str(found.generation), step=found.step, memory=found)

        return choice

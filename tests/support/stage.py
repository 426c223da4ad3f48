"""A controller that a test steps by hand: a queue of observations in, the state and the calls after each step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from launcher import adoption
from launcher.controller import Controller
from launcher.gang import Gang
from launcher.lock import ControllerLock
from launcher.run import EventKind, RunEvent, RunState
from launcher.store import RunStore
from tests.support.fakes import FakeBackend, FakeClock, FakeGang, tiny_request


class Stage:
    """A controller with everything around it faked but the run directory and the lock."""

    def __init__(self, root: Path, nodes: tuple[str, ...] = ("a", "b", "c"), **recovery: Any) -> None:
        self.request = tiny_request(root, **recovery)
        self.store = RunStore.create(self.request)
        self.clock = FakeClock()
        self.backend = FakeBackend(nodes)
        self.observer: Callable[[RunEvent | None], None] = lambda event: None
        self.controller: Controller
        self.renew()
        adoption.begin(self.controller)

    def renew(self) -> None:
        self.gang = FakeGang(self.clock)
        self.lock = ControllerLock.acquire(self.store.paths)
        self.controller = Controller(
            self.store,
            self.request,
            self.backend,
            gang=cast(Gang, self.gang),
            lock=self.lock,
            clock=self.clock,
            observer=lambda event: self.observer(event),
        )

    def state(self) -> RunState:
        return self.store.run().state

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.controller.turn()

    def start(self) -> None:
        """Up to the first step of the next attempt."""
        self.turn(2)
        spawns = [call for call in self.gang.calls if call[0] == "spawn"]
        _, attempt, placement = spawns[-1]
        for node, ranks in placement.items():
            self.gang.say("spawned", node, attempt=attempt, ranks=[{"rank": r, "pid": 100 + r} for r in ranks])
        self.gang.say("report", next(iter(placement)), kind="training", rank=0, attempt=attempt, step=1)
        self.turn()

    def report(self, node: str, kind: str, attempt: int, **data: Any) -> None:
        self.gang.say("report", node, kind=kind, attempt=attempt, **data)

    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.store.events()]

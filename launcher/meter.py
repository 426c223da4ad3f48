"""Keeps ``metrics.prom`` of a run up to date beside its controller, from the run directory alone.

A thread of its own that reads what is new in the log and in metrics.jsonl: the controller neither waits for it nor
knows of it. Whatever goes wrong here costs a file, not the run.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.metrics import tells_of_a_step
from jobs.tail import Tail
from launcher import forecast
from launcher.exposition import Facts, exposition, metrics
from launcher.ledger import Book
from launcher.repeated import repeated
from launcher.request import LaunchRequest
from launcher.run import EventKind, Run, RunEvent, advance
from launcher.sizing import plan_of
from launcher.store import RunStore
from strategies.codec import from_json
from strategies.plan import ParallelPlan

PERIOD_S = 5.0
CHUNK_BYTES = 1 << 20


class Meter:
    """The numbers of one run.

    Args:
        store: The run.
        request: What it is.
    """

    def __init__(self, store: RunStore, request: LaunchRequest) -> None:
        self._store, self._request = store, request
        self._events, self._lines = Tail(store.paths.events), Tail(store.paths.metrics)
        self._book = Book(script=request.job.kind == "script")
        self._run = Run()
        self._checkpoint: dict[str, Any] = {}
        self._unsaved = 0
        self._metric: Mapping[str, Any] = {}
        self._predicted: tuple[ParallelPlan, dict[str, Any]] | None = None

    def text(self, now: float) -> str:
        """Take in what is new, and tell all.

        Args:
            now: UTC seconds.
        """
        events = [from_json(RunEvent, line, where="events.jsonl") for line in self._events.read()]
        self._book.follow(events, self._new_lines(), now)
        for event in events:
            if 0 < event.epoch < self._run.epoch:
                continue
            self._run = advance(self._run, event)
            if event.kind is EventKind.CHECKPOINT_COMMITTED:
                self._checkpoint = {"time": event.time, **event.data}
            self._unsaved += event.kind is EventKind.CHECKPOINT_FAILED
        return exposition(self._store.name, metrics(self._facts(now)))

    def _new_lines(self) -> Iterator[Mapping[str, Any]]:
        """Bit by bit: a run of months has more lines than fit into memory."""
        while lines := self._lines.read(CHUNK_BYTES):
            for line in filter(tells_of_a_step, lines):
                self._metric = line
                yield line

    def _facts(self, now: float) -> Facts:
        job, cluster = self._request.job, self._request.cluster
        return Facts(
            run=self._run,
            books=self._book.account(now),
            metric=self._metric,
            steps=None if job.kind == "script" else job.train.steps,
            nodes_up=sum(1 for _ in self._store.paths.agents.glob("*.json")),
            nodes_wanted=cluster.nodes + cluster.spares,
            checkpoint=self._checkpoint,
            unsaved=self._unsaved,
            predicted=self._prediction(),
            now=now,
        )

    def _prediction(self) -> dict[str, Any]:
        plan = (plan_of(self._run.attempt) if self._run.attempt else None) or self._request.job.plan
        if self._predicted is None or self._predicted[0] != plan:
            self._predicted = (plan, forecast.predicted(self._request, plan))
        return self._predicted[1]

    def write(self, now: float) -> None:
        """Renew the file: readers see the old or the new one. What cannot be written is left as it was."""
        path = self._store.paths.exposition
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_text(self.text(now))  # not made durable: in a few seconds there is a newer one
            os.replace(aside, path)
        except Exception:  # numbers for people must not end a run
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


@contextlib.contextmanager
def metering(store: RunStore, request: LaunchRequest, *, period_s: float = PERIOD_S) -> Iterator[None]:
    """Renew ``metrics.prom`` every ``period_s`` while the context lasts, and once at its end."""
    meter = Meter(store, request)
    try:
        with repeated(lambda: meter.write(time.time()), period_s, name="meter"):
            yield
    finally:
        meter.write(time.time())

"""Watching a run: events as sentences, one progress line, and the tail of files that somebody else is writing.

The same display serves a controller in this process (it is its observer) and a run that lives elsewhere, of which only
the run directory is seen. On a terminal the progress line stays at the bottom; elsewhere it is printed now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from jobs.metrics import tells_of_a_step
from jobs.tail import Tail
from launcher.lock import newest_epoch
from launcher.render import seconds
from launcher.render_events import event_line, progress_line
from launcher.run import EventKind, Run, RunEvent, RunState, advance
from launcher.store import RunStore, read_event
from strategies.errors import ClusterError

PLAIN_EVERY_S = 5.0
POLL_S = 0.25
SILENT_NOTICE_S = 20.0
SILENT_LIMIT_S = 120.0


class Screen:
    """Where sentences and the progress line go: plain text.

    Args:
        stream: A text stream.
        clock: Monotonic seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._printed_at = float("-inf")
        self.bar = 0

    def say(self, text: str) -> None:
        """One sentence."""
        self._write(text)

    def progress(self, text: str) -> None:
        """The progress line; not more often than people care to read it."""
        if self._clock() - self._printed_at >= PLAIN_EVERY_S:
            self._printed_at = self._clock()
            self._write(text)

    def close(self) -> None:
        """Leave the stream as it was."""

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except (BrokenPipeError, ValueError):
            pass  # nobody reads any more; the run goes on


class LiveScreen(Screen):
    """A terminal: the progress line stays at the bottom while sentences pass above it."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        from rich.console import Console
        from rich.live import Live

        self.bar = 20
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()

    def say(self, text: str) -> None:
        """One sentence, above the progress line."""
        self._console.print(text, markup=False)

    def progress(self, text: str) -> None:
        """Redraw the progress line."""
        from rich.text import Text

        self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def close(self) -> None:
        """Remove the progress line."""
        self._live.stop()


def screen(stream: TextIO | None = None) -> Screen:
    """The right screen for a stream (stderr by default)."""
    stream = stream or sys.stderr
    return LiveScreen(stream) if stream.isatty() else Screen(stream)


class Display:
    """Shows one run on a screen. Call it with every event, and with None now and then.

    Args:
        store: The run.
        steps: Steps of the whole run; None when unknown.
        onto: Where to show it.
        clock: UTC seconds.
    """

    def __init__(
        self, store: RunStore, *, steps: int | None, onto: Screen, clock: Callable[[], float] = time.time
    ) -> None:
        self._screen = onto
        self._steps = steps
        self._clock = clock
        self._metrics = Tail(store.paths.metrics)
        self._metric: Mapping[str, Any] = {}
        self.run: Run = store.run()
        self._since = self.run.submitted or clock()

    def __call__(self, event: RunEvent | None) -> None:
        """Take in one event, or only look at the progress."""
        if event is not None:
            self.run = advance(self.run, event)
            text = event_line(event)
            if event.kind is EventKind.RESUME_REQUESTED:
                self._since = event.time
            if text:
                self._screen.say(f"[{seconds(max(0.0, event.time - self._since)):>9}] {text}")
            return
        self._metric = [self._metric, *filter(tells_of_a_step, self._metrics.read())][-1]
        if not self.run.state.terminal:
            self._screen.progress(self.line())

    def say(self, text: str) -> None:
        """A sentence of the client's own."""
        self._screen.say(text)

    def hint(self, text: str) -> None:
        """How far something is that is not the run itself."""
        self._screen.progress(text)

    def line(self) -> str:
        """The progress line as of now."""
        return progress_line(
            state=self.run.state.value,
            attempt=len(self.run.attempts),
            steps=self._steps,
            metric=self._metric,
            checkpoint=self.run.committed_step,
            elapsed_s=max(0.0, self._clock() - self._since),
            bar=self._screen.bar,
        )


def follow(
    store: RunStore,
    display: Display,
    *,
    after: int = 0,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> RunState:
    """Watch a run that somebody else controls until it ends.

    Args:
        store: The run.
        display: Shows it; it already knows the events up to ``after``.
        after: Number of the last event that is old news.
        sleep: Waits.
        clock: Monotonic seconds.

    Raises:
        ClusterError: No controller has given a sign of life for long.
    """
    tail = Tail(store.paths.events)
    pulse = _Pulse(store, clock)
    while True:
        for line in tail.read():
            event = read_event(line)
            if event.seq > after:
                display(event)
        display(None)
        if display.run.state.terminal:
            return display.run.state
        pulse.check(display)
        sleep(POLL_S)


class _Pulse:
    """Notices when nobody controls a run any more: neither the log nor the heartbeat moves."""

    def __init__(self, store: RunStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._last: tuple[int, str, int] = (0, "", 0)
        self._since = clock()
        self._noticed = False

    def check(self, display: Display) -> None:
        paths = self._store.paths
        epoch = newest_epoch(paths)
        beat = paths.controllers / f"{epoch}.beat"
        events = paths.events.stat().st_size if paths.events.exists() else 0
        now = (epoch, beat.read_text() if beat.exists() else "", events)
        if now != self._last:
            self._last, self._since, self._noticed = now, self._clock(), False
            return
        silent = self._clock() - self._since
        if silent > SILENT_LIMIT_S:
            raise ClusterError(
                f"The controller of '{self._store.name}' has been silent for {silent:.0f} s.",
                why="its process or its cluster is gone; what it wrote is safe in the run directory",
                hint=f"phalanx resume {self._store.name}",
            )
        if silent > SILENT_NOTICE_S and not self._noticed:
            self._noticed = True
            display.say(f"the controller has been silent for {silent:.0f} s; waiting for it to come back")

"""Watching a run: tails, screens, and a controller that falls silent."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from launcher.follow import SILENT_LIMIT_S, SILENT_NOTICE_S, Display, LiveScreen, Screen, follow, screen
from launcher.run import EventKind, RunState
from launcher.store import append_line
from strategies.errors import ClusterError
from tests.support.runs import T0, add_steps, begin_attempt, make_run, put, recovered_run


def test_plain_screen_prints_progress_now_and_then() -> None:
    now = [0.0]
    stream = io.StringIO()
    plain = Screen(stream, lambda: now[0])
    for second in range(12):
        now[0] = float(second)
        plain.progress(f"at {second}")
    plain.say("done")
    assert stream.getvalue() == "at 0\nat 5\nat 10\ndone\n"
    stream.close()
    plain.say("nobody listens")  # the run does not care


def test_live_screen_keeps_the_line_at_the_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    live = screen(stream)
    assert isinstance(live, LiveScreen)
    live.progress("running  step 1")
    live.say("node [a] was lost")
    live.progress("running  step 2")
    live.close()
    assert "node [a] was lost" in stream.getvalue()
    assert "step 2" in stream.getvalue()
    assert not isinstance(screen(io.StringIO()), LiveScreen)


def test_follow_tells_the_story_and_ends_with_the_run(tmp_path: Path) -> None:
    finished = recovered_run(tmp_path / "a").paths.events.read_bytes().splitlines(keepends=True)
    store = make_run(tmp_path / "b")
    stream = io.StringIO()
    display = Display(store, steps=20, onto=Screen(stream, lambda: 0.0), clock=lambda: T0 + 50)
    rest = finished[1:]

    def sleep(unused: float) -> None:
        with store.paths.events.open("ab") as file:
            file.write(rest.pop(0))

    assert follow(store, display, after=1, sleep=sleep) is RunState.SUCCEEDED
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("queued")
    assert "failure: node c was lost" in stream.getvalue()
    assert lines[-1].endswith("succeeded at step 20")
    assert "[   31.0 s] succeeded" in lines[-1]


def test_progress_shows_the_newest_step(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    display = Display(store, steps=20, onto=Screen(io.StringIO()), clock=lambda: T0 + 10)
    begin_attempt(store, 1, 2.0, nodes=["a", "b", "c", "d"], step=1, reason="start")
    add_steps(store, 1, 1, 3, 4.0)
    for event in store.events()[1:]:
        display(event)
    display(None)
    assert display.line() == "running     10.0 s  step 3/20  loss 8.2500  1000 tokens/s  attempt 1"


def test_what_others_write_into_the_same_files_ends_nobodys_watch(tmp_path: Path) -> None:
    """A controller that was replaced and writes late; code of the user's that keeps its own figures beside ours."""
    store = make_run(tmp_path)
    display = Display(store, steps=20, onto=Screen(io.StringIO()), clock=lambda: T0 + 10)
    begin_attempt(store, 1, 2.0, nodes=["a", "b", "c", "d"], step=1, reason="start")
    add_steps(store, 1, 1, 3, 4.0)
    store.append(EventKind.CONTROLLER_STARTED, epoch=2, host="h", pid=1, adopted=True)
    store.append(EventKind.RUN_FAILED, epoch=1, reason="too late")
    store.append(EventKind.RUN_SUBMITTED, epoch=2, request="not allowed here")
    append_line(store.paths.metrics, b'{"accuracy": 0.5}\n')
    for event in store.events()[1:]:
        display(event)
    display(None)
    assert display.run == store.run()
    assert display.run.state is RunState.RUNNING
    assert "step 3/20" in display.line()


def test_silent_controller_is_noticed_then_given_up(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    put(store, 1.0, EventKind.CONTROLLER_STARTED, host="h", pid=1, adopted=False)
    stream, now = io.StringIO(), [0.0]
    display = Display(store, steps=20, onto=Screen(stream, lambda: now[0]))

    def sleep(unused: float) -> None:
        now[0] += SILENT_NOTICE_S / 2

    with pytest.raises(ClusterError, match="has been silent") as caught:
        follow(store, display, sleep=sleep, clock=lambda: now[0])
    assert "phalanx resume demo" in str(caught.value)
    assert stream.getvalue().count("waiting for it to come back") == 1
    assert now[0] > SILENT_LIMIT_S

"""Reading ahead: what is read when, in which order, and how it ends."""

from __future__ import annotations

import threading
import traceback
from collections import defaultdict
from collections.abc import Callable

import pytest

from jobs.data.ahead import ReadAhead

LONG_S = 30.0


class Reader:
    """Reads steps; a test sees which were begun, and lets one fail or wait."""

    def __init__(self) -> None:
        self.begun: dict[int, threading.Event] = defaultdict(threading.Event)
        self.goes_on: dict[int, threading.Event] = {}
        self.error: tuple[int, Exception] | None = None

    def __call__(self, step: int, breathe: Callable[[], None]) -> str:
        self.begun[step].set()
        breathe()
        if step in self.goes_on:
            assert self.goes_on[step].wait(LONG_S)
            breathe()
        if self.error is not None and self.error[0] == step:
            raise self.error[1]
        return f"of {step}"


def test_the_next_step_is_read_while_one_is_used() -> None:
    reader = Reader()
    ahead = ReadAhead(reader, 5, 9)
    for step in range(5, 10):
        assert ahead.take(step) == f"of {step}"
        if step < 9:  # nobody has asked for it
            assert reader.begun[step + 1].wait(LONG_S)
    ahead.close()
    assert sorted(reader.begun) == [5, 6, 7, 8, 9], "the last step is the last"


def test_one_step_is_ready_and_no_more() -> None:
    reader = Reader()
    ahead = ReadAhead(reader, 1, 100)
    assert ahead.take(1) == "of 1"
    assert reader.begun[2].wait(LONG_S)
    assert not reader.begun[3].wait(0.2)
    assert ahead.take(2) == "of 2"
    assert reader.begun[3].wait(LONG_S)
    ahead.close()


def test_a_step_waits_for_what_is_not_read_yet() -> None:
    reader = Reader()
    reader.goes_on = {2: threading.Event()}
    ahead = ReadAhead(reader, 1, 3)
    ahead.take(1)
    assert reader.begun[2].wait(LONG_S)
    threading.Timer(0.05, reader.goes_on[2].set).start()
    assert [ahead.take(2), ahead.take(3)] == ["of 2", "of 3"]
    ahead.close()


def test_an_error_is_that_of_its_step_with_its_own_traceback() -> None:
    reader = Reader()
    reader.error = (3, OSError("the shelf is gone"))
    ahead = ReadAhead(reader, 1, 9)
    assert [ahead.take(1), ahead.take(2)] == ["of 1", "of 2"], "what was read before is good"
    for _ in range(2):
        with pytest.raises(OSError, match="the shelf is gone") as caught:
            ahead.take(3)
        assert "in __call__" in "".join(traceback.format_exception(caught.value)), "where it was raised"
    assert 4 not in reader.begun
    ahead.close()


def test_steps_are_taken_in_order() -> None:
    ahead = ReadAhead(Reader(), 1, 3)
    with pytest.raises(ValueError, match="step 2 was asked for, the turn is that of step 1"):
        ahead.take(2)
    for step in (1, 2, 3):
        ahead.take(step)
    with pytest.raises(IndexError, match="nothing is read after step 3"):
        ahead.take(4)
    ahead.close()


@pytest.mark.parametrize("last", [4, 5])
def test_nothing_is_left_to_read(last: int) -> None:
    reader = Reader()
    ahead = ReadAhead(reader, 5, last)
    if last == 5:
        ahead.take(5)
    ahead.close()
    assert not ahead._thread.is_alive()
    assert list(reader.begun) == [5][: last - 4], "and nothing is read"


def test_the_end_comes_after_the_sample_at_hand() -> None:
    reader = Reader()
    reader.goes_on = {1: threading.Event()}
    ahead = ReadAhead(reader, 1, 100)
    assert reader.begun[1].wait(LONG_S)
    threading.Timer(0.05, reader.goes_on[1].set).start()
    ahead.close()
    assert not ahead._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        ahead.take(1)
    assert 2 not in reader.begun


def test_a_reader_that_hangs_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.data.ahead.CLOSE_S", 0.05)
    reader = Reader()
    reader.goes_on = {1: threading.Event()}
    ahead = ReadAhead(reader, 1, 9)
    assert reader.begun[1].wait(LONG_S)
    ahead.close()
    assert ahead._thread.is_alive()
    reader.goes_on[1].set()
    ahead._thread.join(LONG_S)
    assert 2 not in reader.begun


def test_nothing_is_begun_after_the_end() -> None:
    reader = Reader()
    ahead = ReadAhead(reader, 1, 100)
    assert reader.begun[1].wait(LONG_S)
    ahead.take(1)
    assert reader.begun[2].wait(LONG_S)
    while not ahead._ready:
        threading.Event().wait(0.001)
    ahead.close()  # while it waits for step 2 to be taken
    assert not ahead._thread.is_alive()
    assert 3 not in reader.begun


def test_the_thread_does_not_keep_a_process_alive() -> None:
    ahead = ReadAhead(Reader(), 1, 9)
    assert ahead._thread.daemon
    ahead.close()

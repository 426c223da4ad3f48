"""A controller that is killed between a record and what follows from it: its successor goes on, wherever that was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import adoption
from launcher.run import EventKind, RunEvent, RunState
from tests.launcher.test_origin import a_node_is_lost, a_rank_falls, trained
from tests.support.stage import Stage


class Killed(BaseException):
    """Nothing of the controller's own is run any more."""


def killed_after(stage: Stage, number: int) -> list[RunEvent]:
    """From now on the controller writes so many events and dies of the last; what it has written is added."""
    written: list[RunEvent] = []

    def observe(event: RunEvent | None) -> None:
        if event is not None:
            written.append(event)
            if len(written) == number:
                raise Killed

    stage.observer = observe
    return written


def records(end: Callable[[Stage], None], root: Path) -> list[EventKind]:
    """What is written from the failure to the first step after it, when nobody is killed."""
    stage, _ = trained(root)
    written = killed_after(stage, 0)
    end(stage)
    stage.start()
    return [event.kind for event in written]


@pytest.mark.parametrize("end", [a_node_is_lost, a_rank_falls])
def test_a_successor_goes_on_from_every_record(end: Callable[[Stage], None], tmp_path: Path) -> None:
    kinds = records(end, tmp_path / "quiet")
    assert {EventKind.FAILURE_DETECTED, EventKind.GANG_STOPPED, EventKind.DECISION} <= set(kinds)
    assert kinds.index(EventKind.ATTEMPT_PLANNED) < kinds.index(EventKind.TRAINING_STARTED)
    before_training = kinds.index(EventKind.RANKS_SPAWNED)
    for number in range(1, before_training + 1):
        stage, (_, newest) = trained(tmp_path / str(number))
        written = killed_after(stage, number)
        with pytest.raises(Killed):
            end(stage)
        assert [event.kind for event in written] == kinds[:number]
        stage.observer = lambda event: None
        stage.lock.release()
        stage.renew()
        adoption.begin(stage.controller)
        stage.clock.now += 60.0  # a back-off, if there is one
        stage.start()
        run = stage.store.run()
        what = f"killed after {kinds[number - 1]}"
        assert run.state is RunState.RUNNING, what
        assert run.attempts[-1].resume_from == str(newest), what
        assert run.attempts[-1].first_step == 11, what
        assert ("b" in run.attempts[-1].nodes) is (end is a_rank_falls), what
        assert [one.number for one in run.attempts] == list(range(1, len(run.attempts) + 1)), what
        assert len(run.attempts) <= 3, what
        assert len(run.failures) == len(run.attempts) - 1, what

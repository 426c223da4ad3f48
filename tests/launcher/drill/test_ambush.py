"""A controller dies in the phase it was told to, once, and its successor records why."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launcher.drill import ambush
from launcher.drill.ambush import Ambush, Waylaid
from launcher.run import EventKind
from tests.support.stage import Stage


class Killed(Exception):
    """Instead of the signal."""


@pytest.fixture(autouse=True)
def signals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    sent: list[tuple[int, int]] = []

    def kill(pid: int, number: int) -> None:
        sent.append((pid, number))
        raise Killed

    monkeypatch.setattr("launcher.drill.ambush.os.kill", kill)
    return sent


def ambushed(tmp_path: Path, phase: str, step: int = 0) -> tuple[Stage, Waylaid]:
    stage = Stage(tmp_path)
    ambush.lay(stage.store, Ambush(phase=phase, step=step))
    return stage, Waylaid(stage.store)


def fall(stage: Stage) -> None:
    """A rank dies at step 8; the others are being stopped."""
    stage.start()
    stage.report("a", "step", 1, rank=0, step=7)
    stage.gang.say("exit", "a", rank=1, attempt=1, code=None, signal=9, log_tail="")
    stage.turn()


def test_while_others_are_stopped(tmp_path: Path, signals: list[tuple[int, int]]) -> None:
    stage, waylaid = ambushed(tmp_path, "stop", step=7)
    stage.start()
    waylaid.look(stage.controller, None)
    fall(stage)
    with pytest.raises(Killed):
        waylaid.look(stage.controller, None)
    assert signals == [(os.getpid(), signal.SIGKILL)]
    waylaid.look(stage.controller, None)  # once
    assert len(signals) == 1
    for node in "ab":
        stage.gang.say("killed", node, attempt=1)
    stage.turn()
    (fired,) = [event for event in stage.store.events() if event.kind is EventKind.FAULT_FIRED]
    assert fired.data["record"]["fault"] == "controller_kill@phase=stop,step=7"


def test_not_before_its_step_and_not_in_another_phase(tmp_path: Path, signals: list[tuple[int, int]]) -> None:
    stage, waylaid = ambushed(tmp_path, "gather", step=7)
    stage.observer = lambda event: waylaid.look(stage.controller, event)
    fall(stage)  # it gathers first, but no step was made
    assert signals == []
    for node in "ab":
        stage.gang.say("killed", node, attempt=1)
    with pytest.raises(Killed):
        stage.turn()
    assert len(stage.store.run().attempts) == 1  # before it could start the next


def test_a_run_without_an_ambush_is_left_alone(tmp_path: Path, signals: list[tuple[int, int]]) -> None:
    stage = Stage(tmp_path)
    waylaid = Waylaid(stage.store)
    fall(stage)
    waylaid.look(stage.controller, None)
    assert signals == []
    assert not stage.store.paths.faults.exists()

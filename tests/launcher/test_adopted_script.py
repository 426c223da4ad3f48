"""A script has begun when its ranks are there, and it reports no steps: what a later controller makes of that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher import adoption
from launcher.phase import Phase
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from tests.launcher.test_controller import LiveGang, succeed
from tests.support import stage as stages
from tests.support.fakes import tiny_request
from tests.support.stage import Stage


@pytest.mark.parametrize("last", [EventKind.RANKS_SPAWNED, EventKind.TRAINING_STARTED])
def test_it_is_not_taken_for_one_that_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: EventKind
) -> None:
    """Its controller fell after the one or the other line of the log, which follow each other at once."""
    request = tiny_request(tmp_path, start_timeout_s=60.0)
    script = replace(request, job=replace(request.job, kind="script", command="python train.py"))
    monkeypatch.setattr(stages, "tiny_request", lambda root, **recovery: script)
    stage = Stage(tmp_path)
    stage.turn(2)
    nodes = {"a": [0, 1], "b": [2, 3]}
    for node, ranks in nodes.items():
        stage.gang.say("spawned", node, attempt=1, ranks=[{"rank": r, "pid": r} for r in ranks])
    stage.turn()
    log = stage.store.paths.events
    lines = log.read_text().splitlines(keepends=True)
    end = next(at for at, line in enumerate(lines) if f'"{last.value}"' in line) + 1
    log.write_text("".join(lines[:end]))
    stage.store = RunStore(stage.store.paths.root)
    succeed(stage, LiveGang(stage.clock))
    adoption.begin(stage.controller)
    for node, ranks in nodes.items():  # agents tell again what they remember
        stage.gang.say("spawned", node, attempt=1, ranks=[{"rank": r, "pid": r} for r in ranks])
    stage.turn()
    for _ in range(4):
        stage.clock.now += 40.0
        stage.turn()
    assert stage.controller.phase is Phase.RUN
    assert stage.state() is RunState.RUNNING
    assert EventKind.TRAINING_STARTED in stage.kinds()
    assert not stage.controller.hangs.starting

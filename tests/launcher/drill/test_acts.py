"""What a drill does to files is damage that the product's own check finds, and its moments come in order."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import checkpoint
from jobs.paths import RunPaths
from launcher.drill import acts
from launcher.drill.acts import Act
from launcher.drill.network import Network
from launcher.run import EventKind, Run, RunEvent
from strategies.errors import ClusterError
from tests.support.checkpoints import write_model_checkpoint
from tests.support.jobspecs import GPT


class FakeStage:
    """A run that only has files and a log."""

    def __init__(self, root: Path) -> None:
        self.paths = RunPaths(root)
        self.network: Network | None = None
        self.held_pid = 0
        self.log: list[RunEvent] = []
        self.is_saved = True

    def run(self) -> Run:
        return Run()

    def events(self) -> list[RunEvent]:
        return self.log

    def gang_node(self, which: str) -> str:
        return "node0"

    def saved(self) -> bool:
        return self.is_saved

    def say(self, kind: EventKind, attempt: int = 1, **data: Any) -> None:
        self.log.append(RunEvent(seq=1, time=0.0, epoch=1, attempt=attempt, kind=kind, data=data))


@pytest.fixture
def stage(tmp_path: Path) -> FakeStage:
    made = FakeStage(tmp_path)
    for step in (3, 6):
        write_model_checkpoint(made.paths.checkpoints, GPT, step=step)
    return made


@pytest.mark.parametrize("damage", [acts.flip_bit, acts.truncate, acts.remove_shard])
def test_damage_of_a_shard_is_found_and_only_there(damage: Callable[[acts.Stage], str], stage: FakeStage) -> None:
    newest, older = checkpoint.list_checkpoints(stage.paths.checkpoints)
    assert checkpoint.verify(newest.path, deep=True) == []
    assert "step-00000006" in damage(stage)
    assert checkpoint.verify(newest.path, deep=True) != []
    assert checkpoint.verify(older.path, deep=True) == []


def test_a_spoiled_manifest_is_no_checkpoint(stage: FakeStage) -> None:
    acts.spoil_manifest(stage)
    assert [entry.step for entry in checkpoint.list_checkpoints(stage.paths.checkpoints)] == [3]
    assert len(checkpoint.damaged(stage.paths.checkpoints)) == 1


def test_without_a_checkpoint_there_is_nothing_to_damage(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="no checkpoint"):
        acts.flip_bit(FakeStage(tmp_path))


def test_moments(stage: FakeStage) -> None:
    held = Act(do=acts.kill_held, held=True, saved=True)
    assert not held.due(stage)
    stage.held_pid, stage.is_saved = 7, False
    assert not held.due(stage)
    stage.is_saved = True
    assert held.due(stage)
    later = Act(do=acts.mend, after=EventKind.TRAINING_STARTED, attempt=2)
    stage.say(EventKind.TRAINING_STARTED, attempt=1)
    assert not later.due(stage)
    stage.say(EventKind.TRAINING_STARTED, attempt=2)
    assert later.due(stage)
    assert Act(do=acts.mend).due(stage)
    ended = Act(do=acts.free_disk, after=EventKind.RUN_FAILED)
    stage.say(EventKind.RUN_FAILED, attempt=0)  # the log does not count the end to an attempt
    assert ended.due(stage)


def test_a_moment_that_is_over(stage: FakeStage) -> None:
    act = Act(do=acts.kill_node("other"), after=EventKind.FAILURE_DETECTED, before=EventKind.TRAINING_STARTED)
    stage.say(EventKind.TRAINING_STARTED, attempt=1)
    assert act.over(stage.events()) is None
    stage.say(EventKind.FAILURE_DETECTED, attempt=1)
    assert act.over(stage.events()) == math.inf
    assert act.due(stage)
    stage.say(EventKind.TRAINING_STARTED, attempt=2)
    assert act.over(stage.events()) == stage.events()[-1].time
    assert not act.due(stage), "it would strike ranks that train"


class Cable(Network):
    """One link, and who is behind it."""

    def __init__(self, behind: list[int]) -> None:
        self.addresses, self.behind, self.mended = ["10.0.0.1"], behind, False

    def pids(self, index: int) -> list[int]:
        return self.behind

    def mend(self, index: int) -> None:
        self.mended = True


def test_a_link_that_comes_up_has_somebody_behind_it(stage: FakeStage) -> None:
    stage.network = there = Cable([7, 8])
    assert acts.mend(stage) == "link of node0 (10.0.0.1) up again, 2 processes behind it"
    assert there.mended
    stage.network = Cable([])
    with pytest.raises(ClusterError, match="Nobody is left behind the link of node0"):
        acts.mend(stage)


def test_a_disk_is_filled_to_the_last_byte() -> None:
    room = [100_000]

    class Disk:
        """A file on a disk that has so much room."""

        def write(self, data: bytes) -> int:
            if not room[0]:
                raise OSError(28, "No space left on device")
            done = min(len(data), room[0])
            room[0] -= done
            return done

    written = sum(sum(acts._until_full(Disk(), bytes(chunk))) for chunk in (1 << 16, 1 << 12, 1))
    assert (written, room) == (100_000, [0])

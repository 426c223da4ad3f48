"""A disk that fills up: before a run, while it starts and while it trains. Nothing that was committed is lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import checkpoint
from launcher.host import announce
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from tests.support import cli
from tests.support.fulldisk import fill, needs_root, small_disk

pytestmark = [needs_root, pytest.mark.timeout(300)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "24m") as path:
        yield path


def words(folder: Path, disk: Path, *more: str) -> tuple[str, ...]:
    """A submit whose run directory, and nothing else, is on the small disk."""
    return (*cli.tiny(folder, "demo", f"run.dir={disk / 'runs'}"), f"data.cache={folder / 'data'}", *more)


def assert_short(done: cli.Result, code: int) -> None:
    assert done.code == code, done.err
    assert "Traceback" not in done.err + done.out
    assert "Internal error" not in done.err
    assert "next:" in done.err


def test_a_disk_that_is_full_from_the_beginning(folder: Path, disk: Path) -> None:
    (disk / "runs").mkdir()
    fill(disk)
    assert_short(cli.phalanx(*words(folder, disk), cwd=folder), 7)
    assert [path.name for path in (disk / "runs").glob("*")] == []


def test_a_disk_too_small_for_the_run_directory(folder: Path) -> None:
    with small_disk(folder / "disk", "256k") as disk:
        assert_short(cli.phalanx(*words(folder, disk), cwd=folder), 7)
        assert [path.name for path in (disk / "runs").glob("*")] == []


@pytest.mark.full  # a sibling runs by default
def test_verbs_on_a_full_disk(folder: Path, disk: Path) -> None:
    """Reading goes on; what must write says so and changes nothing."""
    done = cli.phalanx(
        *words(folder, disk, 'faults=["rank_exit@rank=1,step=5"]', "recovery.max_restarts=0"), cwd=folder
    )
    assert done.code == 100, done.err
    filler = fill(disk)
    where = ("--dir", str(disk / "runs"))
    assert cli.phalanx("status", "demo", *where, cwd=folder).code == 0
    assert cli.phalanx("logs", "demo", *where, cwd=folder).code == 0
    before = (disk / "runs" / "demo" / "events.jsonl").read_bytes()
    assert_short(cli.phalanx("resume", "demo", "--yes", *where, cwd=folder), 7)
    assert_short(cli.phalanx("resume", "demo", "train.lr=0.01", "--yes", *where, cwd=folder), 7)
    assert (disk / "runs" / "demo" / "events.jsonl").read_bytes() == before
    filler.unlink()
    done = cli.phalanx("resume", "demo", "--yes", *where, cwd=folder)
    assert done.code == 0, done.err


@pytest.mark.full
def test_a_disk_that_fills_while_the_run_trains(folder: Path, disk: Path) -> None:
    """It ends failed with the reason; resumed after space was freed, it has the very weights of a quiet run."""
    quiet = cli.phalanx(*cli.tiny(folder, "quiet", "train.steps=60"), cwd=folder)
    assert quiet.code == 0, quiet.err
    process = cli.start(*words(folder, disk, "train.steps=60", "checkpoint.patience_s=3"), cwd=folder)
    root = disk / "runs" / "demo"
    cli.wait_for(lambda: max(cli.curve(RunStore(root)), default=0) >= 4, "step 4")
    filler = fill(disk)
    done = cli.end(process)
    assert_short(done, done.code)
    assert done.code in (7, 100)
    run = RunStore(root)
    cli.assert_nothing_left(root)
    assert run.run().state is RunState.FAILED
    assert "No space left on device" in run.run().reason
    saved = checkpoint.list_checkpoints(run.paths.checkpoints)
    assert saved
    assert all(checkpoint.verify(entry.path, deep=True) == [] for entry in saved)
    filler.unlink()
    done = cli.phalanx("resume", "demo", "--yes", "--dir", str(root.parent), cwd=folder)
    assert done.code == 0, done.err
    assert run.run().attempts[-1].first_step > 1
    assert cli.curve(run) == cli.curve(cli.store(folder, "quiet"))
    assert run.run().weights_digest == cli.store(folder, "quiet").run().weights_digest is not None


@pytest.mark.full
@pytest.mark.parametrize("last", [False, True], ids=["in_the_middle", "at_the_end"])
def test_a_disk_of_checkpoints_that_is_full_for_a_while(folder: Path, disk: Path, last: bool) -> None:
    """Training goes on, or waits with the last one; nothing restarts, and the weights are those of a quiet run."""
    steps = 24 if last else 60
    quiet = cli.phalanx(*cli.tiny(folder, "quiet", f"train.steps={steps}"), cwd=folder)
    assert quiet.code == 0, quiet.err
    process = cli.start(*cli.tiny(folder, "demo", f"train.steps={steps}", f"checkpoint.url={disk}"), cwd=folder)
    run = RunStore(folder / "runs" / "demo")
    cli.wait_for(lambda: max(cli.curve(run), default=0) >= 4, "step 4")
    filler = fill(disk)
    wanted = steps if last else 1

    def unsaved() -> bool:
        found = [event for event in run.events() if event.kind is EventKind.CHECKPOINT_FAILED]
        return any(event.data["step"] >= wanted for event in found)

    cli.wait_for(unsaved, "a checkpoint that could not be written")
    status = cli.phalanx("status", "demo", "--json", cwd=folder)
    assert "No space left on device" in json.loads(status.out)["unsaved"]["reason"]
    filler.unlink()
    done = cli.end(process)
    assert done.code == 0, done.err
    assert "could not be written" in done.err + done.out
    assert len(run.run().attempts) == 1
    assert run.run().weights_digest == cli.store(folder, "quiet").run().weights_digest is not None
    saved = checkpoint.list_checkpoints(run.paths.checkpoints)
    assert saved[0].step == steps
    assert all(checkpoint.verify(entry.path, deep=True) == [] for entry in saved)
    assert json.loads(cli.phalanx("status", "demo", "--json", cwd=folder).out)["unsaved"] is None


@pytest.mark.full
def test_a_node_that_is_taken_away_while_nothing_can_be_saved(folder: Path, disk: Path) -> None:
    """Its ranks leave in good order all the same: their step is in memory, on another node, too."""
    quiet = cli.phalanx(*cli.tiny(folder, "quiet", "train.steps=120"), cwd=folder)
    assert quiet.code == 0, quiet.err
    words = cli.tiny(folder, "demo", "train.steps=120", f"checkpoint.url={disk}", "recovery.max_restarts=0")
    process = cli.start(*words, cwd=folder)
    run = RunStore(folder / "runs" / "demo")
    cli.wait_for(lambda: max(cli.curve(run), default=0) >= 4, "step 4")
    filler = fill(disk)
    cli.wait_for(lambda: any(e.kind is EventKind.CHECKPOINT_FAILED for e in run.events()), "a checkpoint that failed")
    attempt = run.run().attempt
    assert attempt is not None
    agent = announce.read(announce.path_of(run.paths, attempt.nodes[1]))
    assert agent is not None
    os.kill(agent.pid, signal.SIGTERM)
    cli.wait_for(lambda: len(run.run().attempts) == 2, "ranks on other nodes")
    cli.wait_for(lambda: max(cli.curve(run), default=0) > run.run().attempts[1].first_step, "a step of theirs")
    filler.unlink()
    done = cli.end(process)
    assert done.code == 0, done.err
    state = run.run()
    assert (state.steps_lost, state.restarts, state.failures) == (0, 0, ())
    assert [one.reason for one in state.attempts] == ["start", "move"]
    assert cli.curve(run) == cli.curve(cli.store(folder, "quiet"))
    assert state.weights_digest == cli.store(folder, "quiet").run().weights_digest is not None


def test_a_signal_while_the_disk_is_full(folder: Path, disk: Path) -> None:
    """The request to cancel has no room: the gang is ended all the same."""
    process = cli.start(*words(folder, disk, "train.steps=100000", "checkpoint.every=100000"), cwd=folder)
    root = disk / "runs" / "demo"
    cli.wait_for(lambda: max(cli.curve(RunStore(root)), default=0) >= 2, "step 2")
    fill(disk)
    os.kill(process.pid, signal.SIGTERM)
    done = cli.end(process)
    assert done.code in (7, 100, 103), done.err
    assert "Traceback" not in done.err
    cli.assert_nothing_left(root)
    assert RunStore(root).run().state in (RunState.CANCELLED, RunState.FAILED)

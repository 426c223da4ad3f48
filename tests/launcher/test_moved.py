"""Run directories that are moved, copied, linked to, or begun anew where another was: no two runs write one state."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from jobs.checkpoint import fence
from jobs.checkpoint.claim import claim, require_ours
from jobs.checkpoint.errors import CheckpointConflict
from jobs.checkpoint.layout import Token
from launcher.local_backend import LocalBackend
from launcher.lock import ControllerLock, controlled, process_started
from launcher.logbook import Fenced, Logbook
from launcher.run import EventKind
from launcher.store import RunStore
from strategies.errors import ConfigError, ResumeRefused
from strategies.specs import ClusterSpec
from tests.support import cli
from tests.support.runs import make_run

HOLD = """
import sys, time
from jobs.paths import RunPaths
from pathlib import Path
from launcher.lock import ControllerLock
lock = ControllerLock.acquire(RunPaths(Path(sys.argv[1])))
print(lock.epoch, flush=True)
while True:
    lock.beat()
    time.sleep(0.1)
"""


@pytest.fixture
def alive(tmp_path: Path) -> Iterator[RunStore]:
    """A run whose controller, another process, lives."""
    (tmp_path / "runs").mkdir()
    store = make_run(tmp_path / "runs")
    command = [sys.executable, "-c", HOLD, str(store.paths.root)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == b"1"
    yield store
    holder.kill()
    holder.wait()
    holder.stdout.close()


def moved(store: RunStore, to: Path) -> RunStore:
    to.mkdir()
    os.rename(store.paths.root, to / store.name)
    return RunStore.open(to / store.name)


def test_moved_while_it_lives(alive: RunStore, tmp_path: Path) -> None:
    there = moved(alive, tmp_path / "elsewhere")
    assert controlled(there.paths)
    with pytest.raises(ResumeRefused, match="live controller"):
        ControllerLock.acquire(there.paths)


def test_copied_while_it_lives(alive: RunStore, tmp_path: Path) -> None:
    copy = tmp_path / "copies" / alive.name
    shutil.copytree(alive.paths.root, copy)
    with pytest.raises(ResumeRefused, match="live controller"):
        ControllerLock.acquire(RunStore.open(copy).paths)


def test_linked_to_while_it_lives(alive: RunStore, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / alive.name).symlink_to(alive.paths.root)
    with pytest.raises(ResumeRefused, match="live controller"):
        ControllerLock.acquire(RunStore.open(tmp_path / "links" / alive.name).paths)


def test_another_run_is_begun_where_a_living_one_was(tmp_path: Path) -> None:
    """The controller of the first still knows the old path only; not a line of it may get into the second's log."""
    store = make_run(tmp_path)
    lock = ControllerLock.acquire(store.paths)
    book = Logbook(store, lock, lambda event: None)
    book.record(EventKind.CONTROLLER_STARTED, attempt=0)
    there = moved(store, tmp_path / "elsewhere")
    assert not lock.lost(), "nothing is where it was: that may be the share"
    second = make_run(tmp_path)
    for epoch in (1, 2):  # before and after the second has a controller
        before = second.paths.events.read_bytes()
        assert lock.lost()
        with pytest.raises(Fenced):
            book.record(EventKind.CANCEL_REQUESTED, attempt=0, by="a zombie")
        end_gang = Mock()
        with pytest.raises(Fenced):
            book.require_ours(end_gang)
        end_gang.assert_called_once_with()  # nobody else can end its ranks
        assert second.paths.events.read_bytes() == before
        theirs = ControllerLock.acquire(second.paths)
        assert (theirs.epoch, theirs.lost()) == (epoch, False)
        lock.release()
        assert controlled(second.paths), "it is not for the zombie to say that the other has left"
        theirs.release()
    assert [event.kind for event in there.events()] == [EventKind.RUN_SUBMITTED, EventKind.CONTROLLER_STARTED]


def test_a_folder_that_ranks_have_made_again_is_no_run(tmp_path: Path) -> None:
    """Ranks know the old path only, and make folders to save in: the run must not go on in one of those."""
    store = make_run(tmp_path)
    lock = ControllerLock.acquire(store.paths)
    there = moved(store, tmp_path / "elsewhere")
    assert not lock.lost()
    (store.paths.checkpoint_dir / "step-00000010").mkdir(parents=True)
    assert lock.lost()
    assert lock.displaced()
    shutil.rmtree(store.paths.root)
    os.rename(there.paths.root, store.paths.root)
    assert not lock.lost(), "a share that is there again"


def test_who_leaves_ends_no_agents_of_the_run_in_its_place(tmp_path: Path) -> None:
    """Agents are found in the run directory: what another run has announced there is not for the first to end."""
    store = make_run(tmp_path)
    backend = LocalBackend(store.paths, ClusterSpec(name="one", kind="process", nodes=1, slots_per_node=1))
    moved(store, tmp_path / "elsewhere")
    second = make_run(tmp_path)
    theirs = LocalBackend(second.paths, ClusterSpec(name="one", kind="process", nodes=1, slots_per_node=1))
    try:
        theirs.request_agents(1)
        cli.wait_for(lambda: bool(theirs.agents()), "an agent")
        (agent,) = theirs.agents()
        backend.release()
        assert theirs.agents() == [agent]
        assert process_started(agent.pid), "it lives"
    finally:
        theirs.release()
    assert not process_started(agent.pid)


def test_a_directory_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    """Else the name would be taken by a folder that is no run."""
    store = make_run(tmp_path)
    lock = ControllerLock.acquire(store.paths)
    moved(store, tmp_path / "elsewhere")
    lock.release()
    assert not store.paths.root.exists()


def test_copies_of_a_dead_run_do_not_share_what_is_kept_elsewhere(tmp_path: Path) -> None:
    """Each is resumed: both take the same epoch, and just one of them gets the checkpoints."""
    store, kept = make_run(tmp_path), tmp_path / "kept"
    shutil.copytree(store.paths.root, tmp_path / "copies" / store.name)
    copy = RunStore.open(tmp_path / "copies" / store.name)
    claim(kept, run=store.name, owner=store.owner)
    for one in (store, copy):
        require_ours(kept, run=one.name, owner=one.owner)
    owners = [f"controller of {one.paths.root}" for one in (store, copy)]
    assert [ControllerLock.acquire(one.paths).epoch for one in (store, copy)] == [1, 1]
    fence.raise_fence(kept, Token(1, 2), owner=owners[0])
    with pytest.raises(CheckpointConflict, match="cannot begin"):
        fence.raise_fence(kept, Token(1, 2), owner=owners[1])


def test_a_new_run_of_the_name_does_not_get_what_a_moved_one_keeps_elsewhere(tmp_path: Path) -> None:
    store, kept = make_run(tmp_path), tmp_path / "kept"
    claim(kept, run=store.name, owner=store.owner)
    moved(store, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="another run"):
        claim(kept, run=store.name, owner=make_run(tmp_path).owner)

"""Runs on disk: torn lines, exclusive creation, finding by prefix."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
from pathlib import Path

import pytest

from launcher.run import EventKind, IllegalEvent, RunState, apply
from launcher.store import RunStore, append_line, create_exclusive, read_lines
from strategies.errors import ConfigError, NotFound, StorageError
from tests.support.fakes import tiny_request


def test_request_round_trip(tmp_path: Path) -> None:
    request = tiny_request(tmp_path)
    store = RunStore.create(request)
    assert store.request() == request
    assert store.request().digest == request.digest
    assert store.paths.secret.stat().st_mode & 0o777 == 0o600


def test_name_taken(tmp_path: Path) -> None:
    RunStore.create(tiny_request(tmp_path))
    with pytest.raises(ConfigError, match="exists"):
        RunStore.create(tiny_request(tmp_path))


def test_a_run_whose_checkpoints_are_elsewhere_never_looks_for_them_at_home(tmp_path: Path) -> None:
    """Its submit is killed before it has claimed the place, or before it has written all that makes a run."""
    request = tiny_request(tmp_path)
    policy = dataclasses.replace(request.job.checkpoint, url=str(tmp_path / "elsewhere"))
    store = RunStore.create(dataclasses.replace(request, job=dataclasses.replace(request.job, checkpoint=policy)))
    assert RunStore.open(store.paths.root).paths.checkpoints == tmp_path / "elsewhere"
    with pytest.raises(StorageError, match="are gone"):
        store.require_checkpoints()
    written = sorted(store.paths.root.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert written.index(store.paths.pointer) < written.index(store.paths.request)


def test_torn_line_is_no_event_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    store = RunStore.create(tiny_request(tmp_path))
    with open(store.paths.events, "ab") as file:
        file.write(b'{"seq": 2, "ti')
    assert len(store.events()) == 1
    again = RunStore.open(store.paths.root)
    again.append(EventKind.RUN_FAILED, reason="x")
    assert [event.seq for event in again.events()] == [1, 2]
    assert again.run().state is RunState.FAILED


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="Cannot write") as caught:
        create_exclusive(tmp_path / "controllers" / "1.json", b"{}")
    assert caught.value.why == "No space left on device"
    assert "Free space" in caught.value.hint
    assert not list((tmp_path / "controllers").iterdir())
    with pytest.raises(StorageError):
        RunStore.create(tiny_request(tmp_path))
    assert not Path(tiny_request(tmp_path).run_dir).exists()


@pytest.mark.parametrize("room", [0, 10])
def test_what_could_not_be_written_whole_is_refused_with_the_systems_reason(tmp_path: Path, room: int) -> None:
    store = RunStore.create(tiny_request(tmp_path))
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (store.paths.events.stat().st_size + room, most[1]))
        with pytest.raises(StorageError, match="Cannot append") as caught:
            store.append(EventKind.RUN_FAILED, reason="x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert os.strerror(errno.EFBIG) in caught.value.why
    assert store.run().state is RunState.QUEUED
    store.append(EventKind.RUN_FAILED, reason="x")
    assert store.run().state is RunState.FAILED


def test_only_one_creates(tmp_path: Path) -> None:
    assert create_exclusive(tmp_path / "lock", b"a")
    assert not create_exclusive(tmp_path / "lock", b"b")
    assert (tmp_path / "lock").read_bytes() == b"a"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_find(tmp_path: Path) -> None:
    for name in ("alpha-1", "alpha-2", "beta"):
        RunStore.create(tiny_request(tmp_path, name=name))
    assert RunStore.find(tmp_path, "be").name == "beta"
    assert RunStore.find(tmp_path, "alpha-1").name == "alpha-1"
    assert RunStore.find(tmp_path, "latest").name == "beta"
    RunStore.find(tmp_path, "alpha-1").append(EventKind.RUN_FAILED, reason="x")
    assert RunStore.find(tmp_path, "latest").name == "alpha-1"
    with pytest.raises(NotFound, match="fits 2 runs"):
        RunStore.find(tmp_path, "alpha")
    with pytest.raises(NotFound, match="Did you mean 'beta'"):
        RunStore.find(tmp_path, "betta")


def test_success_is_final(tmp_path: Path) -> None:
    store = RunStore.create(tiny_request(tmp_path))
    store.append(EventKind.RUN_SUCCEEDED, step=1)
    event = store.append(EventKind.RESUME_REQUESTED)
    with pytest.raises(IllegalEvent, match="not allowed in state 'succeeded'"):
        apply(store.run(), event)
    assert store.run().state is RunState.SUCCEEDED


def test_what_a_fenced_controller_wrote_does_not_count(tmp_path: Path) -> None:
    store = RunStore.create(tiny_request(tmp_path))
    store.append(EventKind.CONTROLLER_STARTED, epoch=2)
    store.append(EventKind.RUN_FAILED, epoch=1, reason="the zombie's opinion")
    assert store.run().state is RunState.QUEUED


def test_damaged_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append_line(path, b'{"a": 1}\n')
    append_line(path, b"garbage\n")
    append_line(path, b'{"a": 2}\n')
    assert [line["a"] for line in read_lines(path)] == [1, 2]

"""Disks that fail while a checkpoint is written, and the state beside the tensors."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.checkpoint import CheckpointConflict, newest
from jobs.checkpoint.layout import Place, Token
from jobs.checkpoint.manifest import TrainerState
from jobs.checkpoint.save import Snapshot, persist
from jobs.checkpoint.shardfile import KINDS
from jobs.checkpoint.slices import whole
from jobs.checkpoint.state import rng_state, set_rng_state
from jobs.paths import RunPaths
from strategies.errors import StorageError
from tests.support.jobspecs import make_job
from tests.support.links import lose_answers


def snapshot(elements: int, step: int = 1) -> Snapshot:
    piece = whole("w", (elements,))
    data = {kind: np.full(elements, index, np.float32) for index, kind in enumerate(KINDS)}
    trainer = TrainerState(optimizer_steps=step, learning_rates=(0.1,), counters={}, loss_scaler={})
    return Snapshot(step=step, pieces=((piece, data),), trainer=trainer, rank_state={}, stall_s=0.0)


def save_to(root: Path, snap: Snapshot, token: tuple[int, int] = (1, 1)) -> Path:
    saved = persist(snap, run_paths=RunPaths(root), job=make_job(), token=token, extra={})
    assert isinstance(saved.path, Path)
    return saved.path


def test_a_link_whose_answer_was_lost_is_no_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_answers(monkeypatch)
    path = save_to(tmp_path, snapshot(8))
    assert newest(RunPaths(tmp_path).checkpoints) == path
    with pytest.raises(CheckpointConflict):
        save_to(tmp_path, snapshot(8))
    assert not list(RunPaths(tmp_path).checkpoint_dir.rglob("*.tmp"))


class Disk:
    """What is done to the disk, in order: ``fsync NAME``, ``link NAME`` (the name that the file gets)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self._fsync, self._link = os.fsync, os.link
        monkeypatch.setattr(os, "fsync", self._sync)
        monkeypatch.setattr(os, "link", self._name)
        monkeypatch.setattr(os, "rename", refused)
        monkeypatch.setattr(os, "replace", refused)

    def _sync(self, fd: int) -> None:
        self._fsync(fd)
        self.done.append(f"fsync {os.readlink(f'/proc/self/fd/{fd}')}")

    def _name(self, aside: Path, path: Path) -> None:
        assert self.done[-1] == f"fsync {aside}", "what is in a file is on the disk before the file has a name"
        self._link(aside, path)
        self.done.append(f"link {path}")


def refused(*_: object) -> None:
    raise AssertionError("a rename may overwrite")


def test_everything_is_on_the_disk_before_the_manifest_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_to(tmp_path, snapshot(8))  # the folder of checkpoints is there, and claimed
    disk = Disk(monkeypatch)
    manifest = save_to(tmp_path, snapshot(8, step=2))
    place = Place(tmp_path / "checkpoints", 2, Token(1, 1))
    committed = disk.done.index(f"link {manifest}")
    before, after = disk.done[:committed], disk.done[committed + 1 :]
    files = [path for path in place.step_dir.rglob("*") if path.is_file() and path != manifest]
    assert place.shard(0) in files
    for file in files:
        synced = before.index(f"link {file}") + 1
        assert f"fsync {file.parent}" in before[synced:], f"the name of {file.name} is not durable when it is committed"
    assert {f"fsync {folder}" for folder in (place.step_dir, place.step_dir.parent)} <= set(before)
    assert f"fsync {place.step_dir}" in after


def test_so_are_new_folders_and_all_that_they_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    manifest = save_to(tmp_path / "runs" / "one", snapshot(8))
    before = disk.done[: disk.done.index(f"link {manifest}")]
    above = list(manifest.parents)
    assert {f"fsync {folder}" for folder in above[: above.index(tmp_path) + 1]} <= set(before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root; the same path is tested with a file size limit")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False, timeout=20
    )
    if mount.returncode != 0:
        pytest.skip(f"cannot mount: {mount.stderr.decode()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=20)


def test_a_full_disk_is_explained_and_loses_nothing(small_disk: Path) -> None:
    first = save_to(small_disk, snapshot(1000))
    with pytest.raises(StorageError, match="Cannot write the checkpoint shard") as raised:
        save_to(small_disk, snapshot(200_000, step=2))
    assert raised.value.why == "No space left on device"
    assert "Free space" in raised.value.hint
    assert newest(small_disk / "checkpoints") == first
    assert newest(small_disk / "checkpoints") != save_to(small_disk, snapshot(2000, step=2))  # there is room again


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_stops_in_the_middle(tmp_path: Path) -> None:
    with largest_file(4000), pytest.raises(StorageError, match="Cannot write the checkpoint shard"):
        save_to(tmp_path, snapshot(1000))
    assert newest(tmp_path / "checkpoints") is None
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_manifest_that_cannot_be_written(tmp_path: Path) -> None:
    with largest_file(1000), pytest.raises(StorageError, match="Cannot commit the checkpoint"):
        save_to(tmp_path, snapshot(5))
    assert newest(tmp_path / "checkpoints") is None


def test_a_second_writer_of_a_token_touches_nothing(tmp_path: Path) -> None:
    path = save_to(tmp_path, snapshot(10))
    shard = Place(tmp_path / "checkpoints", 1, Token(1, 1)).shard(0)
    before = shard.read_bytes(), path.read_bytes()
    with pytest.raises(CheckpointConflict):
        save_to(tmp_path, snapshot(11))
    assert (shard.read_bytes(), path.read_bytes()) == before


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StorageError, match="Cannot write the checkpoint shard"):
        save_to(tmp_path, snapshot(10))


def test_random_number_generators_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        normal = np.random.standard_normal(3).tolist()  # the legacy generator is the one to keep
        return [*torch.rand(3).tolist(), *normal, random.random(), random.gauss(0, 1)]

    draw()
    state = json.loads(json.dumps(rng_state()))
    expected = draw()
    assert draw() != expected
    set_rng_state(state)
    assert draw() == expected

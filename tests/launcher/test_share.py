"""What machines see of each other's files, and what the lock does about it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from jobs.paths import RunPaths
from launcher import lock, share
from launcher.lock import ControllerLock, identity
from launcher.store import create_exclusive
from strategies.errors import ResumeRefused, StorageError
from tests.support.links import lose_answers

TABLE = """\
22 1 0:20 / / rw - overlay overlay rw
30 22 0:40 / {root} rw,relatime - ext4 /dev/sda rw
31 30 0:41 / {root}/strict rw - nfs4 server:/a rw,vers=4.2,acregmax=60
32 30 0:42 / {root}/loose rw - nfs server:/b rw,vers=3,nocto,acregmax=20
33 30 0:43 / {root}/usual rw - nfs4 server:/c rw,vers=4.1,nocto
34 30 0:44 / {root}/none rw - nfs4 server:/d rw,noac,nocto
35 30 0:45 / {root}/a\\040space rw - nfs4 server:/e rw,nocto,actimeo=7
a line that is none
"""


@pytest.mark.parametrize(
    ("place", "seconds"),
    [("", 0), ("strict", 0), ("loose/run", 20), ("usual", 60), ("none", 0), ("a space", 7), ("loosely", 0)],
)
def test_how_long_an_old_content_may_be_shown(place: str, seconds: float, tmp_path: Path) -> None:
    table = tmp_path / "mounts"
    table.write_text(TABLE.format(root=tmp_path.resolve()))
    assert share.stale_s(tmp_path / place, table) == seconds
    assert share.stale_s(tmp_path, tmp_path / "missing") == 0


def test_a_heartbeat_is_watched_for_longer_where_an_old_one_may_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path)
    paths.controllers.mkdir()
    (paths.controllers / "1.json").write_text(json.dumps(identity() | {"machine": "elsewhere"}))
    slept: list[float] = []

    ControllerLock.acquire(paths, sleep=slept.append).release()
    assert sum(slept) == lock.SILENCE_S
    slept.clear()
    (paths.controllers / "2.released").unlink()
    (paths.controllers / "2.json").write_text(json.dumps(identity() | {"machine": "elsewhere"}))
    monkeypatch.setattr(share, "stale_s", lambda path: 60.0)

    def beat(seconds: float) -> None:
        slept.append(seconds)
        if sum(slept) > 30:
            (paths.controllers / "2.beat").write_text("seen late")

    with pytest.raises(ResumeRefused):
        ControllerLock.acquire(paths, sleep=beat)


def test_every_beat_looks_at_the_folder_anew(tmp_path: Path) -> None:
    held = ControllerLock.acquire(RunPaths(tmp_path))
    folder = RunPaths(tmp_path).controllers
    os.utime(folder, (0, 0))
    held._last_beat = 0.0
    held.beat()
    assert folder.stat().st_mtime > 0
    assert sorted(path.name for path in folder.iterdir()) == ["1.beat", "1.json"]


def test_a_link_whose_answer_was_lost_has_been_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_answers(monkeypatch)
    assert create_exclusive(tmp_path / "one", b"ours")
    assert not create_exclusive(tmp_path / "one", b"another")
    assert (tmp_path / "one").read_bytes() == b"ours"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_file_system_without_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="gives no file a second name") as caught:
        ControllerLock.acquire(RunPaths(tmp_path))
    assert "Choose another run.dir" in str(caught.value)
    assert list(RunPaths(tmp_path).controllers.iterdir()) == []

"""Folders that stay only if something is in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.folders import made_for


def test_what_was_made_for_nothing_goes(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with made_for(folder):
        assert folder.is_dir()
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with made_for(folder):
        pass
    assert (tmp_path / "a").is_dir(), "it was there before"


def test_what_holds_something_stays(tmp_path: Path) -> None:
    with made_for(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file"]
    with pytest.raises(NotADirectoryError), made_for(tmp_path / "a" / "file" / "x"):
        pass

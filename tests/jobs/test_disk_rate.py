"""A disk is measured past the page cache, and nothing is left of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import disk_rate

MIB = 1 << 20


def test_a_file_is_written_and_read_whole_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    synced = os.fsync

    def watched(file: int) -> None:
        seen.append(os.listdir(tmp_path))
        synced(file)

    monkeypatch.setattr(os, "fsync", watched)
    found = disk_rate.measure(tmp_path, 9 * MIB)
    assert found.size == 12 * MIB, "whole blocks"
    assert min(found.write_s, found.read_s) > 0
    assert seen == [[]], "the file has no name while it is written, and is synced once"
    assert not list(tmp_path.iterdir())


def test_where_the_page_cache_cannot_be_passed_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without(path: Path, flags: int, mode: int = 0o777) -> int:
        file = real(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:  # as the kernel does it: the file is there, and cannot be opened
            os.close(file)
            raise OSError(22, "Invalid argument")
        return file

    monkeypatch.setattr(os, "open", without)
    assert not disk_rate.measure(tmp_path, MIB).direct
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: MIB)
    with pytest.raises(OSError, match="1048576 of 4194304 bytes"):
        disk_rate.measure(tmp_path, MIB)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "memory"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("needs to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_memory_is_told_by_its_file_system(memory: Path, tmp_path: Path) -> None:
    assert disk_rate.file_system(memory) in disk_rate.IN_MEMORY
    assert disk_rate.file_system(tmp_path)


def test_a_fast_disk_gets_a_larger_file_but_no_larger_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def measured(folder: Path, size: int) -> disk_rate.DiskTimes:
        sizes.append(size)
        return disk_rate.DiskTimes(size=size, write_s=size / 1e9, read_s=1.0, direct=True)

    monkeypatch.setattr(disk_rate, "measure", measured)
    disk_rate.largest(tmp_path, 300 * MIB, 100.0)
    assert sizes == [16 * MIB, 64 * MIB, 256 * MIB]
    disk_rate.largest(tmp_path, 1 << 40, 0.2)
    assert sizes[3:] == [16 * MIB, 64 * MIB, 256 * MIB]
    disk_rate.largest(tmp_path, 5 * MIB, 100.0)
    assert sizes[6:] == [5 * MIB]

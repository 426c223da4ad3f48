"""metrics.jsonl: exact floats, whole lines, and a killed writer's rest."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest

from jobs.metrics import MetricsWriter
from strategies.errors import StorageError


def test_floats_keep_all_their_digits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    numbers = [0.1, 1 / 3, 5.664732933044434, 1e-300, float(2**53)]
    for number in numbers:
        writer.append({"loss": number})
    writer.sync()
    writer.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == numbers
    assert '"loss": 0.3333333333333333}' in path.read_text()


def test_a_torn_line_stays_apart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    writer = MetricsWriter(path)
    writer.append({"step": 2})
    writer.append({"step": 3})
    assert path.read_text().splitlines() == ['{"step": 1}', '{"step": 2, "lo', '{"step": 2}', '{"step": 3}']
    writer.close()


def test_one_write_per_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    real = os.write

    def write(fd: int, data: bytes) -> int:
        writes.append(data)
        return real(fd, data)

    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(os, "write", write)
    writer.append({"step": 1})
    assert writes == [b'{"step": 1}\n']
    writer.close()


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(os, "write", lambda fd, data: len(data) - 1)
    with pytest.raises(StorageError, match="write the metrics"):
        writer.append({"step": 1})
    writer.close()


def test_what_could_be_written_in_part_only_is_refused_with_the_systems_reason(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, most[1]))
        with pytest.raises(StorageError, match="write the metrics") as caught:
            writer.append({"step": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert os.strerror(errno.EFBIG) in caught.value.why
    writer.append({"step": 1})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"ste\n{"step": 1}\n'


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="open the metrics"):
        MetricsWriter(tmp_path / "nowhere" / "metrics.jsonl")

"""Following a file that grows."""

from __future__ import annotations

from pathlib import Path

from jobs.tail import Tail


def test_tail_waits_for_whole_lines_and_passes_over_damage(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    tail = Tail(path)
    assert tail.read() == []
    path.write_bytes(b'{"a": 1}\n{"b"')
    assert tail.read() == [{"a": 1}]
    with path.open("ab") as file:
        file.write(b': 2}\n{"torn\n\xff\n[1]\n{"c": 3}\n')
    assert tail.read() == [{"b": 2}, {"c": 3}]
    assert tail.read() == []

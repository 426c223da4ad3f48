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


def test_tail_takes_bites_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"".join(b'{"a": %d}\n' % number for number in range(100)) + b'{"a": 1')
    tail, bites = Tail(path), list[list[dict[str, int]]]()
    while bite := tail.read(64):
        bites.append(bite)
    assert [line["a"] for bite in bites for line in bite] == list(range(100))
    assert max(len(bite) for bite in bites) <= 8

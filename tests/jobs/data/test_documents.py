"""Documents come out of every kind of file as they went in, whole and once, however a file is cut into parts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data.corpus import PIECE_BYTES
from jobs.data.documents import Findings, Part, read_part
from jobs.data.sources import units
from jobs.data.work import texts
from jobs.spec import SourceSpec
from strategies.errors import ConfigError

DOCUMENTS = [f"document {number}: grüße, 世界\n" + "word " * (number % 37) for number in range(300)]


def lines(field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: text}).encode() + b"\n" for text in DOCUMENTS)


def write_table(path: Path, kind: str) -> None:
    table = pa.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=17)
        return
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=17)


def write_zstd(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(lines())


def dataset(folder: Path) -> None:
    """What ``datasets``' save_to_disk leaves (its own writer makes the stream format)."""
    folder.mkdir(parents=True)
    write_table(folder / "data-00000-of-00001.arrow", "stream")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")


def splits(folder: Path) -> None:
    dataset(folder / "train")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


MAKERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(lines()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "a.jsonl.zst": write_zstd,
    "a.parquet": lambda path: write_table(path, "parquet"),
    "a.arrow": lambda path: write_table(path, "file"),
    "dataset": dataset,
    "splits": splits,
}


@pytest.mark.parametrize("limit", [1 << 30, 4000])
@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_gives_the_documents(name: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MAKERS[name](tmp_path / name)
    monkeypatch.setattr("jobs.data.sources.UNIT_BYTES", limit)
    found = units(SourceSpec(path=str(tmp_path / name)))
    assert [piece.text for unit in found for piece in texts(unit)] == DOCUMENTS
    if limit == 4000 and not name.endswith((".gz", ".zst")):
        assert len(found) > 3
    assert {part.path for unit in found for part in unit.parts} <= {str(path) for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("step", [1, 7, 100, 5000])
def test_any_cut_of_lines_gives_each_line_once(step: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines()[:5000].rpartition(b"\n")[0])  # the last line has no end
    size = path.stat().st_size
    whole = [piece.text for piece in read_part("jsonl", "text", Part(path=str(path)), Findings())]
    parts = [Part(path=str(path), start=at, stop=-1 if at + step >= size else at + step) for at in range(0, size, step)]
    found = [piece.text for part in parts for piece in read_part("jsonl", "text", part, Findings())]
    assert found == whole
    assert len(whole) > 30


def test_a_folder_of_text_is_a_document_per_file(tmp_path: Path) -> None:
    for number, text in enumerate(["one", "", "two\n", "   \n"]):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "4.bin").write_bytes(b"x\0y")
    (unit,) = units(SourceSpec(path=str(tmp_path)))
    found = [Findings() for _ in unit.parts]
    pieces = [list(read_part("text", "", part, told)) for part, told in zip(unit.parts, found, strict=True)]
    assert [[piece.text for piece in some] for some in pieces][:4] == [["one"], [], ["two\n"], []]
    assert [(told.empty, told.binary) for told in found] == [
        (0, False),
        (1, False),
        (0, False),
        (1, False),
        (0, True),
    ]


def test_a_large_text_is_cut_into_parts_of_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "book.txt"
    path.write_text(("é" * 30 + "\n") * 60_000 + "x" * (2 * PIECE_BYTES) + "\nend", encoding="utf-8")
    monkeypatch.setattr("jobs.data.sources.UNIT_BYTES", 1 << 20)
    found = units(SourceSpec(path=str(path)))
    assert len(found) > 4
    pieces = [list(texts(unit)) for unit in found]
    assert "".join(piece.text for some in pieces for piece in some) == path.read_text(encoding="utf-8")
    assert [piece.last for some in pieces for piece in some].count(True) == 1
    assert pieces[-1][-1].last or not pieces[-1]
    heads = {piece.head for some in pieces for piece in some if piece.head}
    assert len(heads) == 1, "every part must come to the same verdict about the document"
    assert all(some[0].head for some in pieces if some)


def test_records_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n{"text": \n[1]\n{"body": "x"}\n{"text": 3}\n{"text": null}\n{"text": " "}\n')
    found = Findings()
    assert [piece.text for piece in read_part("jsonl", "text", Part(path=str(path)), found)] == ["good"]
    assert (found.bad, found.empty, found.lines) == (4, 2, 8)
    assert found.problems == [
        (3, "is not JSON (Expecting value)"),
        (4, "is no record but list"),
        (5, "has no field 'text' (its fields: body)"),
    ]


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_table(tmp_path / "a.parquet", "parquet")
    (tmp_path / "b.parquet").write_text("no table")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["test", "dev"]}')
    dataset(tmp_path / "odd")
    (tmp_path / "odd" / "state.json").write_text('{"_data_files": [1]}')
    for path, field, words in [
        ("gone", "text", "there is no such file or folder"),
        ("empty", "text", "holds no files of kind text (0 files were found)"),
        ("a.parquet", "body", "has no field 'body' (its fields: id, text)"),
        ("b.parquet", "text", "is not parquet"),
        ("splits", "text", "has no split 'train'; give the folder of one of test, dev"),
        ("odd", "text", "state.json: does not name the files of a dataset"),
    ]:
        with pytest.raises(ConfigError) as caught:
            units(SourceSpec(path=str(tmp_path / path), field=field))
        assert words in caught.value.what

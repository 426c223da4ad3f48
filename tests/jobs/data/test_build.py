"""Preparing a corpus: what it makes, what it refuses, and that neither a kill nor a rival leaves a ruin."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.data import TokenStore, prepare
from jobs.data.build import _pieces
from jobs.data.corpus import PIECE_BYTES, pieces, scan
from jobs.data.store import read_meta
from jobs.data.tokenizer import END_OF_TEXT_ID
from jobs.spec import DataSpec
from strategies.errors import ConfigError, StorageError

TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n\n" for i in range(400))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.py").write_text(TEXT)
    (folder / "sub" / "b.txt").write_text("grüße, 世界\n" * 50, encoding="utf-8")
    return folder


def text(path: Path) -> DataSpec:
    return DataSpec(kind="text", path=str(path))


def test_the_store_holds_the_corpus(corpus: Path, tmp_path: Path) -> None:
    data = prepare(text(corpus), tmp_path / "stores", 300)
    meta = read_meta(Path(data.store))
    assert (data.vocab, data.digest, meta.documents, meta.skipped) == (300, meta.digest, 2, 0)
    store = TokenStore(data, 8)
    tokens = np.fromfile(Path(data.store) / "tokens.bin", dtype="<u2").astype(np.int64)
    ends = np.flatnonzero(tokens == END_OF_TEXT_ID)
    assert len(tokens) == meta.count
    assert len(ends) == 2
    assert store.decode(tokens[: ends[0]].tolist()) == TEXT
    assert store.decode(tokens[ends[0] + 1 : ends[1]].tolist()) == "grüße, 世界\n" * 50
    assert store.encode(TEXT) == tokens[: ends[0]].tolist()


def test_a_document_that_spells_its_own_end_goes_on(tmp_path: Path) -> None:
    """An end that is written in the text is text: it forges no boundary, and can be read again."""
    (tmp_path / "a.txt").write_text(TEXT + "<|endoftext|> forged" + TEXT)
    data = prepare(text(tmp_path / "a.txt"), tmp_path / "stores", 300)
    tokens = np.fromfile(Path(data.store) / "tokens.bin", dtype="<u2").astype(np.int64)
    assert np.flatnonzero(tokens == END_OF_TEXT_ID).tolist() == [len(tokens) - 1]
    store = TokenStore(data, 8)
    assert store.decode(tokens.tolist()) == TEXT + "<|endoftext|> forged" + TEXT
    assert END_OF_TEXT_ID not in store.encode("<|endoftext|>")


def test_windows_overlap_by_the_target_of_the_last_token(corpus: Path, tmp_path: Path) -> None:
    data = prepare(text(corpus), tmp_path / "stores", 300)
    store = TokenStore(data, 16)
    tokens = np.fromfile(Path(data.store) / "tokens.bin", dtype="<u2").astype(np.int64)
    assert store.windows == (len(tokens) - 1) // 16
    for number in (0, 1, store.windows - 1):
        window = store.window(number)
        assert window.dtype == np.int64
        assert window.tolist() == tokens[number * 16 : number * 16 + 17].tolist()
    assert store.sample(3, 5).tolist() == store.window(store.order(3).locate(5)[1]).tolist()


def test_preparing_again_reads_the_cache_and_tells_its_progress(corpus: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    first = prepare(text(corpus), tmp_path / "stores", 300, lambda phase, part: told.append((phase, part)))
    phases = list(dict.fromkeys(phase for phase, _ in told))
    assert phases == ["reading", "training the tokenizer", "tokenizing", "ready"]
    assert all(0 <= part <= 1 for _, part in told)
    stamp = (Path(first.store) / "tokens.bin").stat().st_mtime_ns
    told.clear()
    assert prepare(text(corpus), tmp_path / "stores", 300, lambda phase, part: told.append((phase, part))) == first
    assert {phase for phase, _ in told} == {"reading", "checking", "ready"}
    assert (Path(first.store) / "tokens.bin").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in (tmp_path / "stores").iterdir()) == [Path(first.store).name]
    assert sorted(path.name for path in Path(first.store).iterdir()) == ["meta.json", "tokenizer.json", "tokens.bin"]


def test_the_same_corpus_gives_the_same_bytes_elsewhere(corpus: Path, tmp_path: Path) -> None:
    first = prepare(text(corpus), tmp_path / "one", 300)
    second = prepare(text(corpus), tmp_path / "two", 300)
    assert (first.digest, Path(first.store).name) == (second.digest, Path(second.store).name)
    assert read_meta(Path(first.store)) == read_meta(Path(second.store))


def test_another_content_or_vocabulary_gets_another_store(corpus: Path, tmp_path: Path) -> None:
    first = prepare(text(corpus), tmp_path / "stores", 300)
    assert prepare(text(corpus), tmp_path / "stores", 301).store != first.store
    (corpus / "a.py").write_text(TEXT.replace("return", "yield "))
    second = prepare(text(corpus), tmp_path / "stores", 300)
    assert second.store != first.store
    assert second.digest != first.digest


def test_wide_tokens_are_stored_in_four_bytes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.data.build.token_width", lambda vocab: 4)
    data = prepare(text(corpus), tmp_path / "wide", 300)
    narrow = tmp_path / "narrow"
    monkeypatch.undo()
    two = prepare(text(corpus), narrow, 300)
    assert read_meta(Path(data.store)).width == 4
    assert TokenStore(data, 8).window(3).tolist() == TokenStore(two, 8).window(3).tolist()


def test_binary_files_are_skipped_and_broken_utf8_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"hello \xff world\n" * 50)
    (folder / "b.bin").write_bytes(b"text, then \0 binary")
    (folder / "empty").write_bytes(b"")
    (folder / ".hidden").write_bytes(b"never read")
    data = prepare(text(folder), tmp_path / "stores", 257)
    meta = read_meta(Path(data.store))
    assert (meta.documents, meta.skipped) == (1, 1)
    store = TokenStore(data, 8)
    assert store.decode(store.window(0).tolist()).startswith("hello �"[:7])


def test_long_documents_are_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    line = "é" * 400_001
    path.write_text("short\n" + line + "\n" + "x" * 700_000 + "\n" + line, encoding="utf-8")
    found = scan(text(path)).documents
    parts = list(pieces(found[0]))
    assert len(parts) > 1
    assert all(len(part.encode()) <= 2 * PIECE_BYTES for part in parts)
    assert "".join(parts) == path.read_text(encoding="utf-8")
    assert [last for _, last in _pieces(found)] == [False] * (len(parts) - 1) + [True]


def test_no_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a path"):
        prepare(DataSpec(kind="text"), tmp_path, 300)


def test_a_missing_corpus(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read") as caught:
        prepare(text(tmp_path / "nowhere"), tmp_path / "stores", 300)
    assert "there is no such file or folder" in str(caught.value)
    assert not (tmp_path / "stores").exists()


def test_an_unreadable_corpus(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(self: Path, *args: str, **options: str) -> object:
        if self.name == "a.py":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match=r"a\.py") as caught:
        prepare(text(corpus), tmp_path / "stores", 300)
    assert "permission denied" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"\0\1\2"])
def test_an_empty_corpus(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    if content is not None:
        (folder / "file").write_bytes(content)
    with pytest.raises(ConfigError, match="is empty") as caught:
        prepare(text(folder), tmp_path / "stores", 300)
    assert ("NUL" in str(caught.value)) == (content == b"\0\1\2")


@pytest.mark.parametrize("vocab", [0, 256])
def test_a_vocabulary_below_the_bytes(corpus: Path, tmp_path: Path, vocab: int) -> None:
    with pytest.raises(ConfigError, match=f"model.vocab={vocab} is outside 257"):
        prepare(text(corpus), tmp_path / "stores", vocab)


def test_a_vocabulary_that_the_corpus_cannot_give(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than the corpus can give") as caught:
        prepare(text(corpus), tmp_path / "stores", 50_000)
    possible = int(caught.value.hint.split()[3])
    assert not (tmp_path / "stores").exists(), "nothing was written"
    assert prepare(text(corpus), tmp_path / "stores", possible).vocab == possible


def test_a_corpus_shorter_than_one_sequence(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shorter than one sequence(.|\n)*It has at most \d+ tokens"):
        prepare(text(corpus), tmp_path / "stores", 300, seq=10**6)
    assert not (tmp_path / "stores").exists(), "what its length excludes is told before anything is written"
    with pytest.raises(ConfigError, match="shorter than one sequence") as caught:
        prepare(text(corpus), tmp_path / "stores", 300, seq=20_000)
    possible = int(caught.value.hint.split()[-3])
    data = prepare(text(corpus), tmp_path / "stores", 300, seq=possible)
    assert TokenStore(data, possible).windows == 1
    with pytest.raises(ConfigError, match="shorter than one sequence"):
        TokenStore(data, possible + 1)


def test_a_store_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "stores").write_text("a file, not a folder")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        prepare(text(corpus), tmp_path / "stores", 300)
    assert "Traceback" not in str(caught.value)


def test_a_full_disk_leaves_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="cannot be written") as caught:
        prepare(text(corpus), tmp_path / "stores", 300)
    assert "No space left" in str(caught.value)
    assert list((tmp_path / "stores").iterdir()) == []


def test_ranks_refuse_another_store(corpus: Path, tmp_path: Path) -> None:
    data = prepare(text(corpus), tmp_path / "stores", 300)
    others: list[dict[str, Any]] = [{"digest": "0" * 64}, {"vocab": 301}]
    for other in others:
        with pytest.raises(StorageError, match="cannot be used"):
            TokenStore(dataclasses.replace(data, **other), 8)


@pytest.mark.parametrize("name", ["tokens.bin", "tokenizer.json"])
def test_a_flipped_byte_is_found_by_the_next_submit(corpus: Path, tmp_path: Path, name: str) -> None:
    """Its size is right, so that only reading it can tell."""
    data = prepare(text(corpus), tmp_path / "stores", 300)
    path = Path(data.store) / name
    good = path.read_bytes()
    path.write_bytes(good[:99] + bytes([good[99] ^ 1]) + good[100:])
    assert prepare(text(corpus), tmp_path / "stores", 300) == data
    assert path.read_bytes() == good
    assert [path.name for path in (tmp_path / "stores").iterdir()] == [Path(data.store).name]


@pytest.mark.parametrize("damage", ["short", "gone", "meta", "version"])
def test_a_damaged_store_is_refused_and_made_anew(corpus: Path, tmp_path: Path, damage: str) -> None:
    data = prepare(text(corpus), tmp_path / "stores", 300)
    folder = Path(data.store)
    if damage == "short":
        with (folder / "tokens.bin").open("r+b") as file:
            file.truncate(100)
    elif damage == "gone":
        (folder / "tokens.bin").unlink()
    elif damage == "meta":
        (folder / "meta.json").write_text("{")
    else:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | {"version": 99}))
    with pytest.raises(StorageError, match="cannot be used"):
        TokenStore(data, 8)
    assert prepare(text(corpus), tmp_path / "stores", 300) == data
    assert TokenStore(data, 8).windows > 0
    assert [path.name for path in (tmp_path / "stores").iterdir()] == [folder.name]


def test_a_changed_tokenizer_is_refused(corpus: Path, tmp_path: Path) -> None:
    data = prepare(text(corpus), tmp_path / "stores", 300)
    with (Path(data.store) / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(StorageError, match=r"tokenizer\.json was changed"):
        TokenStore(data, 8).encode("x")


CHILD = """
import sys
from pathlib import Path
from jobs.data import prepare
from jobs.spec import DataSpec
def tell(phase, part):
    print(phase, part, flush=True)
    if phase == sys.argv[3]:
        sys.stdin.read()
print("store", prepare(DataSpec(kind="text", path=sys.argv[1]), Path(sys.argv[2]), 300, tell).digest, flush=True)
"""


def start(corpus: Path, stores: Path, stop_at: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(corpus), str(stores), stop_at],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(child: subprocess.Popen[str], phase: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(phase):
            return
    raise AssertionError(f"{phase} was never told")


def test_a_kill_leaves_no_ruin(corpus: Path, tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    with start(corpus, stores, "tokenizing") as child:
        wait_for(child, "tokenizing")
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=20)
    left = list(stores.iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".aside-")
    data = prepare(text(corpus), stores, 300)
    assert [path.name for path in stores.iterdir()] == [Path(data.store).name]


def test_two_at_once_make_one_store(corpus: Path, tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    with start(corpus, stores, "tokenizing") as first, start(corpus, stores, "tokenizing") as second:
        for child in (first, second):
            wait_for(child, "tokenizing")
        outputs = [child.communicate("", timeout=60)[0] for child in (first, second)]
    digests = [output.strip().splitlines()[-1] for output in outputs]
    assert digests[0] == digests[1]
    assert digests[0].startswith("store ")
    assert len(list(stores.iterdir())) == 1


def test_importing_the_package_needs_no_libraries() -> None:
    code = "import sys, jobs.data; print(sorted({'numpy', 'tokenizers', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout.strip() == "[]"


@pytest.mark.full
def test_the_standard_library(tmp_path: Path) -> None:
    data = prepare(DataSpec(kind="stdlib"), tmp_path, 2048, seq=128)
    meta = read_meta(Path(data.store))
    assert meta.text_bytes > 5_000_000
    assert meta.text_bytes / meta.count > 2.0, "merges learned from a part must compress the whole"
    store = TokenStore(data, 128)
    assert "def " in store.decode(np.concatenate([store.window(i) for i in range(50)]).tolist())
    stamp = (Path(data.store) / "tokens.bin").stat().st_mtime_ns
    assert prepare(DataSpec(kind="stdlib"), tmp_path, 2048) == data
    assert (Path(data.store) / "tokens.bin").stat().st_mtime_ns == stamp, "the cache must not be rebuilt"

"""Preparing a mixture: what ranks read of it, every mistake at once and nothing written, and kills that cost little."""

from __future__ import annotations

import dataclasses
import gzip
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import pre_tokenizers

from jobs.data import open_samples, prepare_mixture
from jobs.data.ends import find_end
from jobs.data.samples import Mixture
from jobs.data.shards import VALID, Tokens, read_source, side_of
from jobs.data.tokenizer import read_tokenizer
from jobs.data.work import Answer, Request, perform
from jobs.spec import DataSpec, SourceSpec
from strategies.errors import ConfigError, StorageError

SEQ = 16


class Inline:
    """Does the work in this process, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.verbs: Counter[str] = Counter()

    def __call__(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer]]:
        for index, request in reversed(list(enumerate(requests))):  # any order must do
            self.verbs[request["verb"]] += 1
            answer = perform(json.loads(json.dumps(request)))
            if "error" in answer:
                raise StorageError(answer["error"])
            yield index, answer


def write(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def documents(word: str, number: int) -> list[str]:
    return [f"{word} {index}: {' '.join([word] * (index % 11))} ends." for index in range(number)]


@pytest.fixture
def sources(tmp_path: Path) -> tuple[SourceSpec, ...]:
    return (
        SourceSpec(path=str(write(tmp_path / "crawl.jsonl", documents("crawl", 400))), weight=3),
        SourceSpec(path=str(write(tmp_path / "books.jsonl", documents("book", 200), "body")), field="body", weight=1),
        SourceSpec(path=str(write(tmp_path / "wiki.jsonl", documents("wiki", 60))), epochs=3.4),
    )


def mixture(sources: Sequence[SourceSpec], **fields: Any) -> DataSpec:
    return DataSpec(kind="mixture", sources=tuple(sources), **fields)


def prepared(data: DataSpec, root: Path, runner: Inline | None = None, *, samples: int = 4000) -> DataSpec:
    return prepare_mixture(data, root, 300, seq=SEQ, samples=samples, runner=runner or Inline())


def test_what_ranks_read_is_what_was_asked_for(sources: tuple[SourceSpec, ...], tmp_path: Path) -> None:
    data = prepared(mixture(sources), tmp_path / "stores")
    mix = Mixture(data, SEQ)
    assert [source.name for source in data.sources] == ["crawl", "books", "wiki"]
    seen = Counter(mix.locate(7, index)[0] for index in range(4000))
    wiki = 3.4 * mix.windows[2]
    assert abs(seen[2] - wiki) < 2, "Wikipedia is seen 3.4 times"
    assert abs(seen[0] - 3 * seen[1]) < 6
    assert abs(seen[2] * SEQ / data.sources[2].tokens - 3.4) < 0.1
    windows = Counter(mix.locate(7, index)[1:] for index in range(4000) if mix.locate(7, index)[0] == 2)
    assert max(windows.values()) == 1, "an epoch has every window once"
    for index in range(60):
        source, _, _ = mix.locate(7, index)
        assert ("crawl", "book", "wiki")[source] in mix.decode(mix.sample(7, index).tolist())


def test_tokens_are_the_documents_in_order(sources: tuple[SourceSpec, ...], tmp_path: Path) -> None:
    data = prepared(mixture(sources), tmp_path / "stores")
    meta = read_source(Path(data.sources[0].store))
    tokens = Tokens(Path(data.sources[0].store), meta, "train")
    ids = tokens.slice(0, tokens.count)
    ends = np.flatnonzero(ids == data.end_id)
    assert (len(ends), ends[-1]) == (400, tokens.count - 1)
    mix = Mixture(data, SEQ)
    assert mix.decode(ids[: ends[0]].tolist()) == documents("crawl", 1)[0]
    assert mix.decode(ids[ends[9] + 1 : ends[10]].tolist()) == documents("crawl", 400)[10]
    assert mix.encode(documents("crawl", 400)[10]) == ids[ends[9] + 1 : ends[10]].tolist()


def test_shards_are_one_row_of_tokens(
    sources: tuple[SourceSpec, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepared(mixture(sources), tmp_path / "one")
    monkeypatch.setattr("jobs.data.sources.UNIT_BYTES", 1000)
    many = prepared(mixture(sources), tmp_path / "many")
    assert len(read_source(Path(many.sources[0].store)).shards) > 10
    assert Path(one.store, "tokenizer.json").exists()
    tokenizer = Path(one.store, "tokenizer.json")
    cut, whole = (
        prepared(dataclasses.replace(mixture(sources), tokenizer=str(tokenizer)), tmp_path / name)
        for name in ("cut", "whole")
    )
    monkeypatch.undo()
    whole = prepared(dataclasses.replace(mixture(sources), tokenizer=str(tokenizer)), tmp_path / "whole2")
    a, b = open_samples(cut, SEQ), open_samples(whole, SEQ)
    assert all(np.array_equal(a.sample(1, index), b.sample(1, index)) for index in range(300))


def test_validation_is_a_part_of_the_documents_by_their_own_hash(
    sources: tuple[SourceSpec, ...], tmp_path: Path
) -> None:
    data = prepared(mixture(sources, validation=0.2), tmp_path / "stores")
    for source, texts in zip(data.sources, (documents("crawl", 400), documents("book", 200)), strict=False):
        meta = read_source(Path(source.store))
        wanted = sum(side_of(text.encode(), 0.2) == VALID for text in texts)
        assert (meta.documents("valid"), meta.documents("train")) == (wanted, len(texts) - wanted)
        assert 0.1 < wanted / len(texts) < 0.3
    held_out = open_samples(data, SEQ).validation()
    assert held_out is not None
    trained = {text for source in data.sources for text in _texts(data, source, "train")}
    validated = {text for source in data.sources for text in _texts(data, source, "valid")}
    assert trained
    assert validated
    assert not trained & validated
    assert isinstance(held_out, Mixture)
    located = [held_out.locate(3, index) for index in range(held_out.count)]
    assert {epoch for _, epoch, _ in located} == {0}, "nothing is validated with twice"
    assert {source for source, *_ in located} == {0, 1, 2}


def _texts(data: DataSpec, source: SourceSpec, side: str) -> list[str]:
    tokens = Tokens(Path(source.store), read_source(Path(source.store)), side)
    ids = tokens.slice(0, tokens.count)
    mix = Mixture(data, SEQ)
    return [mix.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == data.end_id) + 1)[:-1]]


def test_other_weights_need_no_new_tokens(sources: tuple[SourceSpec, ...], tmp_path: Path) -> None:
    first, runner = prepared(mixture(sources), tmp_path / "stores"), Inline()
    changed = [dataclasses.replace(sources[0], weight=1), *sources[1:]]
    second = prepared(mixture(changed), tmp_path / "stores", runner)
    assert runner.verbs == {"survey": 3, "check": 3}
    assert second.digest != first.digest
    assert [one.store for one in second.sources] == [one.store for one in first.sources]
    write(tmp_path / "books.jsonl", documents("tome", 200), "body")
    assert prepared(mixture(sources), tmp_path / "stores", runner).digest != first.digest


@pytest.mark.parametrize("finished", [True, False])
def test_a_flipped_byte_is_found_by_the_next_submit(
    sources: tuple[SourceSpec, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """Its size is right, so that only reading it can tell; of all shards just this one is made anew."""
    monkeypatch.setattr("jobs.data.sources.UNIT_BYTES", 4000)
    first, runner, phases = prepared(mixture(sources), tmp_path / "stores"), Inline(), []
    path = Path(first.sources[0].store, "00001.train.bin")
    good = path.read_bytes()
    path.write_bytes(good[:99] + bytes([good[99] ^ 1]) + good[100:])
    if not finished:  # as a kill leaves it
        Path(first.sources[0].store, "meta.json").unlink()
    second = prepare_mixture(
        mixture(sources),
        tmp_path / "stores",
        300,
        lambda phase, part: phases.append((phase, part)),
        seq=SEQ,
        samples=4000,
        runner=runner,
    )
    assert second == first
    assert path.read_bytes() == good
    assert runner.verbs["tokenize"] == 1
    assert runner.verbs["check"] == sum(len(read_source(Path(one.store)).shards) for one in first.sources) > 5
    assert list(dict.fromkeys(phase for phase, _ in phases)) == [
        "reading",
        "checking",
        "making 1 damaged shard anew",
        "ready",
    ]
    assert all(0 <= part <= 1 for _, part in phases)


def test_a_tokenizer_that_was_changed_is_trained_again(sources: tuple[SourceSpec, ...], tmp_path: Path) -> None:
    first = prepared(mixture(sources), tmp_path / "stores")
    path = Path(first.store, "tokenizer.json")
    good = path.read_text()
    path.write_text(good.replace('"type"', ' "type"', 1))
    read_tokenizer(path)
    assert prepared(mixture(sources), tmp_path / "stores") == first
    assert path.read_text() == good


def test_the_same_text_gives_the_same_digest_elsewhere(sources: tuple[SourceSpec, ...], tmp_path: Path) -> None:
    one, two = (prepared(mixture(sources, validation=0.1), tmp_path / name) for name in ("one", "two"))
    assert one.digest == two.digest


def test_other_kinds_of_data_can_have_a_validation_part(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(documents("text", 100)):
        (folder / f"{number}.txt").write_text(text * 5)
    data = prepared(DataSpec(kind="text", path=str(folder), validation=0.2), tmp_path / "stores")
    assert open_samples(data, SEQ).validation() is not None
    assert data.sources[0].name == "text"


def test_every_problem_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n' * 3 + "{oops\n" + '{"text": "fine"}\n' + "nonsense\n" * 9)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n\n')
    (tmp_path / "tokenizer.json").write_text("{}")
    data = mixture(
        [
            SourceSpec(path=str(broken), weight=1),
            SourceSpec(path=str(tmp_path / "empty.jsonl"), weight=0.5),
            SourceSpec(path=str(tmp_path / "gone"), weight=1),
            SourceSpec(path=str(write(tmp_path / "c.jsonl", ["x"], "body")), weight=1),
            SourceSpec(path=str(broken), name="odd", kind="jsnl", weight=-1),
        ],
        tokenizer=str(tmp_path / "tokenizer.json"),
    )
    with pytest.raises(ConfigError) as caught:
        prepared(data, tmp_path / "stores")
    said = str(caught.value)
    for words in (
        "The data have 7 problems",
        f"broken: 10 records cannot be used\n      {broken}:4: is not JSON (Expecting property name",
        f"{broken}:6: is not JSON",
        "... and 7 more",
        "empty: has weight 0.5, but no documents in",
        "empty.jsonl, 1 empty",
        "gone: there is no such file or folder",
        "c.jsonl:1: has no field 'text' (its fields: body)",
        "odd: kind: not a known value: 'jsnl'. Did you mean 'jsonl'?",
        "odd: weight: expected 0 or more, found -1",
        "is no tokenizer.json",
    ):
        assert words in said, said
    assert not (tmp_path / "stores").exists()


def test_a_source_of_weight_zero_may_be_empty(sources: tuple[SourceSpec, ...], tmp_path: Path) -> None:
    nothing = SourceSpec(path=str(write(tmp_path / "none.jsonl", [])), weight=0)
    data = prepared(mixture([*sources, nothing]), tmp_path / "stores")
    assert data.sources[-1].share == 0
    assert 3 not in {Mixture(data, SEQ).locate(0, index)[0] for index in range(200)}


def test_a_tokenizer_that_is_given(sources: tuple[SourceSpec, ...], tmp_path: Path) -> None:
    own = prepared(mixture(sources), tmp_path / "stores")
    path = tmp_path / "given.json"
    tokenizer = read_tokenizer(Path(own.store, "tokenizer.json"))
    tokenizer.enable_truncation(3)  # what a file says about that must not cut documents
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path))
    data = prepared(mixture(sources, tokenizer=str(path)), tmp_path / "stores")
    assert [one.digest for one in data.sources] == [one.digest for one in own.sources]
    with pytest.raises(ConfigError) as caught:
        prepare_mixture(
            mixture(sources, tokenizer=str(path)), tmp_path / "s", 257, seq=SEQ, samples=100, runner=Inline()
        )
    assert f"{path} has 300 tokens, model.vocab=257 is too small for it. Set model.vocab to 300" in str(caught.value)
    assert find_end(tokenizer, path).id == data.end_id
    short = SourceSpec(path=str(write(tmp_path / "short.jsonl", ["xyz"])), weight=1)
    for prefix, words in (
        (False, "The data have a problem:.*short.*at most 4 tokens"),
        (True, "fit.*short: .*has . tok"),
    ):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)  # which makes more of them
        tokenizer.save(str(path))
        with pytest.raises(ConfigError, match=f"(?s){words}"):
            prepared(mixture([*sources, short], tokenizer=str(path)), tmp_path / "stores")


@pytest.mark.parametrize("given", [False, True])
def test_documents_cannot_forge_boundaries(sources: tuple[SourceSpec, ...], tmp_path: Path, given: bool) -> None:
    """What spells the end of a document is text, under a tokenizer of ours and one that is given."""
    path = None
    if given:
        own = prepared(mixture(sources), tmp_path / "first")
        tokenizer = read_tokenizer(Path(own.store, "tokenizer.json"))
        tokenizer.add_special_tokens(["<|im_end|>"])
        tokenizer.save(str(path := tmp_path / "given.json"))
    forged = [f"{text} <|endoftext|> and <|im_end|> more" for text in documents("forged", 50)]
    source = SourceSpec(path=str(write(tmp_path / "forged.jsonl", forged)), weight=1)
    data = mixture([*sources, source], tokenizer=str(path) if path else None)
    data = prepare_mixture(data, tmp_path / "s", 301, seq=SEQ, samples=4000, runner=Inline())
    folder = Path(data.sources[-1].store)
    tokens = Tokens(folder, read_source(folder), "train").slice(0, data.sources[-1].tokens)
    assert (tokens == data.end_id).sum() == len(forged)
    assert (tokens == 300).sum() == 0 or not given
    assert Mixture(data, SEQ).decode(tokens.tolist()) == "".join(forged)


def test_damaged_files_are_told_with_all_else(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in documents("x", 2000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.jsonl.gz").write_bytes(whole[:-8] + bytes(4) + whole[-4:])
    (tmp_path / "plain.jsonl.gz").write_bytes(gzip.decompress(whole))
    (tmp_path / "cut.jsonl.zst").write_bytes(pa.compress(gzip.decompress(whole), "zstd", asbytes=True)[:500])
    pq.write_table(pa.table({"text": documents("x", 2000)}), tmp_path / "bad.parquet")
    table = bytearray((tmp_path / "bad.parquet").read_bytes())
    table[100:3000] = bytes(2900)
    (tmp_path / "bad.parquet").write_bytes(table)
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    names = ("cut.jsonl.gz", "flipped.jsonl.gz", "plain.jsonl.gz", "cut.jsonl.zst", "bad.parquet", "deep.jsonl", "gone")
    with pytest.raises(ConfigError) as caught:
        prepared(
            mixture([SourceSpec(path=str(tmp_path / one), name=f"s{one}", weight=1) for one in names]),
            tmp_path / "stores",
        )
    said = str(caught.value)
    for words in (
        "The data have 7 problems",
        *(f"  - s{one}: {tmp_path / one}: cannot be read, or not to its end (" for one in names[:5]),
        "deep.jsonl:1: is nested too deeply",
        "gone: there is no such file or folder",
    ):
        assert words in said, said
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("given", [False, True])
def test_half_a_surrogate_pair_is_text(tmp_path: Path, given: bool, sources: tuple[SourceSpec, ...]) -> None:
    """JSON can escape it, UTF-8 cannot hold it, crawls have it."""
    with (tmp_path / "books.jsonl").open("a") as file:
        file.write('{"body": "bad \\ud83d half, good \\ud83d\\ude00 whole"}\n')
    path = Path(prepared(mixture(sources[:1]), tmp_path / "given").store, "tokenizer.json") if given else ""
    data = prepared(mixture(sources, tokenizer=str(path)), tmp_path / "stores")
    assert _texts(data, data.sources[1], "train")[-1] == "bad \ufffd half, good \U0001f600 whole"


def test_what_the_text_alone_excludes_is_told_before_anything_is_written(
    sources: tuple[SourceSpec, ...], tmp_path: Path
) -> None:
    short = SourceSpec(path=str(write(tmp_path / "short.jsonl", ["xyz"])), weight=1)
    with pytest.raises(ConfigError) as caught:
        prepare_mixture(mixture([*sources, short]), tmp_path / "stores", 100, seq=SEQ, samples=4000, runner=Inline())
    said = str(caught.value)
    assert "The data have 2 problems" in said
    assert "model.vocab=100 is outside 257" in said
    assert "short: is shorter than one sequence: it has at most 4 tokens to train on, model.seq=16 needs 17" in said
    with pytest.raises(ConfigError, match=r"epochs ask for 24 samples \(wiki 3.4 x 7\), the run has 10: .*, at least"):
        prepared(mixture(sources), tmp_path / "stores", samples=10)
    assert not (tmp_path / "stores").exists()


def test_a_source_that_is_too_short(tmp_path: Path) -> None:
    data = mixture(
        [
            SourceSpec(path=str(write(tmp_path / "a.jsonl", documents("word", 100))), weight=1),
            SourceSpec(path=str(write(tmp_path / "b.jsonl", ["word word word word"])), weight=1),
        ]
    )
    with pytest.raises(ConfigError, match=r"b: is shorter than one sequence: it has \d tokens to train on"):
        prepared(data, tmp_path / "stores")


def test_epochs_beyond_the_run(sources: tuple[SourceSpec, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the run has 10: nothing is left for weights"):
        prepared(mixture(sources), tmp_path / "stores", samples=10)


@pytest.mark.parametrize("damage", ["cut", "gone", "digest"])
def test_ranks_refuse_a_damaged_store(sources: tuple[SourceSpec, ...], tmp_path: Path, damage: str) -> None:
    data = prepared(mixture(sources), tmp_path / "stores")
    store = Path(data.sources[1].store)
    if damage == "cut":
        with (store / "00000.train.bin").open("r+b") as file:
            file.truncate(10)
    elif damage == "gone":
        (store / "meta.json").unlink()
    else:
        data = dataclasses.replace(
            data, sources=(*data.sources[:2], dataclasses.replace(data.sources[2], digest="0" * 64))
        )
    with pytest.raises(StorageError, match="cannot be used"):
        open_samples(data, SEQ)
    again = prepared(mixture(sources), tmp_path / "stores")
    assert open_samples(again, SEQ).sample(0, 0).shape == (SEQ + 1,)


CHILD = """
import json, sys
from pathlib import Path
from jobs.data import prepare_mixture, sources
from jobs.data.work import Processes
from jobs.spec import DataSpec, SourceSpec
sources.UNIT_BYTES = 30_000
def tell(phase, part):
    print(phase, part, flush=True)
data = DataSpec(kind="mixture", validation=0.1, sources=(SourceSpec(path=sys.argv[1], weight=1),))
found = prepare_mixture(data, Path(sys.argv[2]), 300, tell, seq=16, samples=100, runner=Processes(2))
print("done", found.digest, flush=True)
"""


def start(text: Path, stores: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(text), str(stores)], stdout=subprocess.PIPE, text=True, bufsize=1
    )


def test_a_kill_costs_only_the_shards_that_were_not_finished(tmp_path: Path) -> None:
    """SIGKILL in the middle; what is finished stays as it is, and the result is that of a run without a kill."""
    text, stores = write(tmp_path / "text.jsonl", documents("word", 20_000)), tmp_path / "stores"
    with start(text, stores) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("tokenizing") and float(line.split()[1]) > 0.3:
                break
        child.send_signal(signal.SIGKILL)
    time.sleep(1)  # its workers finish what they are at
    finished = {path: path.stat().st_mtime_ns for path in stores.glob("source-*/*.json")}
    assert len(finished) >= 10
    assert not list(stores.glob("source-*/meta.json"))
    with start(text, stores) as child:
        told = child.communicate(timeout=100)[0].splitlines()
    first = next(float(line.split()[1]) for line in told if line.startswith("tokenizing"))
    assert first >= 0.25, "it goes on where it was"
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    assert not list(stores.glob("source-*/.*")), "nothing is left of what was not finished"
    with start(text, tmp_path / "undisturbed") as child:
        assert child.communicate(timeout=100)[0].splitlines()[-1] == told[-1]
    assert told[-1].startswith("done ")

"""Any tokenizer.json: which token ends a document, and that no text is that token."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jobs.data import prepare_mixture, spelling, work
from jobs.data.blend import _key, ended
from jobs.data.ends import find_end, named_beside
from jobs.data.making import Recipe
from jobs.data.samples import Mixture
from jobs.data.shards import Tokens, read_source
from jobs.data.surveying import Surveyed
from jobs.data.tokenizer import read_tokenizer, vocabulary
from jobs.hf.tokenizer import write_tokenizer
from jobs.spec import DataSpec, SourceSpec
from strategies.errors import ConfigError
from tests.jobs.data.test_blend import Inline

DEEPSEEK = "<｜end▁of▁sentence｜>"
TEXTS = [f"the quick brown fox {n} jumps </s> over [SEP] the lazy dog; {n * n} times" for n in range(200)]


def bpe(*special: str) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(list(special))
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return made


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    )
    return made


def saved(tokenizer: Tokenizer, folder: Path, **beside: Any) -> Path:
    """The tokenizer in a folder, with files beside it."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, document in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder / "tokenizer.json"


def prepared(path: Path, folder: Path, texts: list[str] = TEXTS, **fields: Any) -> DataSpec:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = SourceSpec(path=str(folder / "a.jsonl"), weight=1)
    data = DataSpec(kind="mixture", sources=(source,), tokenizer=str(path), **fields)
    return prepare_mixture(data, folder / "stores", 400, seq=16, samples=50, runner=Inline())


def stored(data: DataSpec) -> list[list[int]]:
    """The tokens of every document, with its end."""
    folder = Path(data.sources[0].store)
    meta = read_source(folder)
    ids = Tokens(folder, meta, "train").slice(0, meta.tokens("train"))
    assert ids[-1] == data.end_id
    return [part.tolist() for part in np.split(ids, np.flatnonzero(ids == data.end_id) + 1)[:-1]]


@pytest.mark.parametrize(("make", "end"), [(unigram, "</s>"), (wordpiece, "[SEP]")])
def test_any_tokenizer_keeps_documents_apart_and_whole(make: Callable[[], Tokenizer], end: str, tmp_path: Path) -> None:
    """Its end stands between documents alone, though both are words of its vocabulary and every text spells them."""
    path = saved(make(), tmp_path / "t")
    data = prepared(path, tmp_path)
    tokenizer = read_tokenizer(path)
    documents = stored(data)
    assert tokenizer.token_to_id(end) == data.end_id
    assert len(documents) == len(TEXTS)
    decoded = [tokenizer.decode(one) for one in documents]
    special = [number for number, one in tokenizer.get_added_tokens_decoder().items() if one.content != end]
    assert not {number for one in documents for number in one} & {*special}, "nor is any other, nor unknown"
    if make is unigram:
        assert decoded == TEXTS
    else:  # its decoder sets spaces as it finds words
        assert [text.replace(" ", "") for text in decoded] == [text.replace(" ", "") for text in TEXTS]
    mix = Mixture(data, 16)
    assert mix.encode(TEXTS[3]) == documents[3][:-1], "a prompt is read as the text was"


@pytest.mark.parametrize("make", [unigram, wordpiece])
def test_shards_of_a_version_that_read_text_otherwise_stay_as_they_are(
    make: Callable[[], Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took text that spells a special token for that token. Runs that it began go on with its shards."""
    path = saved(make(), tmp_path / "t")
    monkeypatch.setattr(spelling, "_spellings", lambda *unused: {})
    before = prepared(path, tmp_path)
    assert len(stored(before)) > len(TEXTS), "documents end where they spell an end"
    Path(before.sources[0].store, "00000.train.bin").write_bytes(b"")  # not whole, and not to be mended by this version
    monkeypatch.undo()
    work._tokenizer.cache_clear()
    after = prepared(path, tmp_path)
    assert len(stored(after)) == len(TEXTS)
    assert Path(before.sources[0].store, "00000.train.bin").read_bytes() == b""


def test_a_store_of_an_earlier_version_is_found_where_the_tokens_are_the_same(tmp_path: Path) -> None:
    """Its name is a literal, as that version made it."""
    (path := tmp_path / "tokenizer.json").write_text("{}")
    one = Surveyed(
        source=SourceSpec(path="a"), units=(), digest="ab" * 32, documents=1, text_bytes=9, empty=0, skipped=0
    )
    names = [
        _key("source", *Recipe.of(tokenizer, 7, path, 0.05).key(one))
        for tokenizer in (bpe("</s>"), bpe("<|im_end|>", DEEPSEEK), unigram(), wordpiece())
    ]
    assert names[0] == names[1] == "source-a8dd8619ecfbf895e708aff752103f65"
    assert names[2] == names[3] != names[0]


def test_the_files_beside_a_tokenizer_name_its_end(tmp_path: Path) -> None:
    chat = bpe("</s>", "<|im_end|>", DEEPSEEK)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("</s>", {}),
        ("<|im_end|>", {"tokenizer_config": {"eos_token": "<|im_end|>"}}),
        (DEEPSEEK, {"tokenizer_config": {"eos_token": {"content": DEEPSEEK, "lstrip": False}}}),
        (DEEPSEEK, {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": DEEPSEEK}}),
        ("<|im_end|>", {"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}}),
        (DEEPSEEK, {"generation_config": {"eos_token_id": chat.token_to_id(DEEPSEEK)}}),
        ("<|im_end|>", {"generation_config": {"eos_token_id": [chat.token_to_id("<|im_end|>"), 0]}}),
        (DEEPSEEK, {"config": {"eos_token_id": chat.token_to_id(DEEPSEEK)}}),
        ("</s>", {"config": {"eos_token_id": 2}}),  # of another vocabulary, or the default of its library
    ]
    for number, (name, beside) in enumerate(cases):
        path = saved(chat, tmp_path / str(number), **beside)
        found = find_end(read_tokenizer(path), path)
        assert (found.name, found.id) == (name, chat.token_to_id(name))
        asked = find_end(read_tokenizer(path), path, "<|im_end|>")
        assert asked.id == chat.token_to_id("<|im_end|>"), "what a person says counts before any file"
    path = saved(chat, tmp_path / "said", tokenizer_config={"eos_token": DEEPSEEK})
    told = ended(DataSpec(kind="mixture", tokenizer=str(path)))
    assert told == f"{DEEPSEEK} ends a document: the files beside the tokenizer name it"


def test_an_end_that_nobody_knows_can_be_named(tmp_path: Path) -> None:
    path = saved(bpe(DEEPSEEK, "<|User|>"), tmp_path / "t")
    with pytest.raises(ConfigError) as caught:
        prepared(path, tmp_path)
    said = str(caught.value)
    assert "has no token that ends a document" in said
    assert f"data.end_token=TOKEN names it. Its special tokens: <|User|>, {DEEPSEEK}" in said
    assert not (tmp_path / "stores").exists()
    with pytest.raises(ConfigError) as caught:
        prepared(path, tmp_path, end_token="<|Uzer|>")
    assert "data.end_token: '<|Uzer|>' is no special token of" in str(caught.value)
    assert "Did you mean '<|User|>'? Its special tokens: " in str(caught.value)
    with pytest.raises(ConfigError, match="'the' is no special token"):
        prepared(path, tmp_path, end_token="the")
    assert not (tmp_path / "stores").exists()
    first, second = (prepared(path, tmp_path, end_token=one) for one in (DEEPSEEK, "<|User|>"))
    tokenizer = read_tokenizer(path)
    assert [one.end_id for one in (first, second)] == [
        tokenizer.token_to_id(DEEPSEEK),
        tokenizer.token_to_id("<|User|>"),
    ]
    for data in (first, second):
        assert [tokenizer.decode(one) for one in stored(data)] == TEXTS
    again = prepared(path, tmp_path, end_token=DEEPSEEK)
    assert again == first
    assert first.sources[0].store != second.sources[0].store, "shards that were made with another end are others"
    assert first.digest != second.digest
    for data, name in ((first, DEEPSEEK), (second, "<|User|>")):
        kept = Path(data.store, "tokenizer.json")
        assert find_end(read_tokenizer(kept), kept).id == data.end_id, "whoever goes on with it has the same end"
        (out := tmp_path / name).mkdir()
        write_tokenizer(kept, out, data.end_id)
        assert named_beside(out / "tokenizer.json") == name, "and so has who takes it out"


def test_no_file_of_a_tokenizer_is_written_in_place(tmp_path: Path) -> None:
    """Ranks and other submits may be reading it: what they have opened stays as it is."""
    path = saved(bpe("</s>"), tmp_path / "t")
    folder = Path(prepared(path, tmp_path).store)
    names = ("special_tokens_map.json", "tokenizer.json", "digest")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context((folder / name).open()) for name in names]
        former = [os.fstat(one.fileno()).st_ino for one in opened]
        text = [(folder / name).read_text() for name in names]
        prepared(path, tmp_path)
        assert all((folder / name).stat().st_ino != number for name, number in zip(names, former, strict=True))
        assert [one.read() for one in opened] == text == [(folder / name).read_text() for name in names]
    assert sorted(one.name for one in folder.iterdir()) == sorted(names), "and nothing is left aside"


def test_an_end_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for end, told in (
        ("<eos>", "name '<eos>' as the end of a text, and it has no such token"),
        ("<unk>", "'<unk>' of .* cannot end documents: text that the tokenizer does"),
    ):
        path = saved(unigram(), tmp_path / "t", tokenizer_config={"eos_token": end})
        with pytest.raises(ConfigError, match=told):
            find_end(read_tokenizer(path), path)
    (tmp_path / "t" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json cannot be read"):
        find_end(read_tokenizer(path), path)
    with pytest.raises(ConfigError, match="has no special tokens"):
        find_end(read_tokenizer(bare := saved(bpe(), tmp_path / "bare")), bare)


def test_an_end_that_is_only_a_word_becomes_a_token(tmp_path: Path) -> None:
    """As some files have it that were converted: transformers makes it a special one when it loads them."""
    document = json.loads(unigram().to_str())
    document["added_tokens"] = [one for one in document["added_tokens"] if one["content"] != "</s>"]
    folder = tmp_path / "t"
    path = saved(Tokenizer.from_str(json.dumps(document)), folder, tokenizer_config={"eos_token": "</s>"})
    data = prepared(path, tmp_path)
    assert data.end_id == 1
    assert len(stored(data)) == len(TEXTS)
    kept = read_tokenizer(Path(data.store, "tokenizer.json"))
    assert vocabulary(kept) == vocabulary(read_tokenizer(path))
    assert kept.get_added_tokens_decoder()[1].special
    unnamed = dataclasses.replace(data, tokenizer=data.store + "/tokenizer.json")
    assert "</s> ends a document" in ended(unnamed)

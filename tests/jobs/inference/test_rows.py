"""Rows of tokens: every token is scored once, choices stand behind their examples, bad lines are told at once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from jobs.data.tokenizer import read_tokenizer
from jobs.hf.folder import model_of
from jobs.inference.questions import read_prompts, read_questions, read_texts
from jobs.inference.rows import Encoder, prepare, read_rows
from jobs.spec import InferenceSpec
from jobs.weights import find
from strategies.errors import ConfigError, StorageError
from tests.support import hf_models
from tests.support.checkpoints import write_model_checkpoint
from tests.support.jobspecs import LLAMA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf") / "model"
    hf_models.make(root, "llama", vocab_size=320)
    hf_models.tokenizer(root / "tokenizer.json", 300)
    return root


def rows(folder: Path, tmp_path: Path, *, stop: bool = False, **asked: Any) -> Any:
    model = model_of(folder)
    spec = prepare(InferenceSpec(**asked), find(str(folder)), model, tmp_path / "cache", stop=stop)
    assert spec.start == 0
    found = read_rows(spec)
    assert len(found) == spec.count
    return found


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return str(path)


def test_every_token_of_a_text_is_scored_exactly_once(folder: Path, tmp_path: Path) -> None:
    text = "def f(x):\n    return x + 1\n" * 30
    found = rows(folder, tmp_path, text=write(tmp_path / "t.jsonl", {"text": text}, {"text": "x"}))
    tokens = [0, *Encoder(folder / "tokenizer.json", 0)(text)]
    pieces = [row for row in found if row.item == 0]
    assert len(pieces) > 2
    scored = [token for row in pieces for token in row.tokens[row.begin :]]
    assert scored == tokens[1:]
    assert all(len(row.tokens) <= 49 for row in pieces)
    assert sum(row.bytes for row in found) == len(text) + 1
    assert all(a.tokens[-1] == b.tokens[0] for a, b in itertools.pairwise(pieces))  # context of one token


def test_a_tokenizer_that_would_cut_or_pad_does_neither(folder: Path, tmp_path: Path) -> None:
    plain = Encoder(folder / "tokenizer.json", None)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "return x + 1\n" * 9
    assert Encoder(tmp_path / "tokenizer.json", None)(text) == plain(text)


def test_what_spells_a_special_token_is_text_everywhere(folder: Path, tmp_path: Path) -> None:
    """As where training data are made: else an article about a token would end, and be scored as, two documents."""
    spelled = "a<|endoftext|>b"
    question = {"question": spelled, "choices": ["x", spelled], "answer": 0}
    text_file, choices_file = write(tmp_path / "t.jsonl", {"text": spelled}), write(tmp_path / "q.jsonl", question)
    text, _, choice = rows(folder, tmp_path, text=text_file, choices=choices_file)
    (prompt,) = rows(folder, tmp_path, prompt=spelled, stop=True)
    plain = read_tokenizer(folder / "tokenizer.json")
    made = plain.encode(spelled, add_special_tokens=False).ids
    assert text.tokens == prompt.tokens == (0, *made), "only what begins a document is that token"
    assert 0 not in made
    assert 0 not in choice.tokens[choice.begin - 1 :]
    assert plain.decode(list(choice.tokens[choice.begin :])) == f" {spelled}"
    assert (text.bytes, choice.bytes) == (len(spelled), len(spelled) + 1)


def test_the_files_of_a_tokenizer_name_the_end_that_a_config_does_not(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    asked = InferenceSpec(prompt="def f")

    def end() -> int | None:
        return prepare(asked, find(str(copy)), model_of(copy), tmp_path / "cache", stop=True).end

    assert end() is None
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|stop|>"])
    tokenizer.save(str(copy / "tokenizer.json"))
    (copy / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|stop|>"}}')
    assert end() == tokenizer.token_to_id("<|stop|>") != 0
    (copy / "config.json").write_text(json.dumps(config))
    assert end() == 0, "the config's counts first"


def test_choices_stand_behind_solved_examples(folder: Path, tmp_path: Path) -> None:
    asked = [{"question": f"{i}?", "choices": ["a", f"b{i}"], "answer": i % 2} for i in range(3)]
    file = write(tmp_path / "q.jsonl", *asked)
    found = rows(folder, tmp_path, choices=file, shots=1)
    assert [(row.item, row.choice, row.right) for row in found] == [
        (0, 0, False),
        (0, 1, True),
        (1, 0, True),
        (1, 1, False),
    ]
    decode = Encoder(folder / "tokenizer.json", 0).tokenizer.decode
    assert decode(list(found[1].tokens)) == "Question: 0?\nAnswer: a\n\nQuestion: 1?\nAnswer: b1"
    assert decode(list(found[1].tokens[found[1].begin :])) == " b1"
    assert found[1].bytes == 3


def test_what_is_too_long_loses_its_beginning(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", {"question": "z" * 90, "choices": ["a", "b"], "answer": "b"})
    for row in rows(folder, tmp_path, choices=file):
        assert len(row.tokens) == 49
        assert row.begin < 49


def test_choices_longer_than_the_sequence_are_refused(folder: Path, tmp_path: Path) -> None:
    """They would be judged by a part of them."""
    short = {"question": "q?", "choices": ["a", "b"], "answer": 0}
    long = {"question": "z?", "choices": ["a", "&%" * 40, "$" * 60], "answer": 0}
    file = write(tmp_path / "q.jsonl", short, short, long)
    with pytest.raises(ConfigError) as caught:
        rows(folder, tmp_path, choices=file, shots=1)
    told = str(caught.value)
    assert "has 2 choices that are longer than the 48 tokens of the model's sequence" in told
    assert "choice 2 of question 3: 81 tokens" in told
    assert "choice 3 of question 3:" in told
    assert not (tmp_path / "cache").exists()
    just = {"question": "z?", "choices": ["a", "&%" * 23 + "&"], "answer": 0}
    last = rows(folder, tmp_path, choices=write(tmp_path / "q.jsonl", just))[1]
    assert (len(last.tokens), last.begin) == (49, 1), "it fills the sequence"


def test_nothing_is_counted_of_the_token_that_nothing_predicts(folder: Path, tmp_path: Path) -> None:
    plain = Encoder(folder / "tokenizer.json", None)
    first = plain.tokenizer.decode([plain("return x")[0]])
    assert len(first) > 1
    assert plain.document("return x") == (plain("return x"), len("return x") - len(first))
    assert plain.document("é") == (plain("é"), 2), "a character of two tokens"
    assert Encoder(folder / "tokenizer.json", 0).document("return x")[1] == len("return x")


SAMPLES = {"digest": "d", "vocab": 300, "packing": True, "end_id": 3}


@pytest.mark.parametrize(
    ("samples", "start", "end"),
    [(SAMPLES, None, 3), (SAMPLES | {"packing": False}, 3, 3), ({"digest": "d", "vocab": 300}, 0, 0)],
    ids=["packed", "unpacked", "of an earlier version"],
)
def test_no_token_stands_before_a_document_where_documents_were_apart(
    folder: Path, tmp_path: Path, samples: dict[str, Any], start: int | None, end: int
) -> None:
    model = dataclasses.replace(LLAMA, vocab=320, layers=1)
    weights = find(str(write_model_checkpoint(tmp_path / "checkpoints", model, samples=samples)))
    text, question = "return x + 1\n", {"question": "q?", "choices": ["a", "b"], "answer": 0}
    files: dict[str, Any] = {"text": write(tmp_path / "t.jsonl", {"text": text})}
    files |= {"choices": write(tmp_path / "q.jsonl", question), "prompt": text}
    for stop in (False, True):
        asked = InferenceSpec(tokenizer=str(folder / "tokenizer.json"), **files)
        spec = prepare(asked, weights, model, tmp_path / "cache", stop=stop)
        assert (spec.start, spec.end, spec.packing) == (start, end, start is None)
        found = read_rows(spec)
        before = [] if start is None else [start]
        tokens = Encoder(folder / "tokenizer.json", None)(text)
        assert found[0].tokens == (*before, *tokens)
        assert all((row.tokens[0] == start) == bool(before) for row in found)


def test_texts_of_which_nothing_is_predicted_are_refused(folder: Path, tmp_path: Path) -> None:
    model = dataclasses.replace(LLAMA, vocab=320, layers=1)
    weights = find(str(write_model_checkpoint(tmp_path / "checkpoints", model, samples=SAMPLES)))
    (tmp_path / "t.txt").write_text("x")
    asked = InferenceSpec(text=str(tmp_path / "t.txt"), tokenizer=str(folder / "tokenizer.json"))
    with pytest.raises(ConfigError, match="There is nothing to predict"):
        prepare(asked, weights, model, tmp_path / "cache", stop=False)


def test_bad_questions_are_told_all_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path / "q.jsonl",
        {"question": "ok?", "choices": ["a", "b"], "answer": 0},
        {"question": "one?", "choices": ["a"], "answer": 0},
        {"question": "two?", "choices": ["a", "b"], "answer": 2},
        {"quesion": "three?", "choices": ["a", "b"], "answer": 1},
        "not json",
    )
    with pytest.raises(ConfigError) as caught:
        read_questions(file, 0)
    told = str(caught.value)
    assert "4 bad lines" in told
    assert "line 2: 'choices' must be a list of at least two texts" in told
    assert "line 3: 'answer' must be one of the choices or 0..1, found 2" in told
    assert "unknown key 'quesion'. Did you mean 'question'?" in told
    assert "line 5:" in told


def test_too_few_questions_for_the_examples(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", {"question": "ok?", "choices": ["a", "b"], "answer": 0})
    with pytest.raises(ConfigError, match=r"1 questions, job\.shots=1 takes so many"):
        read_questions(file, 1)


def test_folders_of_texts_and_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "b.jsonl", {"text": "two"}, {"text": " "})
    (tmp_path / "texts" / "a.txt").write_text("one")
    assert read_texts(str(tmp_path / "texts")) == ["one", "two"]
    assert read_prompts(write(tmp_path / "p.txt", "x", "", "y")) == ["x", "y"]
    assert read_prompts(write(tmp_path / "p.jsonl", {"prompt": "z"})) == ["z"]
    with pytest.raises(StorageError, match="Cannot read"):
        read_prompts(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="There is no text"):
        read_texts(write(tmp_path / "empty.txt", ""))


def test_a_tokenizer_larger_than_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    hf_models.make(tmp_path / "small", "llama", vocab_size=97)
    model = model_of(tmp_path / "small")
    asked = InferenceSpec(prompt="x", tokenizer=str(folder / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"needs a vocabulary of 2\d\d tokens, the model has only 97"):
        prepare(asked, find(str(tmp_path / "small")), model, tmp_path, stop=True)
    with pytest.raises(ConfigError, match="There is no tokenizer beside"):
        prepare(InferenceSpec(prompt="x"), find(str(tmp_path / "small")), model, tmp_path, stop=True)


def test_a_tokenizer_needs_room_for_its_largest_number(folder: Path, tmp_path: Path) -> None:
    """Few tokens, but one of them beyond the embedding: under tensor parallelism that would be no error but zeros."""
    document = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": 400, "content": "<|far|>", "single_word": False, "lstrip": False, "rstrip": False}
    document["model"]["vocab"]["<|far|>"] = 400
    document["added_tokens"].append(token | {"normalized": False, "special": True})
    (tmp_path / "sparse.json").write_text(json.dumps(document))
    asked = InferenceSpec(prompt="x", tokenizer=str(tmp_path / "sparse.json"))
    with pytest.raises(ConfigError, match=r"sparse.json needs a vocabulary of 401 tokens, the model has only 320"):
        prepare(asked, find(str(folder)), model_of(folder), tmp_path, stop=True)


def test_everything_that_is_wrong_with_what_is_asked_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", {"question": "one?", "choices": ["a"], "answer": 0}, "not json")
    asked = InferenceSpec(text=str(tmp_path / "gone.txt"), choices=file, tokenizer=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError) as caught:
        prepare(asked, find(str(folder)), model_of(folder), tmp_path / "cache", stop=False)
    said = str(caught.value)
    for part in ("3 problems", "job.tokenizer: The tokenizer", "job.text: Cannot read", "job.choices: ", "2 bad lines"):
        assert part in said, said
    assert not (tmp_path / "cache").exists()


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    odd = "one\u2028two\u0085three\x0bfour"
    question = {"question": odd, "choices": [odd, "b"], "answer": 0}
    for name, value in (("t", {"text": odd}), ("p", {"prompt": odd}), ("q", question)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(value, ensure_ascii=False) + "\r\n", newline="")
    (tmp_path / "p.txt").write_text(f"{odd}\r\nx\n", newline="")
    assert read_texts(str(tmp_path / "t.jsonl")) == [odd]
    assert read_prompts(str(tmp_path / "p.jsonl")) == [odd]
    assert read_prompts(str(tmp_path / "p.txt")) == [odd, "x"]
    assert read_questions(str(tmp_path / "q.jsonl"), 0)[0].choices[0] == odd


def test_damaged_rows_are_noticed(folder: Path, tmp_path: Path) -> None:
    spec = prepare(InferenceSpec(prompt="x"), find(str(folder)), model_of(folder), tmp_path, stop=True)
    Path(spec.rows).write_text("[]\n")
    with pytest.raises(StorageError, match="are damaged"):
        read_rows(spec)

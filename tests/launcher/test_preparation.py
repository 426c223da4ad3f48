"""Data before a run: what the configuration says, what is wrong with it, and what people are told."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from launcher import build
from launcher.config import compose
from launcher.data_checks import data_spec, sources_outline, unprepared
from launcher.follow import Screen
from launcher.preparation import mixture_text, prepare_data
from launcher.render_plan import sources_line
from launcher.request import LaunchRequest
from launcher.resume_diff import compare
from launcher.resume_plan import _unvalidated, _with_data
from strategies.errors import ConfigError
from tests.support.hf_models import tokenizer

SOURCES = "data.sources=[{path: a.jsonl, weight: 3}, {path: wiki, name: w, epochs: 3.4, field: body}]"


def problem(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(words)
    return str(caught.value)


def test_sources_are_typed_and_their_paths_absolute(tmp_path: Path) -> None:
    config = build.settle(compose(["data=mixture", SOURCES, "data.tokenizer=t.json"]), name="run", cwd=tmp_path)
    spec = data_spec(config)
    assert [source.path for source in spec.sources] == [str(tmp_path / "a.jsonl"), str(tmp_path / "wiki")]
    assert (spec.sources[1].name, spec.sources[1].epochs, spec.sources[1].field) == ("w", 3.4, "body")
    assert spec.tokenizer == str(tmp_path / "t.json")


def test_a_plan_tells_what_a_mixture_is_made_of() -> None:
    given = "data.sources=[{path: crawl, weight: 60}, {path: books.parquet, weight: 20}, {path: wiki, epochs: 3.4}]"
    shown = sources_outline(compose(["data=mixture", given]))
    assert shown is not None
    assert sources_line(shown) == (
        "3 sources: crawl 75.00 %, books 25.00 %, wiki 3.4 epochs (% of what the epochs leave)"
    )
    assert sources_line(shown[:1]) == "1 source: crawl 75.00 %"
    assert sources_line(shown[2:]) == "1 source: wiki 3.4 epochs (proportions, since none has a weight)"
    assert sources_outline(compose(["data=stdlib"])) is None


def test_every_mistake_at_once() -> None:
    said = problem("data=mixture", "data.sources=[{path: a, kind: txt, weight: -1}, {weight: 0}]", "train.eval_every=1")
    for words in (
        "data.sources[0].kind: not a known value: 'txt' (command line: data.sources=",
        "Did you mean 'text'?",
        "data.sources[0].weight: expected 0 or more, found -1",
        "data.sources[1].path: missing",
        "train.eval_every: there is nothing to validate with, data.validation is 0",
    ):
        assert words in said, said
    assert "data.sources: missing" in problem("data=mixture")
    assert "data.end_token: a tokenizer that is trained on the text has no end" in problem("data.end_token=x")
    assert "data.kind=stdlib has none" in problem(SOURCES)
    assert "unknown key 'wieght'" in problem("data=mixture", "data.sources=[{path: a, wieght: 1}]")
    assert "expected at most 0.5" in problem("data.validation=0.7")


def small(tmp_path: Path, *words: str, sources: str = "{path: %s/a.jsonl, weight: 1}") -> str:
    """What people are told of a prepared mixture of 900 short documents."""
    return small_request(tmp_path, *words, sources=sources)[1]


def small_request(tmp_path: Path, *words: str, sources: str) -> tuple[LaunchRequest, str]:
    lines = (json.dumps({"text": f"a {n} and {n * n}"}) for n in range(900))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    given = f"data.sources=[{sources % tmp_path}]"
    words = ("data=mixture", given, "model.vocab=300", "model.seq=16", "cluster=process", "data.workers=1", *words)
    config = build.settle(compose(words), name="run", cwd=tmp_path)
    shown = io.StringIO()
    request = prepare_data(config, build.build_request(config, words), Screen(shown))
    return request, shown.getvalue()


def test_validation_that_is_asked_for_and_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        small(tmp_path, "data.validation=0.0001", "train.eval_every=1")
    assert "there is nothing to validate with" in caught.value.what
    assert "data.validation=0.0001 keeps 0 documents of 900 from training" in caught.value.why
    said = small(tmp_path, "data.validation=0.1", "train.eval_every=1")
    assert 40 < int(said.partition("to validate with: ")[2].split()[0]) < 100
    one = "{path: %s/a.jsonl, weight: 1}"
    before, said = small_request(tmp_path, "data.validation=0.0001", sources=one)
    assert "to validate with: 0 sequences" in said
    job = replace(before.job, train=replace(before.job.train, eval_every=1))
    with pytest.raises(ConfigError, match="nothing to validate with"):  # a resume that asks for it only now
        _with_data(compose(["cluster=process"]), before, replace(before, job=job))
    always = replace(before, job=job)  # a run of an earlier version, which did not ask
    assert _with_data(compose(["cluster=process"]), always, always).job.data == before.job.data
    (note,) = _unvalidated(always)
    assert "keeps 0 documents of 900 from training" in note
    assert note.endswith("train.eval_every=0 does without.")
    assert _unvalidated(before) == []


def test_epochs_that_are_only_proportions_are_told(tmp_path: Path) -> None:
    only = "{path: %s/a.jsonl, epochs: 3.4}"
    said = small(tmp_path, "train.steps=2", "train.global_batch=8", sources=only)
    assert "the epochs are proportions: they ask for 1,822 sequences" in said
    assert "the run has 16." in said
    asked = int(said.partition("they ask for ")[2].split()[0].replace(",", ""))
    said = small(tmp_path, f"train.steps={round(asked / 8)}", "train.global_batch=8", sources=only)
    assert "proportions" not in said
    assert said.splitlines()[-1].split()[-1] == "3.40"


def test_text_and_vocabulary_are_told_together(tmp_path: Path) -> None:
    words = ["data=text", f"data.path={tmp_path}/gone", "model.vocab=100", "cluster=process"]
    config = build.settle(compose(words), name="run", cwd=tmp_path)
    with pytest.raises(ConfigError) as caught:
        prepare_data(config, build.build_request(config, words), Screen(io.StringIO()))
    assert "The run has 2 problems" in caught.value.what
    assert "model.vocab=100 is outside 257" in caught.value.what
    assert "there is no such file or folder" in caught.value.what


def test_a_part_of_a_dataset_and_an_end_are_asked_for_and_told(tmp_path: Path) -> None:
    for name, word in (("big/train", "big"), ("small/train", "small"), ("small/test", "test")):
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": f"{word} {n} and {n * n}"}) for n in range(300))
        (tmp_path / "hub" / f"{name}.jsonl").write_text("\n".join(lines))
    tokenizer(tmp_path / "tokenizer.json", 299)
    given = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    given.add_special_tokens(["<|stop|>"])
    given.save(str(tmp_path / "tokenizer.json"))
    words = (f"data.tokenizer={tmp_path}/tokenizer.json", "data.end_token='<|stop|>'")
    with pytest.raises(ConfigError, match="has 2 configurations"):
        small(tmp_path, *words, sources="{path: %s/hub, weight: 1}")
    request, said = small_request(tmp_path, *words, sources="{path: %s/hub, config: small, weight: 1}")
    assert "the split train of the configuration small is taken, test (1 file) left out" in said
    assert "data: <|stop|> ends a document: data.end_token names it" in said
    assert "hub-small" in said
    data = request.job.data
    assert (data.end_id, data.sources[0].documents) == (given.token_to_id("<|stop|>"), 300)
    other = replace(request, job=replace(request.job, data=replace(data, end_token="<|endoftext|>")))
    assert [(one.field, one.verdict) for one in compare(request, other, step=3)] == [("data.end_token", "safe")]
    request, said = small_request(tmp_path, sources="{path: %s/hub, config: small, split: test, weight: 1}")
    assert "the split test of the configuration small is taken" in said


@pytest.fixture
def ends_otherwise_now(tmp_path: Path) -> LaunchRequest:
    """A run whose documents end in a token, with files beside its tokenizer that name another one since."""
    tokenizer(tmp_path / "tokenizer.json", 298)
    given = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    given.add_special_tokens(["<|stop|>", "<|im_end|>"])
    given.save(str(tmp_path / "tokenizer.json"))
    before = small_request(tmp_path, f"data.tokenizer={tmp_path}/tokenizer.json", sources=ONE)[0]
    assert given.id_to_token(before.job.data.end_id) == "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return before


ONE = "{path: %s/a.jsonl, weight: 1}"


def resumed(before: LaunchRequest, folder: Path, *words: str) -> dict[str, tuple[str, str]]:
    """Verdict and reason of every field of the data that a resume with these words would change."""
    given = f"data.sources=[{ONE % folder}]"
    words = ("data=mixture", given, "model.vocab=300", "model.seq=16", "cluster=process", "data.workers=1", *words)
    words = (f"data.tokenizer={folder}/tokenizer.json", *words)
    config = build.settle(compose(words), name="run", cwd=folder)
    after = _with_data(config, before, build.build_request(config, words))
    return {
        one.field: (one.verdict, one.reason)
        for one in compare(before, after, step=3)
        if one.field.startswith("data.") or one.verdict == "refused"
    }


@pytest.mark.parametrize("gone", [False, True])
def test_documents_of_a_run_end_as_they_did(ends_otherwise_now: LaunchRequest, tmp_path: Path, gone: bool) -> None:
    """Whatever the files beside the tokenizer say since, where its tokens have to be made anew, too."""
    if gone:
        shutil.rmtree(Path(ends_otherwise_now.job.data.store).parent)
    assert resumed(ends_otherwise_now, tmp_path) == {}
    named = resumed(ends_otherwise_now, tmp_path, "data.end_token='<|endoftext|>'")
    assert {field: verdict for field, (verdict, _) in named.items()} == {"data.end_token": "safe"}
    if gone:
        shutil.rmtree(Path(ends_otherwise_now.job.data.store).parent)
        elsewhere = resumed(ends_otherwise_now, tmp_path, f"data.cache={tmp_path}/elsewhere")
        assert {field: verdict for field, (verdict, _) in elsewhere.items()} == dict.fromkeys(
            ("data.store", "data.sources"), "safe"
        )


@pytest.mark.parametrize("gone", [False, True])
def test_a_refusal_says_whether_end_tokenizer_or_text_is_another(
    ends_otherwise_now: LaunchRequest, tmp_path: Path, gone: bool
) -> None:
    if gone:
        shutil.rmtree(Path(ends_otherwise_now.job.data.store).parent)
    end = resumed(ends_otherwise_now, tmp_path, "data.end_token='<|stop|>'")
    refused = {reason for verdict, reason in end.values() if verdict == "refused"}
    assert refused == {"the documents of the run end in another token, which data.end_token can name"}
    with pytest.raises(ConfigError, match="no special token of"):
        resumed(ends_otherwise_now, tmp_path, "data.end_token='<|stp|>'")
    if gone:
        shutil.rmtree(tmp_path / ".data", ignore_errors=True)
        given = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        given.add_special_tokens(["<|more|>"])
        given.save(str(tmp_path / "tokenizer.json"))
        job = replace(ends_otherwise_now.job, model=replace(ends_otherwise_now.job.model, vocab=301))
        found = resumed(replace(ends_otherwise_now, job=job), tmp_path, "model.vocab=301")
        assert "the tokenizer's file has changed" in found["data.sources"][1]


def test_other_text_that_is_made_anew_is_told_as_such(ends_otherwise_now: LaunchRequest, tmp_path: Path) -> None:
    shutil.rmtree(Path(ends_otherwise_now.job.data.store).parent)
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text.replace("7", "8"))
    found = resumed(ends_otherwise_now, tmp_path)
    assert {field: verdict for field, (verdict, _) in found.items()} == dict.fromkeys(found, "refused")
    assert all("the text has changed" in reason for _, reason in found.values())
    assert found.keys() == {"data.digest", "data.sources"}


class Watched(Screen):
    """Remembers how far a phase was each time that the progress line was drawn: the bar, and the part in percent."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.bar = 20
        self.drawn: list[tuple[int, int]] = []

    def progress(self, text: str) -> None:
        """Of tokenizing alone."""
        if text.startswith("data: tokenizing ["):
            self.drawn.append((text.count("="), int(text.split()[-2])))


def test_the_bar_of_tokenizing_moves_from_nothing_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.data.sources.UNIT_BYTES", 2000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"a {n} and {n * n}"}) + "\n" for n in range(600)))
    words = ["data=mixture", f"data.sources=[{{path: {tmp_path}/a.jsonl, weight: 1}}]", "model.vocab=300"]
    words += ["model.seq=16", "cluster=process", "data.workers=1"]
    config = build.settle(compose(words), name="run", cwd=tmp_path)
    prepare_data(config, build.build_request(config, words), screen := Watched())
    percents = [percent for _, percent in screen.drawn]
    assert (percents[0], percents[-1]) == (0, 100)
    assert percents == sorted(percents)
    assert len({*percents}) > 8, "it moves with every shard that is made"
    assert all(abs(bar - percent / 5) <= 1 for bar, percent in screen.drawn)
    assert {bar for bar, _ in screen.drawn} >= {0, 20}
    assert len({bar for bar, _ in screen.drawn}) > 8


def test_a_small_mixture_is_prepared_and_told(tmp_path: Path) -> None:
    for name, number in (("a", 900), ("wiki", 90)):
        lines = (json.dumps({"text": f"{name} {n} and {n * n}"}) for n in range(number))
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, '{"text": ""}']))
    words = ["data=mixture", f"data.sources=[{{path: {tmp_path}/a.jsonl, weight: 3}}, "]
    words[1] += f"{{path: {tmp_path}/wiki.jsonl, epochs: 3.4}}]"
    words += ["model.vocab=300", "model.seq=16", "cluster=process", "data.workers=1"]
    config = build.settle(compose(words), name="run", cwd=tmp_path)
    request, shown = build.build_request(config, words), io.StringIO()
    made = prepare_data(config, request, Screen(shown))
    data = made.job.data
    assert unprepared(data) == unprepared(request.job.data)
    for words_told in ("data: reading", "data: tokenizing", "data: 2 sources", "2 empty documents left out"):
        assert words_told in shown.getvalue(), shown.getvalue()
    lines_of = mixture_text(data, 100 * 8, 16).splitlines()
    assert [line.split()[0] for line in lines_of[1:]] == ["SOURCE", "a", "wiki"]
    assert lines_of[-1].split()[-1] == "3.40"
    other = replace(made, job=replace(made.job, data=replace(data, packing=True)))
    assert [(one.field, one.verdict) for one in compare(made, other, step=3)] == [("data.packing", "refused")]

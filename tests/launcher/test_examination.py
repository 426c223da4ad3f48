"""Whatever is wrong with a run is told at once: values, weights, plan and data; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.cli import main
from tests.support import hf_models
from tests.support.folders import contents

SOURCES = "data.sources=[{path: good.jsonl, weight: 1}, {path: empty.jsonl, weight: 2}, {path: gone, weight: 1}]"
PLAN = ("model.moe.top_k=99", "strategy.ep=3", "model.seq=30", "strategy.sp=4")
SIZE = ("train.global_batch=16", "cluster=process")
RAMP = "train.ramp={start: 9, increment: 4, samples: 64}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "good.jsonl").write_text("".join(json.dumps({"text": f"{n} is a number"}) + "\n" for n in range(200)))
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    hf_models.tokenizer(tmp_path / "tokenizer.json", 300)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*words: str, verb: str = "submit") -> int:
    """Exit code of a command that writes nothing."""
    before = contents(Path())
    with pytest.raises(SystemExit) as ended:
        main([verb, *words])
    assert contents(Path()) == before
    return int(ended.value.code or 0)


def test_values_plan_and_data_come_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = folder / "hf"
    hf_models.make(hf, "llama")
    (hf / "model.safetensors").write_bytes(b"\0" * 9)
    data = ("data=mixture", SOURCES, "data.tokenizer=tokenizer.json", "model.vocab=257", "train.eval_every=2")
    code = refused("model=moe_tiny", f"train.init_from={hf}", *PLAN, RAMP, *data, *SIZE)
    said = capsys.readouterr().err
    assert code == 2
    for part in (
        "train.eval_every: there is nothing to validate with",
        "train.init_from: ",
        "it holds another model: flavour llama in the folder, gpt3 here",
        "model.safetensors cannot be used",
        "experts_consistent: the model has top_k 99 of 8 experts; nearest legal model.moe.top_k: 8",
        "experts_divisible_by_ep: experts 8 is not divisible by ep 3",
        "sequence_divisible: sequences of 30 tokens are not divisible by sp 4; nearest legal sp: 2",
        "ramp_whole: train.ramp.increment 4 does not lead from 9 to 16 in whole steps; nearest legal increment: 1 or 7",
        "empty: has weight 2, but no documents",
        "gone: there is no such file or folder",
        "data.tokenizer: ",
        "model.vocab=257 is too small for it. Set model.vocab to ",
    ):
        assert part in said, said
    assert said.startswith("error: The run has ")
    lines = [line for line in said.splitlines() if line.startswith("  - ")]
    assert len(lines) == len({*lines}) == int(said.split()[4])


def test_tensors_plan_and_data_come_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the weights lack tensors and have others, one file of theirs is gone, and the rest of the run is wrong."""
    from safetensors.torch import load_file, save_file

    hf = folder / "hf"
    hf_models.make(hf, "llama", shard="20KB", vocab_size=320)
    files = sorted(hf.glob("model-*.safetensors"))
    tensors = load_file(files[1])
    gone = sorted(tensors)[0]
    tensors["nobody.weight"] = tensors.pop(gone)
    save_file(tensors, files[1])
    files[-1].unlink()
    data = ("data=mixture", SOURCES, "data.tokenizer=tokenizer.json", "data.end_token='<|end|>'")
    code = refused("model.from_hf=hf", "train.init_from=hf", "strategy.tp=3", *data, "cluster=process")
    said = capsys.readouterr().err
    assert code == 2
    for part in (
        f"hf: 1 tensor is missing: {gone}",
        "hf: 1 tensor is not in the model: nobody.weight",
        f"hf: files of model.safetensors.index.json are missing: {files[-1].name}",
        "heads_divisible_by_tp",
        "empty: has weight 2, but no documents",
        "gone: there is no such file or folder",
        "data.end_token: '<|end|>' is no special token of",
        "Did you mean '<|endoftext|>'?",
    ):
        assert part in said, said


def test_a_plan_that_is_refused_brings_what_is_wrong_with_the_data(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("model=moe_tiny", "strategy.ep=3", "cluster=process")
    assert refused(*words, "data=mixture", SOURCES) == 2
    said = capsys.readouterr().err
    assert "experts_divisible_by_ep" in said
    assert "gone: there is no such file or folder" in said
    assert refused(*words, "data=text", "data.path=good.jsonl") == 3, "a plan alone is refused as such"
    assert "gone" not in capsys.readouterr().err


def test_planning_tells_values_and_rules_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("model=moe_tiny", "strategy.ep=3", "train.eval_every=1", "cluster=process", verb="plan") == 2
    said = capsys.readouterr().err
    assert "train.eval_every" in said
    assert "experts_divisible_by_ep" in said


def test_a_model_that_cannot_be_read_has_no_plan_to_judge(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "hf").mkdir()
    code = refused("model.from_hf=hf", "strategy.tp=3", "data=mixture", SOURCES, "cluster=process")
    said = capsys.readouterr().err
    assert code == 2
    assert "model.from_hf: hf: config.json is missing" in said
    assert "by_tp" not in said, "of the model that stands there by default nobody asked"
    assert "gone: there is no such file or folder" in said


def test_an_empty_source_is_told_beside_one_that_is_too_much_to_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (folder / "good.jsonl").stat().st_size
    monkeypatch.setattr("launcher.examination.MOST_BYTES", size - 1)
    (folder / "good.jsonl").write_bytes((folder / "good.jsonl").read_bytes()[:-2] + b"\n")  # its last record is broken
    words = ("model=moe_tiny", "strategy.ep=3", "cluster=process", "data=mixture", SOURCES)
    assert refused(*words) == 2
    said = capsys.readouterr().err
    assert "experts_divisible_by_ep" in said
    assert "empty: has weight 2, but no documents" in said
    assert "gone: there is no such file or folder" in said
    assert "good: 1 record" not in said, "so much is not read to tell what else is wrong"
    monkeypatch.setattr("launcher.examination.MOST_BYTES", 2 * size)
    assert refused(*words) == 2
    assert "good: 1 record cannot be used" in capsys.readouterr().err


def test_data_that_are_refused_leave_no_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("model=moe_tiny", "data=mixture", SOURCES, "cluster=process", "strategy.dp=1") == 2
    assert "The data have 2 problems" in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_a_plan_says_which_data_are_not_here(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They may be where the run is submitted, so that the plan can run all the same."""
    words = ("data=mixture", SOURCES, "data.tokenizer=nowhere.json", "cluster=process")
    assert refused(*words, verb="plan") == 0
    said = capsys.readouterr().out
    assert "Its data are not on this machine: gone, nowhere.json. Where they are, phalanx submit" in said
    assert refused("cluster=process", verb="plan") == 0
    assert "This plan can run. phalanx submit with the same overrides starts it." in capsys.readouterr().out


def test_a_vocabulary_that_no_tokenizer_has_comes_with_the_rest(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused("model.vocab=100", "data=mixture", SOURCES, "cluster=process", "strategy.dp=1") == 2
    said = capsys.readouterr().err
    assert "The data have 3 problems" in said
    assert "model.vocab=100 is outside 257" in said
    words = ("model.vocab=100", "data=text", "data.path=gone", "train.eval_every=1", "cluster=process")
    assert refused(*words) == 2
    said = capsys.readouterr().err
    assert "The run has 3 problems" in said
    assert "model.vocab=100 is outside 257" in said


def test_an_evaluation_is_told_everything_before_its_weights_are_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_models.make(folder / "hf", "llama")
    (folder / "bad.jsonl").write_text('{"question": "one?", "choices": ["a"], "answer": 0}\n{}\n')

    def read(path: Path) -> str:
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr("jobs.hf.folder.file_digest", read)
    files = ("job.text=gone.txt", "job.choices=bad.jsonl", "job.tokenizer=tokenizer.json")
    parts = [
        "job.tokenizer: The tokenizer",
        "needs a vocabulary of 2",
        "the model has only 97",
        "job.text: Cannot read",
        "job.choices: ",
        "      - line 2: 'question' is missing",
    ]
    for words, more in (
        ((), "What is asked has 3 problems"),
        (("strategy.tp=3",), "heads_divisible_by_tp"),
        (("strategy.cp=2", "strategy.tp=3"), "strategy.cp: "),
    ):
        assert refused("job=evaluate", "job.weights=hf", *files, "cluster=process", *words) == 2
        said = capsys.readouterr().err
        assert all(part in said for part in [*parts, more]), said
    assert refused("job=generate", "job.weights=hf", "job.prompts=gone.txt", "cluster=process", "strategy.cp=2") == 2
    said = capsys.readouterr().err
    assert all(part in said for part in ("strategy.cp", "job.prompts: Cannot read", "There is no tokenizer beside"))
    assert refused("job=evaluate", "job.weights=gone", *files, "cluster=process") == 2
    said = capsys.readouterr().err
    assert all(part in said for part in ("There are no weights", "job.text: Cannot read", "job.choices: ")), said

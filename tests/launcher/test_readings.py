"""A mistake of one kind hides none of another: each that can be judged on its own is told with the rest."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.examination import of_plan
from launcher.findings import Findings, common
from launcher.readings import Values, readings
from launcher.typed import Bounds, decode
from strategies.codec import to_json
from strategies.errors import ClusterError, ConfigError, PlanInfeasible, StorageError, Violation
from tests.support import hf_models
from tests.support.folders import contents

# What is typed, and what has to be said about it. No two of the second kind need each other's words.
WORDS = {
    "unknown key": ("strategy.microbatch=2", "unknown key 'microbatch' in 'strategy'"),
    "no override": ("bogus", "'bogus' is not an override"),
    "unknown choice": ("tracking=nope", "there is no tracking 'nope'"),
    "wrong type": ("train.lr=abc", "train.lr: expected a number"),
    "out of range": ("train.steps=0", "train.steps: expected at least 1"),
    "out of range above": ("data.validation=3", "data.validation: expected at most 0.5"),
    "no option": ("train.precision=fp12", "train.precision: not a known value"),
    "contradiction": ("run.name=latest", "run.name: 'latest' stands for"),
    "no such store": ("checkpoint.url=bogus://x", "checkpoint.url: Checkpoints cannot be kept at bogus://"),
    "no weights": ("train.init_from=nowhere", "train.init_from: There are no weights"),
}
ELSEWHERE = {
    "plan": ("strategy.tp=3", "heads_divisible_by_tp: heads 4 is not divisible by tp 3"),
    "ramp": ("train.ramp={start: 9, increment: 4, samples: 64}", "ramp_whole: "),
    "fault": ("faults=[bogus@rank=1]", "bogus@rank=1"),
    "skip": ("train.skips=[{step: 0, samples: 1}]", "A skip needs a step of 1 or more"),
    "place": ("run.dir=afile/runs", "Run directories cannot be made in"),
    "source": ("data.sources=[{path: good.jsonl, weight: 1}, {path: gone, weight: 1}]", "gone: there is no such file"),
    "tokenizer": ("data.tokenizer=tokenizer.json", "model.vocab=257 is too small for it"),
    "cluster": ("cluster.address=127.0.0.1:1", "No Ray cluster can be reached at 127.0.0.1:1"),
}
ALWAYS = ("cluster=existing", "data=mixture", "model.vocab=257", "train.global_batch=16")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "good.jsonl").write_text("".join(json.dumps({"text": f"{n} is a number"}) + "\n" for n in range(200)))
    (tmp_path / "afile").write_text("no folder")
    hf_models.tokenizer(tmp_path / "tokenizer.json", 300)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str, verb: str = "submit") -> str:
    """What is said by a command that writes nothing and has no internal error."""
    before = contents(Path())
    with pytest.raises(SystemExit) as ended:
        main([verb, *words])
    assert contents(Path()) == before
    assert ended.value.code not in (0, 1)
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", WORDS)
def test_a_word_or_a_value_hides_nothing(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    word, part = WORDS[kind]
    said = refused(capsys, *ALWAYS, word, *(other for other, _ in ELSEWHERE.values()))
    missing = [one for one in (part, *(there for _, there in ELSEWHERE.values())) if one not in said]
    assert not missing, said


def test_words_and_values_are_told_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *ALWAYS, *(word for word, _ in WORDS.values()))
    assert not [part for _, part in WORDS.values() if part not in said], said


@pytest.mark.full
@pytest.mark.parametrize("pair", list(itertools.combinations({**WORDS, **ELSEWHERE}.values(), 2)), ids=str)
def test_every_pair(
    folder: Path, capsys: pytest.CaptureFixture[str], pair: tuple[tuple[str, str], tuple[str, str]]
) -> None:
    words = [*ALWAYS[1:], *(word for word, _ in pair)]
    sourced = "data.sources=[{path: good.jsonl, weight: 1}]"
    words += [] if any(word.startswith("data.sources") for word in words) else [sourced]
    words.append("cluster=existing" if any(word.startswith("cluster.") for word in words) else "cluster=process")
    said = refused(capsys, *words)
    assert not [part for _, part in pair if part not in said], said


def test_a_plan_is_judged_beside_what_is_asked_of_its_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [ELSEWHERE[kind] for kind in ("plan", "fault", "skip")]
    said = refused(capsys, "cluster=process", *(word for word, _ in words), verb="plan")
    assert not [part for _, part in words if part not in said], said


def test_what_depends_on_a_mistake_is_not_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight heads, or three: what tp=3 would do to them cannot be said before they are known."""
    said = refused(capsys, "cluster=process", "model.heads=x", "strategy.tp=3", "strategy.pp=99")
    assert "model.heads: expected a whole number" in said
    assert "by_tp" not in said
    assert "pipeline" in said or "stage" in said, "the blocks do not go by the heads"
    said = refused(capsys, "cluster=process", "model=llama3_8c", "strategy.tp=3")
    assert "Did you mean 'llama3_8b'?" in said
    assert "by_tp" not in said


def test_a_sequence_that_needs_tensor_parallelism_waits_for_its_degree(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "cluster=process", "strategy.tq=2", "strategy.sequence_parallel=true", "train.steps=0")
    assert "unknown key 'tq' in 'strategy'. Did you mean 'tp'?" in said
    assert said.count("  - ") == 2, said


def test_a_drill_tells_plan_names_and_place_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "strategy.tp=3", "--faults", "node_kil", "run.dir=afile/runs", verb="drill")
    for part in ("heads_divisible_by_tp", "Unknown faults: node_kil", "Run directories cannot be made in"):
        assert part in said


def test_errors_as_a_document_list_their_problems(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["submit", "--json", "cluster=process", "train.steps=0", "strategy.tp=3", "bogus"])
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["exit_code"] == 2
    keys = [one.partition(":")[0] for one in document["error"]["problems"]]
    assert keys[:3] == ["bogus", "train.steps", "heads_divisible_by_tp"]


def test_values_stand_in_for_those_that_mean_nothing() -> None:
    from launcher.config import compose

    before = to_json(compose(["cluster=process"]))
    plain = to_json(compose(["cluster=process"]))
    plain["strategy"] |= {"zero_stage": 9, "tq": 2}
    plain["train"]["steps"] = 0
    plain["model"]["flavour"] = "gtp"
    found = readings(Values(plain=plain, before=before))
    assert [one.train.steps for one in found] == [compose([]).train.steps, 1, 2]
    assert [one.strategy.zero_stage for one in found] == [None, 3, 1]
    assert found[0].model.flavour == compose([]).model.flavour
    assert {one.model.flavour for one in found} == {"gpt3", "llama"}
    assert readings(Values(plain=plain, before=plain)), "where the files themselves are wrong the nearest stand in"


def test_the_nearest_legal_values_of_a_number() -> None:
    from launcher.schema import Config

    plain = to_json(_sound())
    plain["recovery"]["detect_s"] = 0.0
    plain["data"]["validation"] = 0.9
    _, wrong = decode(Config, plain, Bounds(least={"recovery.detect_s": 0.1}, most={"data.validation": 0.5}, hints={}))
    assert {one.key: one.instead for one in wrong} == {
        "recovery.detect_s": (0.1, 0.2),
        "data.validation": (0.5, 0.25),
    }


def _sound() -> object:
    from launcher.config import compose

    return compose(["cluster=process"])


def test_a_cluster_of_unknown_size_still_has_rules() -> None:
    from launcher.config import compose

    config = compose(["cluster=existing", "cluster.address=h:1", "strategy.tp=3"])
    rules = {line.partition(":")[0] for line in of_plan(config)}
    assert "heads_divisible_by_tp" in rules
    assert "world_size_fits_cluster" not in rules
    assert of_plan(compose(["cluster=existing", "cluster.address=h:1", "strategy.tp=4"])) == []


def test_findings_keep_a_single_error_as_it_is() -> None:
    found = Findings()
    assert found.of(lambda: 3) == 3
    found.refuse()
    found.add(ClusterError("no answer", why="it is down"))
    with pytest.raises(ClusterError, match="no answer"):
        found.refuse()
    found.add(ClusterError("no answer", why="it is down"))
    found.add(StorageError("full"))
    with pytest.raises(ConfigError) as told:
        found.refuse()
    assert told.value.problems == ("no answer (it is down)", "full")


def test_findings_of_one_kind_stay_of_it() -> None:
    found = Findings()
    found.add(StorageError("full"))
    found.add(StorageError("gone"))
    with pytest.raises(StorageError, match="The run has 2 problems"):
        found.refuse()
    broken = Findings()
    rules = [Violation(rule=name, message="m", hint="h") for name in ("a", "b")]
    broken.add(PlanInfeasible(rules))
    assert broken.error().exit_code == 3
    assert broken.lines == ["a: m; h", "b: m; h"]


def test_common_asks_further_readings_only_while_something_is_left() -> None:
    asked: list[int] = []

    def judge(number: int) -> list[str]:
        asked.append(number)
        return ["always", "odd"] if number % 2 else ["always"]

    assert common([1, 2, 3], judge) == ["always"]
    assert asked == [1, 2, 3]
    asked.clear()
    assert common([2, 1, 3], lambda number: judge(number)[1:]) == []
    assert asked == [2]
    assert common([], judge) == []

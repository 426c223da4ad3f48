"""The README is true: its commands run, its tree exists, its exit codes are the code's."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.build import model_spec
from launcher.config import compose
from launcher.drill.catalogue import CATALOGUE
from launcher.drill.programme import choose
from launcher.drill.toy import shrink
from launcher.run import EventKind
from launcher.store import RunStore
from strategies import errors
from tests.support import cli, hf_models
from tests.support.checkpoints import write_model_checkpoint
from tests.support.fakes import tiny_request
from tests.support.jobspecs import GPT

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
COMMANDS = [shlex.split(line, comments=True) for line in LINES]
ILLEGAL = "model=gpt_tiny strategy.tp=3"


def verbs(*names: str) -> list[list[str]]:
    return [words for words in COMMANDS if words[0] == "phalanx" and words[1] in names]


def title(words: list[str]) -> str:
    return " ".join(words[1:])


def test_every_command_is_tried_here() -> None:
    known = {"plan", "submit", "status", "logs", "cancel", "resume", "cluster", "checkpoint", "drill"}
    assert {words[1] for words in COMMANDS if words[0] == "phalanx"} == known
    assert {words[0] for words in COMMANDS} == {"phalanx", "make"}


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "make"], ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("words", verbs("plan"), ids=title)
def test_plan(words: list[str], tmp_path: Path) -> None:
    words = [str(ROOT / word) if word.endswith(".csv") else word for word in words[1:]]
    done = cli.phalanx(*words, cwd=tmp_path)
    assert done.code == (3 if ILLEGAL in " ".join(words) else 0), done.err
    assert done.out


def test_the_library_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 20
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "days" in done.stdout


@pytest.mark.parametrize("words", verbs("submit"), ids=title)
def test_submit_as_a_dry_run(words: list[str], tmp_path: Path) -> None:
    """The main job runs for real elsewhere; the address of the example is nobody's."""
    (tmp_path / "train.py").write_text("print('hello')\n")
    words = [re.sub("^run.dir=/shared", f"run.dir={tmp_path}", word) for word in words[1:]]
    if any("=my-model" in word for word in words):
        hf_models.make(tmp_path / "my-model", "llama", vocab_size=300)
        hf_models.tokenizer(tmp_path / "my-model" / "tokenizer.json", 300)
        question = json.dumps({"question": "1 + 1?", "choices": ["1", "2"], "answer": 1})
        (tmp_path / "questions.jsonl").write_text(f"{question}\n" * 6)
    if "train.init_from=runs/short" in words:
        request, store = tiny_request(tmp_path / "runs", name="short"), tmp_path / "runs" / ".data" / "first"
        store.mkdir(parents=True)
        hf_models.tokenizer(store / "tokenizer.json", 300)
        data = dataclasses.replace(request.job.data, store=str(store))
        run = RunStore.create(dataclasses.replace(request, job=dataclasses.replace(request.job, data=data)))
        model = model_spec(compose(["model=llama_tiny", "model.vocab=300", "model.seq=256"]))
        write_model_checkpoint(run.paths.checkpoint_dir, model)
    if "cluster=existing" in words:
        pytest.skip("needs the cluster that it names; tests/e2e/test_existing_cluster.py has one")
    if "data=mixture" in words:
        for name, count in (("crawl", 3000), ("wiki", 300)):
            lines = (f'{{"text": "{number} is a number", "body": "{number}"}}\n' for number in range(count))
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        words = [word.replace("crawl,", "crawl.jsonl,").replace("wiki,", "wiki.jsonl,") for word in words]
        words = [word.replace("books.parquet,", "crawl.jsonl, name: books,") for word in words] + ["model.seq=16"]
    else:
        words += ["data=text", cli.corpus(tmp_path)]
    done = cli.phalanx(*words, "--dry-run", "model.vocab=300", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.document["request"]["run_name"]


@pytest.mark.parametrize("words", verbs("status", "logs", "resume", "cancel"), ids=title)
def test_looking_at_a_run(words: list[str], tmp_path: Path) -> None:
    request = tiny_request(tmp_path / "runs", name="gpt_tiny-1")
    run = RunStore.create(request)
    run.append(
        EventKind.ATTEMPT_PLANNED,
        epoch=1,
        attempt=1,
        plan=request.job.plan,
        nodes=["a"],
        resume_from="",
        first_step=1,
        reason="start",
    )
    run.append(EventKind.RUN_FAILED, epoch=1, attempt=1, reason="an example")
    run.paths.attempt(1).mkdir(parents=True)
    run.paths.rank_log(1, 0).write_text("hello from rank 0\n")
    if words[1] == "resume":
        pytest.skip("resumed for real in tests/e2e/test_recovery.py")
    done = cli.phalanx(*words[1:], cwd=tmp_path)
    ended_already = words[1] == "cancel"
    assert done.code == (2 if ended_already else 0), done.err
    assert done.out or done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("words", verbs("checkpoint"), ids=title)
def test_checkpoint(words: list[str], tmp_path: Path) -> None:
    run = RunStore.create(tiny_request(tmp_path / "runs", name="gpt_tiny-1"))
    write_model_checkpoint(run.paths.checkpoint_dir, GPT, step=3)
    done = cli.phalanx(*words[1:], cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out or words[words.index("--to") + 1] in done.err


@pytest.mark.parametrize("words", verbs("cluster"), ids=title)
def test_cluster(words: list[str], tmp_path: Path) -> None:
    done = cli.phalanx(*words[1:], cwd=tmp_path)
    assert done.code == 0, done.err
    assert list(tmp_path.rglob("conf/cluster/*.yaml"))


@pytest.mark.parametrize("words", verbs("drill"), ids=title)
def test_drill(words: list[str], tmp_path: Path) -> None:
    """Rehearsed for real in tests/e2e/test_drill.py; here it is planned."""
    if "list" in words:
        done = cli.phalanx(*words[1:], cwd=tmp_path)
        assert done.code == 0, done.err
        assert len(done.out.splitlines()) > len(CATALOGUE)
        return
    toy = shrink(compose([word for word in words[2:] if "=" in word]))
    faults = words[words.index("--faults") + 1] if "--faults" in words else "all"
    assert choose(faults, toy, seed=7, count=20)


def test_exit_codes() -> None:
    section = README.split("## Exit codes")[1].split("##")[0]
    stated = {int(number) for number in re.findall(r"\b(\d+)\b", section)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert stated == {0} | {kind.exit_code for kind in kinds if issubclass(kind, errors.PhalanxError)}


def test_tree() -> None:
    section = README.split("## The tree")[1].split("```")[1]
    folder, named = ROOT, 0
    for line in section.strip().splitlines():
        words = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        for word in words.split():
            path = ROOT / word if not line.startswith(" ") else folder / word
            assert path.exists(), f"{word} of the README's tree does not exist"
            named += 1
            folder = path if not line.startswith(" ") else folder
    assert named > 30


def test_help_of_every_verb_has_an_example(tmp_path: Path) -> None:
    for verb in ("plan", "submit", "resume", "status", "logs", "cancel", "checkpoint"):
        done = cli.phalanx(verb, "--help", cwd=tmp_path)
        assert done.code == 0
        assert f"phalanx {verb}" in done.out.split("Example")[1]

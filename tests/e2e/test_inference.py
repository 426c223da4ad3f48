"""Evaluation and generation as gangs of real workers: under TP x PP x DP what one rank finds, also after a fault."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.data.tokenizer import END_OF_TEXT_ID
from jobs.hf.folder import model_of
from jobs.inference.results import summary
from jobs.inference.rows import Row, prepare, read_rows
from jobs.paths import RunPaths
from jobs.spec import CheckpointSpec, InferenceSpec, JobSpec, TrainSpec
from jobs.weights import digested, find
from strategies.codec import to_json
from tests.support import hf_models
from tests.support.checkpoints import write_model_checkpoint
from tests.support.gang import GangFailed, WarmPool
from tests.support.jobspecs import make_job, make_plan

BATCH = 3
PLANS: dict[str, dict[str, Any]] = {"tp2-pp2": {"tp": 2, "pp": 2}, "dp2": {"dp": 2}, "pp3": {"pp": 3}, "tp4": {"tp": 4}}
full = pytest.mark.full
SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer, texts, questions and prompts beside it."""
    return _folder(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a random Mixtral."""
    return _folder(tmp_path_factory.mktemp("experts"), "mixtral")


def _folder(root: Path, kind: str) -> Path:
    hf_models.make(root / "hf", kind, vocab_size=301, num_key_value_heads=4)
    hf_models.tokenizer(root / "hf" / "tokenizer.json", 300)
    (root / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"x = {i} + {i * i}\n" * i}) + "\n" for i in range(1, 7))
    )
    asked = [{"question": f"{i} + 1?", "choices": [str(i), str(i + 1), "neither"], "answer": 1} for i in range(6)]
    (root / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    (root / "prompts.txt").write_text("x = 1\ndef f(x):\nreturn\nx = 22 + 3\n")
    return root


def job_of(root: Path, kind: Any, degrees: dict[str, Any], **asked: Any) -> JobSpec:
    """A job as the launcher makes it."""
    return job_with(root / "hf", root, kind, degrees, **asked)


def job_with(source: Path, root: Path, kind: Any, degrees: dict[str, Any], **asked: Any) -> JobSpec:
    """The same with the weights of another source."""
    model = model_of(root / "hf")
    job = make_job(model, make_plan(model, BATCH, micro_batch=2, **degrees), global_batch=BATCH)
    weights = digested(find(str(source)), model)
    files = {"text": "text.jsonl", "choices": "questions.jsonl"} if kind == "evaluate" else {"prompts": "prompts.txt"}
    spec = InferenceSpec(**{key: str(root / name) for key, name in files.items()} | asked)
    spec = prepare(spec, weights, model, root / "cache", stop=kind == "generate")
    train = TrainSpec(steps=math.ceil(spec.count / BATCH), seed=4)
    every = CheckpointSpec(every=1)
    return replace(job, kind=kind, initial=weights, inference=spec, train=train, checkpoint=every, deepspeed={})


def run(pool: WarmPool, job: JobSpec, root: Path, attempt: int = 1, resume_from: str = "") -> dict[str, Any]:
    """One attempt; what it has found."""
    paths = RunPaths(root)
    paths.attempt(attempt).mkdir(parents=True)
    paths.job(attempt).write_text(json.dumps(to_json(job)))
    arguments = {"attempt": attempt, "resume_from": resume_from}
    body = "tests.support.worker_ranks:work"
    pool.run(body, world_size=job.plan.world_size, arguments=arguments, run_dir=str(root), timeout_s=90)
    return dict(json.loads(paths.results.read_text()))


def test_four_ranks_find_what_one_finds_and_goes_on_after_a_fault(pool: WarmPool, folder: Path, tmp_path: Path) -> None:
    asked = {"shots": 2}
    one = run(pool, job_of(folder, "evaluate", {}, **asked), tmp_path / "one")
    job = job_of(folder, "evaluate", {"tp": 2, "pp": 2}, **asked)
    with pytest.raises(GangFailed):
        run(pool, replace(job, faults=("rank_kill@rank=3,step=4",)), tmp_path / "four")
    paths = RunPaths(tmp_path / "four")
    done = sorted(int(path.parent.name) for path in paths.checkpoint_dir.glob("*/COMMIT"))
    assert done == [1, 2, 3]
    four = run(pool, job, tmp_path / "four", attempt=2, resume_from=str(paths.checkpoint_dir / "3"))
    assert four["text"]["loss"] == pytest.approx(one["text"]["loss"], rel=1e-6)
    assert four["choices"] == one["choices"]
    assert one["choices"]["questions"] == 4
    told = [json.loads(line) for line in (paths.attempt(2) / "reports-0.jsonl").read_text().splitlines()]
    started, built, restored = told[:3]
    assert [report["kind"] for report in told[:3]] == ["started", "built", "restored"]
    parts = [built[name] for name in ("device_s", "communicators_s", "engine_s")]
    assert all(seconds > 0 for seconds in (*parts, restored["seconds"]))
    assert sum(parts) <= built["time"] - started["time"]
    assert restored["seconds"] <= restored["time"] - built["time"] + 1e-3, "nothing is counted twice"
    steps = [json.loads(line)["step"] for line in paths.metrics.read_text().splitlines()]
    assert steps == list(range(1, job.train.steps + 1))  # none twice
    assert one["text"] == pytest.approx(one["text"] | _by_transformers(folder, job))
    rows, losses = _scores_by_transformers(folder, job)
    assert one["choices"] == summary(rows, losses)["choices"], "a choice is judged by its own tokens alone"


def test_replicas_that_share_experts_find_what_one_rank_finds(pool: WarmPool, experts: Path, tmp_path: Path) -> None:
    """Also where one of them has no rows left."""
    lines = (json.dumps({"text": f"x = {i} + 1\n" * i}) for i in range(1, 5))
    (tmp_path / "four.jsonl").write_text("\n".join(lines))
    asked = {"text": str(tmp_path / "four.jsonl")}
    one = run(pool, job_of(experts, "evaluate", {}, **asked), tmp_path / "one")
    job = job_of(experts, "evaluate", {"dp": 2, "ep": 2}, **asked)
    assert job.inference is not None
    assert job.inference.count % BATCH == 1, "the last batch has rows for one of the two only"
    two = run(pool, job, tmp_path / "two")
    assert two["text"]["loss"] == pytest.approx(one["text"]["loss"], rel=1e-6)
    assert two["choices"] == one["choices"]


def _by_transformers(folder: Path, job: JobSpec) -> dict[str, float]:
    """Loss and perplexity of the texts as transformers' own model has them."""
    model = hf_models.load(folder / "hf")
    assert job.inference is not None
    total, count = 0.0, 0
    for row in (row for row in read_rows(job.inference) if row.choice < 0):
        line = torch.tensor([row.tokens])
        logits = hf_models.logits(model, line[:, :-1])
        total += float(torch.nn.functional.cross_entropy(logits[0], line[0, 1:], reduction="sum"))
        count += line.shape[1] - 1
    return {"loss": total / count, "perplexity": math.exp(total / count), "tokens": count}


def _scores_by_transformers(folder: Path, job: JobSpec) -> tuple[list[Row], dict[int, float]]:
    """The rows, and the loss of what counts in each: of a choice, its tokens after the examples and the question."""
    model = hf_models.load(folder / "hf")
    assert job.inference is not None
    rows, losses = list(read_rows(job.inference)), dict[int, float]()
    assert all(row.begin > 1 for row in rows if row.choice >= 0)
    for number, row in enumerate(rows):
        line = torch.tensor([row.tokens])
        told = hf_models.logits(model, line)[0, row.begin - 1 : -1].log_softmax(-1)
        losses[number] = -float(told.gather(1, line[0, row.begin :, None]).sum())
    return rows, losses


@pytest.mark.parametrize("plan", [plan if plan == "tp2-pp2" else pytest.param(plan, marks=full) for plan in PLANS])
@pytest.mark.parametrize("how", [pytest.param({}, id="greedy", marks=full), pytest.param(SAMPLED, id="sampled")])
def test_the_same_text_under_any_plan(
    pool: WarmPool, folder: Path, tmp_path: Path, plan: str, how: dict[str, Any]
) -> None:
    one = run(pool, job_of(folder, "generate", {}, tokens=20, **how), tmp_path / "one")
    other = run(pool, job_of(folder, "generate", PLANS[plan], tokens=20, **how), tmp_path / "other")
    texts = [[text["prompt"], text["tokens"]] for text in one["texts"]]
    assert len(texts) == 4
    assert [[text["prompt"], text["tokens"]] for text in other["texts"]] == texts
    assert max(len(tokens) for _, tokens in texts) == 20


def test_the_same_text_from_a_checkpoint_of_ours(pool: WarmPool, folder: Path, tmp_path: Path) -> None:
    """Greedy, from slices that no plan of these wrote."""
    samples = {"packing": False, "end_id": END_OF_TEXT_ID}
    manifest = write_model_checkpoint(tmp_path / "checkpoints", model_of(folder / "hf"), samples=samples)
    asked: dict[str, Any] = {"tokenizer": str(folder / "hf" / "tokenizer.json"), "tokens": 12}
    one, other = (
        run(pool, job_with(manifest, folder, "generate", degrees, **asked), tmp_path / str(len(degrees)))
        for degrees in ({}, PLANS["tp2-pp2"])
    )
    texts = [text["tokens"] for text in one["texts"]]
    assert [text["tokens"] for text in other["texts"]] == texts
    assert max(map(len, texts)) == 12
    assert len({*map(tuple, texts)}) > 1, "what is added depends on the prompt"


@pytest.mark.full
def test_the_same_text_with_experts_spread(pool: WarmPool, experts: Path, tmp_path: Path) -> None:
    one, other = (
        run(pool, job_of(experts, "generate", degrees, tokens=20, **SAMPLED), tmp_path / str(len(degrees)))
        for degrees in ({}, {"dp": 2, "ep": 2, "tp": 2})
    )
    assert [text["tokens"] for text in other["texts"]] == [text["tokens"] for text in one["texts"]]


@pytest.mark.full
@pytest.mark.parametrize("plan", sorted(PLANS))
def test_the_same_figures_under_any_plan(pool: WarmPool, folder: Path, tmp_path: Path, plan: str) -> None:
    one = run(pool, job_of(folder, "evaluate", {}), tmp_path / "one")
    other = run(pool, job_of(folder, "evaluate", PLANS[plan]), tmp_path / "other")
    assert other["text"] == pytest.approx(one["text"], rel=1e-6)
    assert other["choices"] == one["choices"]

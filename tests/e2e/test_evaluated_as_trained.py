"""What job=evaluate finds on the text that a run was validated with is what the run itself has found.

The validation's samples are windows of all its documents, one behind the other, each with the end token behind it. No
text spells that token, so what the tokenizer makes of the text is given here: the tokens of the very same windows.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.checkpoint import newest
from jobs.data import prepare_mixture
from jobs.data.shards import VALID, Tokens, read_source
from jobs.data.store import TOKENIZER
from jobs.data.tokenizer import END_OF_TEXT_ID, read_tokenizer
from jobs.inference.rows import Encoder, prepare, read_rows
from jobs.paths import RunPaths
from jobs.spec import DataSpec, InferenceSpec, JobSpec, SourceSpec, TrainSpec
from jobs.weights import digested, find
from strategies.codec import to_json
from strategies.specs import ModelSpec, MoeSpec
from tests.support.gang import WarmPool
from tests.support.jobspecs import GPT, LLAMA, make_job, make_plan

pytestmark = pytest.mark.timeout(300)
SEQ, BATCH, STEPS = 24, 4, 8
SIZES: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 4, "vocab": 300, "seq": SEQ}
MODELS: dict[str, ModelSpec] = {
    "gpt": dataclasses.replace(GPT, ffn=64, **SIZES),
    "llama": dataclasses.replace(LLAMA, ffn=64, **SIZES),
    "tight": dataclasses.replace(
        GPT, ffn=64, init_std=0.1, moe=MoeSpec(experts=4, top_k=2, ffn=32, capacity_factor=0.5), **SIZES
    ),
}
PP2: dict[str, Any] = {"pp": 2, "zero_stage": 1}


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


def samples(folder: Path, *, packing: bool) -> DataSpec:
    """Short documents."""
    lines = (json.dumps({"text": f"{i}: {i * i} is the square of {i}"}) for i in range(400))
    (folder / "squares.jsonl").write_text("\n".join(lines))
    sources = (SourceSpec(path=str(folder / "squares.jsonl"), weight=1),)
    data = DataSpec(kind="mixture", sources=sources, validation=0.2, packing=packing)
    return prepare_mixture(data, folder / "stores", SIZES["vocab"], seq=SEQ, samples=BATCH * STEPS)


def validated_with(data: DataSpec) -> list[tuple[int, ...]]:
    """All samples of the validation, in the order of their documents."""
    folder = Path(data.sources[0].store)
    tokens = Tokens(folder, read_source(folder), VALID)
    windows = range(0, tokens.count - SEQ, SEQ)
    return [tuple(int(token) for token in tokens.slice(first, first + SEQ + 1)) for first in windows]


def run(pool: WarmPool, job: JobSpec, root: Path) -> RunPaths:
    paths = RunPaths(root)
    paths.attempt(1).mkdir(parents=True)
    paths.job(1).write_text(json.dumps(to_json(job)))
    body = "tests.support.worker_ranks:work"
    pool.run(body, world_size=job.plan.world_size, arguments={"attempt": 1}, run_dir=str(root), timeout_s=120)
    return paths


def evaluation(job: JobSpec, manifest: str, windows: list[tuple[int, ...]], root: Path) -> JobSpec:
    """The job that evaluates a bare manifest on the text of the validation, as the launcher makes it."""
    tokenizer = Path(job.data.store) / TOKENIZER
    stream = [token for window in windows for token in window[:-1]] + [windows[-1][-1]]
    assert stream.count(END_OF_TEXT_ID) > 20, "documents end in it"
    text = read_tokenizer(tokenizer).decode(stream)
    (root / "text.txt").write_text(text)
    weights = digested(find(manifest), job.model)
    asked = InferenceSpec(text=str(root / "text.txt"), tokenizer=str(tokenizer))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "document", lambda self, text: (stream, len(text.encode())))
        spec = prepare(asked, weights, job.model, root / "cache", stop=False)
    assert [row.tokens for row in read_rows(spec)] == windows
    train = TrainSpec(steps=math.ceil(spec.count / BATCH))
    return replace(job, kind="evaluate", initial=weights, inference=spec, train=train, deepspeed={})


full = pytest.mark.full


@pytest.mark.parametrize(
    ("name", "packing", "trained", "evaluated"),
    [
        ("gpt", True, {}, PP2),
        pytest.param("gpt", False, PP2, {}, marks=full),
        pytest.param("llama", True, PP2, {"tp": 2, "pp": 2}, marks=full),
        pytest.param("llama", False, {"tp": 2}, {"dp": 2}, marks=full),
        pytest.param("tight", True, {"dp": 2, "ep": 2, "zero_stage": 1}, {"tp": 2}, marks=full),
    ],
)
def test_the_run_and_its_evaluation_agree(
    pool: WarmPool, tmp_path: Path, name: str, packing: bool, trained: dict[str, Any], evaluated: dict[str, Any]
) -> None:
    model, data = MODELS[name], samples(tmp_path, packing=packing)
    plan = make_plan(model, BATCH, micro_batch=2, **trained)
    recipe: dict[str, Any] = {"steps": STEPS, "eval_every": STEPS, "eval_batches": 1000, "lr": 1e-2, "clip": 0.0}
    job = replace(make_job(model, plan, global_batch=BATCH, **recipe), data=data)
    paths, windows = run(pool, job, tmp_path / "run"), validated_with(data)
    found = json.loads(paths.metrics.read_text().splitlines()[-1])["eval"]
    assert found["samples"] == len(windows) > 20
    manifest = newest(paths.checkpoint_dir)
    assert not paths.request.exists(), "the manifest is all there is"
    job = replace(job, plan=make_plan(model, BATCH, micro_batch=2, **evaluated))
    asked = evaluation(job, str(manifest), windows, tmp_path)
    told = results(run(pool, asked, tmp_path / "evaluated"))
    assert told["tokens"] == len(windows) * SEQ
    assert told["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert told["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
    if packing and name == "gpt":
        assert asked.inference is not None
        blind = replace(asked, inference=replace(asked.inference, packing=False))
        other = results(run(pool, blind, tmp_path / "blind"))["loss"]
        assert abs(other / found["loss"] - 1) > 1e-4, "the oracle sees whether documents are apart"


def results(paths: RunPaths) -> dict[str, Any]:
    return dict(json.loads(paths.results.read_text())["text"])

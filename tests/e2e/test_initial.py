"""Training goes on from Hugging Face weights under any plan: the losses of one rank, and of transformers."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jobs.hf.folder import model_of
from jobs.spec import JobSpec
from jobs.weights import digested, find
from strategies.codec import to_json
from tests.support import hf_models
from tests.support.gang import GangFailed, WarmPool
from tests.support.jobspecs import make_job, make_plan

BATCH = 4
TRAIN = "tests.support.ranks:train_from"


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


def job_of(folder: Path, degrees: dict[str, Any], **recipe: Any) -> JobSpec:
    model = model_of(folder)
    job = make_job(model, make_plan(model, BATCH, **degrees), global_batch=BATCH, **recipe)
    return replace(job, initial=digested(find(str(folder)), model))


def train(pool: WarmPool, job: JobSpec, steps: int = 3) -> list[dict[str, Any]]:
    arguments = {"job": to_json(job), "steps": steps}
    return pool.run(TRAIN, world_size=job.plan.world_size, arguments=arguments, timeout_s=120)


def losses(rank: dict[str, Any]) -> list[float]:
    return [float.fromhex(text) for text in rank["loss"]]


def test_llama_under_a_pipeline_begins_where_transformers_is(pool: WarmPool, tmp_path: Path) -> None:
    theirs = hf_models.make(tmp_path / "hf", "llama", shard="20KB", max_position_embeddings=16, num_hidden_layers=4)
    plain = train(pool, job_of(tmp_path / "hf", {}))
    split = train(pool, job_of(tmp_path / "hf", {"tp": 2, "pp": 2, "zero_stage": 1}))
    lines = torch.tensor(plain[0]["lines"])
    wanted = F.cross_entropy(hf_models.logits(theirs, lines[:, :-1]).flatten(0, 1), lines[:, 1:].flatten())
    assert losses(plain[0])[0] == pytest.approx(float(wanted), abs=1e-5)
    assert losses(split[0]) == pytest.approx(losses(plain[0]), rel=5e-6)
    state = theirs.state_dict()
    for entry in (entry for rank in split for entry in rank["initial"] if entry["name"] == "blocks.3.mlp.gate.weight"):
        low, high = entry["box"][0]
        data = np.frombuffer(base64.b64decode(entry["data"]), dtype=np.float32).reshape(high - low, -1)
        assert np.array_equal(data, state["model.layers.3.mlp.gate_proj.weight"][low:high].numpy())


OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2-tp2-pp2": ("gpt2", {"tp": 2, "pp": 2, "zero_stage": 1}, {}),
    "gpt2-dp2-zero3": ("gpt2", {"dp": 2, "zero_stage": 3}, {}),
    "llama-tp2-dp2-zero2": ("llama", {"tp": 2, "dp": 2, "zero_stage": 2}, {}),
    "mixtral-ep2-tp2": ("mixtral", {"dp": 2, "ep": 2, "tp": 2, "zero_stage": 1}, {}),
    "mixtral-ep2-pp2": ("mixtral", {"dp": 2, "ep": 2, "pp": 2, "zero_stage": 1, "stages": (1, 2)}, {}),
    "llama-own-head-width-tp2-pp2": ("llama", {"tp": 2, "pp": 2, "zero_stage": 1}, {"head_dim": 12}),
    "mixtral-own-head-width-sp2-tp2": ("mixtral", {"sp": 2, "tp": 2, "zero_stage": 1}, {"head_dim": 12}),
    "llama-dp2-zero0": ("llama", {"dp": 2, "zero_stage": 0}, {}),
}


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_plans_give_the_same_losses(pool: WarmPool, tmp_path: Path, name: str) -> None:
    kind, degrees, changes = OTHERS[name]
    length = {"n_positions": 16, "n_layer": 4} if kind == "gpt2" else {"max_position_embeddings": 16}
    hf_models.make(tmp_path / "hf", kind, **length | changes)
    plain = train(pool, job_of(tmp_path / "hf", {}))
    assert losses(train(pool, job_of(tmp_path / "hf", degrees))[0]) == pytest.approx(losses(plain[0]), rel=5e-6)


@pytest.mark.full
def test_masters_are_the_weights_to_the_bit_in_bf16(pool: WarmPool, tmp_path: Path) -> None:
    """The 16-bit weights are the masters' rounding, not the other way round."""
    hf_models.make(tmp_path / "hf", "llama", max_position_embeddings=16)
    job = job_of(tmp_path / "hf", {"dp": 2, "zero_stage": 1}, precision="bf16")
    assert all(rank["masters_exact"] for rank in train(pool, job, steps=1))


@pytest.mark.full
def test_changed_weights_stop_every_rank(pool: WarmPool, tmp_path: Path) -> None:
    hf_models.make(tmp_path / "hf", "llama", max_position_embeddings=16)
    job = job_of(tmp_path / "hf", {"dp": 2})
    file = tmp_path / "hf" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(GangFailed, match="have changed since the job was submitted"):
        train(pool, job)

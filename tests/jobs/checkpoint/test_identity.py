"""Whose checkpoint it is: a run goes on from its own alone, while another run may begin with weights that fit it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jobs.checkpoint.identity import differences
from jobs.checkpoint.manifest import read_manifest
from jobs.weights import check, find
from strategies.errors import ConfigError
from strategies.specs import ModelSpec, MoeSpec
from tests.support.checkpoints import write_model_checkpoint
from tests.support.jobspecs import LLAMA, make_job

MOE = MoeSpec(experts=4, top_k=2, ffn=48, balance_weight=0.01, z_weight=0.001, capacity_factor=2.0)
MODEL = dataclasses.replace(LLAMA, layers=2, hidden=32, heads=4, kv_heads=4, ffn=64, vocab=97, moe=MOE)

TRAINED: list[dict[str, Any]] = [{"balance_weight": 0.1}, {"z_weight": 0.0}, {"capacity_factor": 0.0}]
PLANNED: list[dict[str, Any]] = [{"imbalance": 3.0}]
FUNCTION: list[dict[str, Any]] = [
    {"experts": 8},
    {"top_k": 1},
    {"ffn": 64},
    {"dense_layers": 1},
    {"shared_ffn": 16},
    {"router_bias": True},
    {"routing": "sigmoid"},
    {"normalize": False},
]


def with_experts(**changes: Any) -> ModelSpec:
    return dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, **changes))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_checkpoint(tmp_path_factory.mktemp("run"), MODEL)


@pytest.mark.parametrize("changes", TRAINED + PLANNED, ids=str)
def test_weights_are_taken_whatever_trains_the_routers(changes: dict[str, Any], manifest: Path) -> None:
    check(find(str(manifest)), with_experts(**changes))


@pytest.mark.parametrize("changes", FUNCTION, ids=str)
def test_weights_of_other_experts_are_refused(changes: dict[str, Any], manifest: Path) -> None:
    ((name, here),) = changes.items()
    with pytest.raises(ConfigError, match="is of another model") as caught:
        check(find(str(manifest)), with_experts(balance_weight=0.5, **changes))
    assert caught.value.why == f"model.moe.{name}: {getattr(MOE, name)} in the checkpoint, {here} here"


def test_weights_of_experts_are_none_of_a_dense_model(manifest: Path) -> None:
    with pytest.raises(ConfigError, match="is of another model") as caught:
        check(find(str(manifest)), dataclasses.replace(MODEL, moe=None))
    assert "None here" in str(caught.value)


def test_every_field_of_the_experts_is_either_free_or_not() -> None:
    told = {name for changes in (*TRAINED, *PLANNED, *FUNCTION) for name in changes}
    assert told == {field.name for field in dataclasses.fields(MoeSpec)}


@pytest.mark.parametrize("changes", TRAINED + PLANNED + FUNCTION, ids=str)
def test_a_run_goes_on_with_the_losses_that_it_has(changes: dict[str, Any], manifest: Path) -> None:
    """What it was trained for is the record of a run; what was planned with is not."""
    job, there = make_job(MODEL), read_manifest(str(manifest))
    extra = {"seed": job.train.seed, "data": {"digest": job.data.digest, "vocab": job.data.vocab}}
    there = dataclasses.replace(there, extra=extra)
    assert differences(there, job) == []
    found = differences(there, dataclasses.replace(job, model=with_experts(**changes)))
    assert [one.partition(":")[0] for one in found] == [f"model.moe.{key}" for key in changes if key != "imbalance"]

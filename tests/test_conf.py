"""Every file under ``conf/`` composes and plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import build
from launcher.config import choices_of, compose, conf_dir
from launcher.schema import GROUPS

NEEDED = {
    "data=text": ["data.path=corpus.txt"],
    "job=script": ["job.command=python train.py"],
    "cluster=existing": ["cluster.address=10.0.0.1:6379", "cluster.nodes=3", "cluster.slots_per_node=2"],
}
CHOICES = [f"{group}={choice}" for group in GROUPS for choice in choices_of(group)]


def test_every_file_is_a_choice() -> None:
    files = {path.relative_to(conf_dir()) for path in conf_dir().rglob("*.yaml")}
    assert files == {Path("config.yaml"), *(Path(f"{c.replace('=', '/')}.yaml") for c in CHOICES)}
    assert {path.name for path in conf_dir().iterdir() if path.is_dir()} == set(GROUPS)


@pytest.mark.parametrize("choice", CHOICES)
def test_composes_and_plans(choice: str, tmp_path: Path) -> None:
    config = compose([choice, *NEEDED.get(choice, [])])
    assert build.outline(config).violations == ()
    settled = build.settle(config, name="run", cwd=tmp_path)
    assert build.build_request(settled, [choice]).job.plan.world_size >= 1


@pytest.mark.parametrize("model", choices_of("model"))
def test_file_and_model_have_one_name(model: str) -> None:
    assert compose([f"model={model}"]).model.name == model


def test_parameter_counts_are_those_of_the_papers() -> None:
    counts = {
        "gpt2_small": 124_439_808,
        "llama2_7b": 6_738_415_616,
        "llama3_8b": 8_030_261_248,
        "gpt3_175b": 174_604_259_328,
    }
    for model, parameters in counts.items():
        assert build.model_spec(compose([f"model={model}"])).parameters == parameters


def test_quickstart_is_the_main_job() -> None:
    config = compose(["experiment=quickstart"])
    sketch = build.outline(config)
    plan = sketch.plan
    assert (plan.tp, plan.pp, plan.dp, plan.zero_stage, plan.world_size) == (2, 2, 2, 1, 8)
    assert (config.cluster.kind, config.cluster.nodes, config.cluster.slots_per_node) == ("local", 4, 2)
    assert config.cluster.spares == 1
    assert 1_000_000 <= sketch.model.parameters <= 5_000_000
    assert config.tracking.mode == "offline"
    assert config.faults
    assert config.experiment.require_faults

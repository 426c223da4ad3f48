"""A rehearsal is small, legal, and has every kind of parallelism of the experiment."""

from __future__ import annotations

import math

import pytest

from launcher import build
from launcher.config import compose
from launcher.drill.toy import MOST_RANKS, fit, shrink
from strategies.errors import ConfigError, PlanInfeasible

EXPERIMENTS = {
    "gpt3_175b": ["experiment=gpt3_175b"],
    "gpt4_1800b": ["experiment=gpt4_1800b"],
    "llama3_405b": ["experiment=llama3_405b"],
    "instructgpt_sft": ["experiment=instructgpt_sft"],
    "quickstart": ["experiment=quickstart"],
    "nothing given": [],
    "two ranks": ["cluster=process", "cluster.nodes=2", "cluster.slots_per_node=1", "strategy.pp=2"],
    "three stages": ["cluster=process", "cluster.nodes=3", "cluster.slots_per_node=1", "strategy.pp=3"],
    "zero 3": ["model=llama_tiny", "cluster=process", "cluster.nodes=2", "strategy.dp=4", "strategy.zero_stage=3"],
    "bf16": ["cluster=process", "cluster.nodes=2", "strategy.tp=2", "strategy.dp=2", "train.precision=bf16"],
}
DEGREES = ("tp", "pp", "dp")


@pytest.mark.parametrize("words", EXPERIMENTS.values(), ids=EXPERIMENTS.keys())
def test_every_degree_above_one_stays_above_one(words: list[str]) -> None:
    config = compose(words)
    wanted, toy = build.outline(config).plan, shrink(config)
    assert toy.plan.world_size <= MOST_RANKS
    for name in DEGREES:
        was, now = getattr(wanted, name), getattr(toy.plan, name)
        assert (now > 1) == (was > 1), name
        assert now <= was
    assert build.outline(toy.config).violations == ()
    assert shrink(config) == toy


@pytest.mark.parametrize("words", EXPERIMENTS.values(), ids=EXPERIMENTS.keys())
def test_a_node_can_be_lost(words: list[str]) -> None:
    cluster = shrink(compose(words)).config.cluster
    assert cluster.kind == "process"
    assert cluster.nodes is not None
    assert cluster.nodes > 1


def test_what_fits_already_keeps_its_degrees() -> None:
    toy = shrink(compose(EXPERIMENTS["three stages"]))
    assert toy.plan.pp == 3
    assert not [change for change in toy.changes if change.key.startswith("strategy.")]


def test_what_can_only_be_planned_is_replaced_and_said_so() -> None:
    toy = shrink(compose(["experiment=gpt4_1800b"]))
    said = {change.key: (change.was, change.now) for change in toy.changes}
    assert said["strategy.ep"] == (16, 1)
    assert said["strategy.schedule"] == ("interleaved", "1f1b")
    assert said["model.moe"][1] is None
    assert (said["strategy.tp"], said["strategy.dp"]) == ((8, 2), (208, 2))
    assert toy.config.train.precision == "bf16"


def test_grouped_heads_stay_grouped() -> None:
    model = shrink(compose(["experiment=llama3_405b"])).config.model
    assert model.kv_heads is not None
    assert 1 < model.kv_heads < model.heads


@pytest.mark.parametrize("most", [8, 9, 12, 16])
def test_degrees_are_halved_from_the_largest(most: int) -> None:
    for tp in (1, 2, 3, 8, 64):
        for pp in (1, 2, 15, 64):
            for dp in (1, 2, 208):
                small = fit({"tp": tp, "pp": pp, "dp": dp, "sp": 1, "cp": 1}, most)
                assert math.prod(small.values()) <= most
                assert all((small[name] > 1) == (was > 1) for name, was in (("tp", tp), ("pp", pp), ("dp", dp)))


def test_sequence_parallelism_goes_first_where_twos_are_too_many() -> None:
    assert fit({"tp": 2, "pp": 2, "dp": 2, "sp": 2, "cp": 2}) == {"tp": 2, "pp": 2, "dp": 2, "sp": 1, "cp": 1}


def test_a_script_is_refused() -> None:
    with pytest.raises(ConfigError, match="script"):
        shrink(compose(["job=script", "job.command=true"]))


def test_an_illegal_plan_is_refused_with_its_rules() -> None:
    with pytest.raises(PlanInfeasible, match="tp"):
        shrink(compose(["model=gpt_tiny", "strategy.tp=3"]))

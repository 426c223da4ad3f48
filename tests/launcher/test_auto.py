"""``strategy=auto``: the choice, the ranking, ``--why``, and what is said when there is nothing to choose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest

from launcher import auto, build
from launcher.config import compose
from launcher.quantities import dollars
from launcher.render_search import ranking_text, why_text
from launcher.schema import Config
from strategies.codec import to_json
from strategies.errors import ConfigError, PlanInfeasible
from strategies.resolve import resolve_plan
from strategies.search import search
from strategies.space import Space

SMALL = (
    "model=gpt2_small",
    "cluster=a100_80",
    "cluster.nodes=2",
    "train.global_batch=64",
    "train.precision=bf16",
    "strategy=auto",
)
GPT4 = ("experiment=gpt4_1800b", "strategy=auto")


def small(*words: str) -> Config:
    return compose([*SMALL, *words])


def work_of(config: Config) -> Any:
    sketch = build.outline(config)
    return build.workload(config, sketch)


def test_the_plan_of_an_outline_is_the_best_that_runs() -> None:
    config = small()
    sketch = build.outline(config)
    assert sketch.violations == ()
    work = work_of(config)
    best = search(work, top=1, space=Space(work, {"grad_dtype": "fp32"}, runnable_only=True)).ranked[0]
    assert sketch.plan == best.plan


def test_what_is_given_stays() -> None:
    sketch = build.outline(small("strategy.tp=2", "strategy.micro_batch=3"))
    assert (sketch.plan.tp, sketch.plan.micro_batch) == (2, 3)


def test_document_adds_up_and_its_overrides_make_the_same_plan() -> None:
    config = small()
    document = auto.auto_document(config, top=8)
    assert len(document["ranked"]) == 8
    parts = (*document["pruned"].values(), *document["rejected"].values())
    assert document["space"] == document["evaluated"] + sum(parts)
    survivors = [one["surviving_tokens_per_s"] for one in document["ranked"]]
    assert survivors == sorted(survivors, reverse=True)
    for one in document["ranked"]:
        again = compose([*SMALL[:-1], *one["overrides"]])
        plan = resolve_plan(
            build.model_spec(again),
            work_of(config).batch,
            build.cluster_spec(again),
            "bf16",
            **again.strategy.asked(),
        )
        assert to_json(plan) == one["plan"]
    assert document["best_runnable"]["runnable"]
    json.dumps(document)


def test_ranking_as_text() -> None:
    document = auto.auto_document(small())
    text = ranking_text(document)
    assert f"{document['space']:,} plans" in text
    assert "modelled only" in text
    assert "why the next best lost" in text
    for one in document["ranked"]:
        assert one["plan_text"] in text
    labels = [one["plan_text"] for one in document["ranked"]]
    assert len(set(labels)) == len(labels)


def test_plans_ranked_by_cost_say_what_they_cost() -> None:
    document = auto.auto_document(small("objective=cost", "cluster.hardware.price_per_device_hour=2"))
    costs = [one["cost_50_usd"] for one in document["ranked"]]
    assert all(cheap <= dear * 1.0001 for cheap, dear in pairwise(costs))
    text = ranking_text(document)
    assert all(dollars(cost) in text for cost in costs)
    assert "$" not in ranking_text(auto.auto_document(small()))


@pytest.mark.parametrize("objective", ["time", "cost", "memory"])
def test_objectives(objective: str) -> None:
    document = auto.auto_document(small(f"objective={objective}"))
    assert document["objective"] == objective
    fastest = auto.auto_document(small("objective=time"))["ranked"][0]
    assert document["ranked"][0]["step_s"] >= fastest["step_s"]


def test_why_a_plan_is_slower() -> None:
    document = auto.why_document(small(), auto_fields := {"tp": "4", "pp": "3"})
    assert document["asked"] == {name: int(value) for name, value in auto_fields.items()}
    assert document["verdict"] == "slower"
    assert (document["plan"]["plan"]["tp"], document["plan"]["plan"]["pp"]) == (4, 3)
    assert document["lost"]["seconds"]
    assert "against the best" in why_text(document)


def test_why_the_best_is_the_best() -> None:
    best = auto.auto_document(small())["ranked"][0]["plan"]
    fields = {name: str(best[name]).lower() for name in ("tp", "pp", "dp", "micro_batch", "recompute", "zero_stage")}
    document = auto.why_document(small(), fields)
    assert document["verdict"] == "best"
    assert "this is the best plan" in why_text(document)


def test_why_a_plan_is_illegal() -> None:
    document = auto.why_document(small(), {"tp": "5"})
    assert document["verdict"] == "illegal"
    assert "heads_divisible_by_tp" in why_text(document)


def test_gpt4_without_expert_parallelism_does_not_fit_and_with_it_does() -> None:
    config = compose(GPT4)
    known = {"tp": "8", "pp": "15", "zero_stage": "1"}
    alone = auto.why_document(config, known | {"ep": "1", "grad_dtype": "fp32"})
    assert alone["verdict"] == "too_large"
    assert "too much" in why_text(alone)
    spread = auto.why_document(config, known | {"ep": "16", "dp": "208"})
    assert spread["verdict"] in ("best", "slower")
    assert spread["plan"]["ranks"] == 24960
    text = why_text(spread)  # within a tenth of the best, or the page says what beats it
    assert (
        spread["plan"]["step_s"] <= 1.1 * spread["best"]["step_s"]
        or f"the best plan: {spread['best']['plan_text']}" in text
    )
    runnable = auto.auto_document(config)["best_runnable"]
    assert runnable is not None
    assert runnable["plan"]["ep"] == 16, "experts run, and only spread over replicas do they fit"
    assert runnable["plan"]["schedule"] != "interleaved", "which DeepSpeed does not have"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tpp": "3"}, "Did you mean 'tp'?"),
        ({"recompute": "ful"}, "Did you mean 'full'?"),
        ({"pp": "x"}, "pp=x: a whole number"),
        ({"tp": "0"}, "tp=0: a whole number"),
        ({"tpp": "3", "pp": "-1"}, "pp=-1"),
    ],
)
def test_unknown_knobs_and_values(fields: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        auto.parse_fields(fields)
    assert words in str(caught.value)


def test_fields_of_every_kind() -> None:
    fields = {"tp": "4", "stages": "[6,6]", "flash": "True", "schedule": "dualpipev", "zero_stage": "0"}
    found = auto.parse_fields(fields)
    assert found == {"tp": 4, "stages": (6, 6), "flash": True, "schedule": "dualpipev", "zero_stage": 0}


def test_nothing_is_offloaded_where_the_device_is_the_host() -> None:
    words = ("model=gpt_tiny", "cluster=local", "train.global_batch=16", "strategy=auto", "objective=memory")
    ranked = auto.searched(compose(list(words)), top=20).ranked
    assert {one.plan.offload for one in ranked} == {"none"}
    asked = auto.searched(compose([*words, "strategy.offload=optimizer"]), top=20).ranked
    assert {one.plan.offload for one in asked} == {"optimizer"}


def test_nothing_fits() -> None:
    with pytest.raises(PlanInfeasible) as caught:
        build.outline(small("cluster.device_memory_bytes=1000000000"))
    text = str(caught.value)
    assert "comes closest and needs" in text
    assert "too much" in text


def test_no_plan_is_legal() -> None:
    with pytest.raises(PlanInfeasible, match="heads_divisible_by_tp"):
        build.outline(small("strategy.tp=5"))
    with pytest.raises(PlanInfeasible, match="replicas_within_batch"):
        build.outline(small("strategy.dp=16", "strategy.micro_batch=8"))
    with pytest.raises(PlanInfeasible, match="world_size_fits_cluster"):
        build.outline(small("strategy.tp=4", "strategy.dp=8"))


def test_a_cluster_without_hardware() -> None:
    with pytest.raises(ConfigError, match="nothing about its hardware"):
        build.outline(compose(["cluster=existing", "cluster.nodes=1", "cluster.slots_per_node=2", "strategy=auto"]))


_PARSE = """
import json, sys, warnings
warnings.simplefilter("ignore")
from deepspeed.runtime.config import DeepSpeedConfig

for config, batch in json.load(sys.stdin):
    parsed = DeepSpeedConfig(config)  # as one rank alone: no process group
    assert parsed.train_batch_size == batch, (parsed.train_batch_size, batch)
print("accepted")
"""


def test_deepspeed_accepts_every_plan_that_runs() -> None:
    config = small("train.global_batch=32")
    result = search(work_of(config), top=60, runnable_only=True)
    cases = [
        (build.outline_deepspeed(config, one.plan), one.plan.rows_per_step // one.plan.dp) for one in result.ranked
    ]
    assert len(cases) == 60
    done = subprocess.run(
        [sys.executable, "-c", _PARSE],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("accepted")

"""A rehearsal is small, legal, and has every kind of parallelism of the experiment."""

from __future__ import annotations

import math
from functools import cache

import pytest

from launcher import build
from launcher.config import compose
from launcher.drill.toy import MOST_RANKS, STEPS, Toy, fit, shareable, shrink
from launcher.schema import Config
from strategies.errors import ConfigError, PlanInfeasible, Violation
from strategies.plan import ParallelPlan
from strategies.schedule import SampleSchedule
from strategies.specs import ModelSpec

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
    "three shares": ["model=moe_tiny", "model.moe.experts=6", "strategy.dp=3", "strategy.ep=3"],
    "three experts": ["model=moe_tiny", "model.moe.experts=3", "strategy.dp=6", "strategy.ep=3"],
    "an odd rest": ["model=moe_tiny", "cluster.nodes=6", "strategy.dp=6", "strategy.tp=2", "strategy.ep=2"],
    "very many experts": ["model=moe_tiny", "model.moe.experts=27", "strategy.dp=3", "strategy.ep=3"],
    "parts of sequences": ["model.heads=8", "cluster.nodes=8", "strategy.sp=4", "strategy.dp=2", "strategy.tp=2"],
    "experts over parts": ["model=moe_tiny", "strategy.sp=2", "strategy.tp=2", "strategy.ep=2"],
    "bf16": ["cluster=process", "cluster.nodes=2", "strategy.tp=2", "strategy.dp=2", "train.precision=bf16"],
}
INTERLEAVED = ("experiment=gpt4_1800b", "strategy.schedule=interleaved", "strategy.vpp=8")  # can only be planned
DEGREES = ("tp", "pp", "dp", "ep", "sp", "cp", "vpp")


@cache
def of(name: str) -> tuple[Config, Toy]:
    """An experiment and its rehearsal."""
    config = compose(EXPERIMENTS[name])
    return config, shrink(config)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_degree_above_one_stays_above_one(name: str) -> None:
    config, toy = of(name)
    wanted = build.outline(config).plan
    assert toy.plan.world_size <= MOST_RANKS
    for degree in DEGREES:
        was, now = getattr(wanted, degree), getattr(toy.plan, degree)
        assert (now > 1) == (was > 1), degree
        assert now <= was
    assert build.outline(toy.config).violations == ()
    assert shrink(config) == toy


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_node_can_be_lost(name: str) -> None:
    cluster = of(name)[1].config.cluster
    assert cluster.kind == "process"
    assert cluster.nodes is not None
    assert cluster.nodes > 1


def test_what_fits_already_keeps_its_degrees() -> None:
    toy = of("three stages")[1]
    assert toy.plan.pp == 3
    assert [change.key for change in toy.changes if change.key.startswith("strategy.")] == ["strategy.grad_accum"]


@pytest.mark.parametrize(("name", "degrees", "experts"), [("three shares", (3, 3), 6), ("three experts", (6, 3), 3)])
def test_experts_that_fit_already_keep_their_shares(name: str, degrees: tuple[int, int], experts: int) -> None:
    toy = of(name)[1]
    assert (toy.plan.dp, toy.plan.ep) == degrees
    assert toy.config.model.moe is not None
    assert toy.config.model.moe.experts == experts


def test_experts_are_as_many_as_go_into_equal_shares() -> None:
    toy = of("very many experts")[1]
    assert toy.config.model.moe is not None
    assert (toy.plan.dp, toy.plan.ep, toy.config.model.moe.experts) == (3, 3, 18)


@pytest.mark.parametrize("dp", range(1, 40))
@pytest.mark.parametrize("sp", [1, 2, 3, 6])
def test_experts_in_shares_stay_in_shares(dp: int, sp: int) -> None:
    for ep in (one for one in range(2, dp * sp + 1) if dp * sp % one == 0):
        for tp in (1, 2, 8):
            small = shareable(fit({"tp": tp, "pp": 1, "dp": dp, "sp": sp, "cp": 1}), ep)
            room = small["dp"] * small["sp"] * small["cp"]
            assert any(room % size == 0 for size in range(2, ep + 1))
            assert all((small[name] > 1) == (was > 1) for name, was in (("tp", tp), ("dp", dp)))


def test_the_schedule_stays() -> None:
    toy = of("gpt4_1800b")[1]
    assert (toy.same["strategy.schedule"], toy.same["strategy.vpp"]) == ("dualpipev", 1)
    assert toy.plan.grad_accum >= 2 * toy.plan.pp, "or the pipeline would never be full"


def test_what_can_only_be_planned_is_replaced_and_said_so() -> None:
    toy = shrink(compose(INTERLEAVED))
    said = {change.key: (change.was, change.now) for change in toy.changes}
    assert said["strategy.ep"] == (16, 2)
    assert said["strategy.schedule"] == ("interleaved", "1f1b")
    assert {change.why for change in toy.changes if change.key in ("strategy.schedule", "strategy.vpp")} == {
        "schedule interleaved is modelled only"
    }
    assert (said["strategy.tp"], said["strategy.dp"]) == ((8, 2), (208, 2))
    assert toy.same["strategy.sequence_parallel"] is True
    assert (toy.same["model.moe.experts"], toy.same["model.moe.top_k"]) == (16, 2)
    assert toy.config.train.precision == "bf16"


def test_only_what_cannot_run_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The day a combination runs it is kept, without a change here."""
    from strategies import capabilities

    sent: list[str] = []

    def runnable(plan: ParallelPlan, precision: str, model: ModelSpec) -> Violation | None:
        sent.append(plan.schedule)
        refused = plan.schedule == "interleaved" or plan.sequence_parallel
        return Violation(rule="combination_runs", message="not yet", hint="") if refused else None

    monkeypatch.setattr(capabilities, "runnable", runnable)
    toy = shrink(compose(INTERLEAVED))
    assert set(sent) >= {"interleaved", "1f1b"}
    assert (toy.plan.schedule, toy.plan.vpp, toy.plan.grad_accum) == ("1f1b", 1, 12)
    assert (toy.plan.tp, toy.plan.pp, toy.plan.dp, toy.plan.ep, toy.plan.world_size) == (2, 2, 2, 2, 8)
    assert not toy.plan.sequence_parallel
    model = toy.config.model
    assert model.moe is not None
    assert (model.moe.experts, model.moe.top_k, model.moe.ffn) == (16, 2, 86)  # 8/3 x hidden, divisible by tp
    given_up = {change.key for change in toy.changes if change.why == "not yet"}
    assert given_up == {"strategy.schedule", "strategy.vpp", "strategy.sequence_parallel"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_makes_a_run_what_it_is_stays(name: str) -> None:
    config, toy = of(name)
    was, now = build.outline(config), build.outline(toy.config)
    assert toy.config.train.precision == config.train.precision
    for key in ("zero_stage", "schedule", "recompute", "grad_dtype", "flash", "offload"):
        assert getattr(now.plan, key) == getattr(was.plan, key), key
    for key in ("micro_batch", "grad_accum"):
        assert (getattr(now.plan, key) > 1) == (getattr(was.plan, key) > 1), key
    for key in ("flavour", "tied"):
        assert getattr(now.model, key) == getattr(was.model, key), key
    assert now.model.heads / now.model.kv_heads == was.model.heads / was.model.kv_heads
    assert now.model.ffn / now.model.hidden == pytest.approx(was.model.ffn / was.model.hidden, rel=0.02)
    assert (len({*now.plan.stages}) > 1) == (len({*was.plan.stages}) > 1)
    assert (now.batch.ramp is None) == (was.batch.ramp is None)
    both = {change.key for change in toy.changes} & {*toy.same}
    assert both == set()


def test_a_batch_that_grows_reaches_its_full_size_within_the_rehearsal() -> None:
    batch = build.outline(of("gpt3_175b")[1].config).batch
    schedule = SampleSchedule.of(batch)
    sizes = [schedule.batch_at(step) for step in range(1, STEPS + 1)]
    assert sizes == sorted(sizes)
    assert {*sizes} == {4, 8, 12}


@pytest.mark.parametrize(
    "model", ["bloom_176b", "deepseek_v3", "glm_130b", "llama2_70b", "mixtral_8x7b", "switch_1t6", "gpt2_xl"]
)
def test_models_of_unusual_shape_have_a_rehearsal(model: str) -> None:
    tp = 5 if model == "gpt2_xl" else 8  # 25 heads
    words = [f"model={model}", "cluster=h100", f"strategy.tp={tp}", "strategy.pp=4", "strategy.dp=16"]
    toy = shrink(compose([*words, "train.precision=bf16", "train.global_batch=512"]))
    assert toy.plan.world_size == MOST_RANKS
    assert build.outline(toy.config).violations == ()


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

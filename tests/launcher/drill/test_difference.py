"""What a rehearsal changes is what it shows: both configurations and both plans are compared leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from launcher import build
from launcher.config import compose
from launcher.drill.changes import changes_text
from launcher.drill.miniature import miniature
from launcher.drill.toy import shrink
from launcher.schema import Config
from strategies.codec import to_json
from strategies.plan import ParallelPlan

UNSHOWN = {
    "cluster.name": "a name for people; cluster.kind says where it is",
    "faults": "told below the difference: 'to happen'",
    "plan.stages": "as even as before, and layers and stages are shown (uneven ones are shown)",
    "strategy.grad_dtype": "given, where it was derived: the plan's is the same",
}
SIZES = (
    "strategy.",
    "model.",
    "cluster.nodes",
    "cluster.slots_per_node",
    "train.ramp.",
    "train.global_batch",
    "train.steps",
    "train.tokens",
    "train.warmup_steps",
    "checkpoint.every",
)
FOUND_OUT = {"cluster.device": "what it computes on is no setting: here the CPU"}


def leaves(value: Any, other: Any, key: str = "") -> Iterator[str]:
    """Keys of what differs; what both sides have parts of is taken part by part."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        for name in {*value, *other}:
            yield from leaves(value.get(name), other.get(name), f"{key}.{name}" if key else name)
    elif value != other:
        yield key


def changed(config: Config, small: Config, plan: ParallelPlan) -> set[str]:
    """What differs in the configurations or in the plans; of the plan, ``strategy`` is its settings."""
    found = {*leaves(to_json(config), to_json(small))}
    plans = {f"plan.{key}" for key in leaves(to_json(build.outline(config).plan), to_json(plan))}
    return found | {f"strategy.{key.removeprefix('plan.')}" if key != "plan.stages" else key for key in plans}


@pytest.mark.parametrize("name", ["gpt4_1800b", "gpt3_175b", "llama3_405b"])
def test_all_that_changes_is_shown(name: str) -> None:
    config = compose([f"experiment={name}"])
    toy = miniature(config)
    found, told = changed(config, toy.config, toy.plan), {change.key for change in toy.changes}
    assert found - UNSHOWN.keys() == told - FOUND_OUT.keys()
    assert told >= {"strategy.grad_accum", "data.path", "experiment.require_faults", "cluster.hardware"}
    was = build.outline(config).plan
    assert was.grad_dtype == toy.plan.grad_dtype
    assert len({*was.stages}) == 1 or "strategy.stages" in told


@pytest.mark.parametrize("name", ["gpt4_1800b", "gpt3_175b", "llama3_405b"])
def test_what_is_no_size_has_a_reason(name: str) -> None:
    for change in miniature(compose([f"experiment={name}"])).changes:
        assert change.why or change.key.startswith(SIZES), change


def test_a_long_path_does_not_push_the_reasons_away() -> None:
    toy = miniature(compose(["experiment=gpt3_175b", f"run.dir=/{'far/' * 40}"]))
    (row,) = (line for line in changes_text(toy.changes).splitlines() if line.startswith("data.path"))
    assert row.split("  ")[-1] == "a small text of its own"
    shown = next(one for one in row.split() if one.startswith("..."))
    assert shown.endswith("/.data/rehearsal/corpus.txt")
    assert len(row) < 116


def test_what_trains_is_shown_where_it_is_other_code() -> None:
    config = compose(["experiment=gpt4_1800b", "planner.framework=mcore"])
    for toy in (miniature(config), shrink(config)):
        (change,) = (one for one in toy.changes if one.key == "planner.framework")
        assert (change.was, change.now, change.why) == ("mcore", "megatron", "what trains here")

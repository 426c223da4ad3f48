"""Stages that are even in blocks, in parameters or in time."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from strategies.balance import balanced, partition
from strategies.counts import rank_parameters
from strategies.errors import ConfigError
from strategies.plan import split_layers
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec, MoeSpec
from strategies.timing import Timing
from strategies.workload import Workload
from tests.strategies.planning import A100
from tests.strategies.support import FOUR_BY_TWO, LLAMA3_8B, TINY, plan

CLUSTER = ClusterSpec(name="big", kind="existing", nodes=8, slots_per_node=8, device="A100-80GB", hardware=A100)


def work_of(model: ModelSpec) -> Workload:
    return Workload(model=model, batch=BatchSpec(global_batch=64, seq=model.seq), cluster=CLUSTER, precision="bf16")


@pytest.mark.parametrize("seed", range(60))
def test_no_other_cut_is_better(seed: int) -> None:
    rng = random.Random(seed)
    layers, pp = rng.randint(1, 9), rng.randint(1, 5)
    pp = min(pp, layers)
    blocks = [float(rng.choice([1, 1, 1, 2, 5])) for _ in range(layers)]
    ends = [float(rng.randint(0, 4)) for _ in range(pp)]
    found = partition(blocks, ends)

    def judge(cut: tuple[int, ...]) -> tuple[float, float]:
        bounds = [0, *itertools.accumulate(cut)]
        costs = [sum(blocks[a:b]) + end for a, b, end in zip(bounds[:-1], bounds[1:], ends, strict=True)]
        return max(costs), sum(cost * cost for cost in costs)

    legal = [cut for cut in itertools.product(range(1, layers + 1), repeat=pp) if sum(cut) == layers]
    assert found in legal
    assert judge(found) == min(map(judge, legal))


def test_a_heavy_vocabulary_lightens_the_ends() -> None:
    work, the_plan = work_of(LLAMA3_8B), plan(LLAMA3_8B, pp=8, precision="bf16")
    even, by_size, by_time = (balanced(the_plan, work, how) for how in ("blocks", "parameters", "time"))
    assert even.stages == split_layers(32, 8)
    assert by_size.stages[0] < 4
    assert by_size.stages[-1] < 4
    assert max(rank_parameters(LLAMA3_8B, by_size)) < max(rank_parameters(LLAMA3_8B, even))
    timing = Timing(work)
    assert sum(timing.step(by_time)) < sum(timing.step(even))
    assert by_time.stages[-1] < by_time.stages[0], "the output layer computes, the embedding only looks up"


def test_under_dualpipev_the_first_stage_has_both_ends() -> None:
    found = balanced(plan(LLAMA3_8B, pp=4, precision="bf16", schedule="dualpipev"), work_of(LLAMA3_8B), "parameters")
    assert found.stages[0] == min(found.stages) < found.stages[-1]


def test_blocks_with_experts_weigh_more() -> None:
    moe = MoeSpec(experts=8, top_k=2, ffn=64, dense_layers=4)
    model = replace(TINY, layers=8, moe=moe)
    found = balanced(plan(model, pp=2), work_of(model), "parameters")
    assert found.stages[0] > found.stages[1]
    assert sum(found.stages) == 8


def test_without_speeds_there_is_no_time() -> None:
    work = replace(work_of(TINY), cluster=FOUR_BY_TWO)
    assert balanced(plan(pp=2), work, "parameters").stages == (2, 2)
    with pytest.raises(ConfigError, match=r"strategy\.balance=time needs speeds"):
        balanced(plan(pp=2), work, "time")


def test_one_stage_has_everything() -> None:
    for how in ("blocks", "parameters", "time"):
        assert balanced(plan(), work_of(TINY), how).stages == (4,)

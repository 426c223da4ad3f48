"""A plan's estimate as a whole: what plans are ranked by agrees with what is printed of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from strategies.errors import ConfigError
from strategies.estimate import CostEstimate, Estimator
from strategies.reliability import billed_nodes
from strategies.topology import nodes_needed
from strategies.workload import Workload
from tests.strategies.runs import GPT4, plan_of, work


def estimates(what: Workload) -> list[CostEstimate]:
    """Plans on many numbers of nodes, which leave none to many idle."""
    estimator = Estimator(what)
    found = []
    for tp, pp, dp in ((t, p, d) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8, 16) for d in range(1, 65)):
        for micro_batch in (1, 2):
            try:
                plan = plan_of(what, tp=tp, pp=pp, dp=dp, micro_batch=micro_batch)
            except ConfigError:
                continue
            if nodes_needed(plan, 8) <= what.cluster.nodes and what.batch.global_batch % (micro_batch * dp) == 0:
                found.append(estimator.estimate(plan))
    return found


@pytest.mark.parametrize("spares", [0, 3])
def test_the_order_by_cost_is_that_of_the_printed_cost(spares: int) -> None:
    what = work(nodes=64, price_per_device_hour=2.0)
    what = replace(what, cluster=replace(what.cluster, spares=spares))
    found, estimator = estimates(what), Estimator(what)
    assert len(found) > 200
    assert len({one.outlook.spares for one in found}) > 1
    found.sort(key=lambda one: estimator.score(one.plan, one.step_s, "cost"))
    for cheap, dear in pairwise(found):
        assert cheap.outlook.cost_50 is not None
        assert dear.outlook.cost_50 is not None
        assert cheap.outlook.cost_50 <= dear.outlook.cost_50 * 1.0001, "the mean that ranks, and the median, differ"


def test_spares_are_paid_for_when_they_are_asked_for_or_wanted() -> None:
    what = work(nodes=128)
    plan = plan_of(what, tp=8, pp=8, dp=15)
    assert billed_nodes(what, plan) == 121, "one idle node is wanted as a spare, seven do other work"
    for spares, nodes in ((1, 121), (6, 126)):
        asked = replace(what, cluster=replace(what.cluster, spares=spares))
        assert billed_nodes(asked, plan) == nodes
    assert billed_nodes(work(nodes=128, failures_per_node_day=0.0), plan) == 120


def test_the_error_of_the_step_widens_finish_and_cost() -> None:
    what = work(GPT4, nodes=3125, tokens=13e12, price_per_device_hour=1.0)
    found = Estimator(what).estimate(plan_of(what, tp=8, pp=15, dp=208, ep=16))
    early, likely, late = found.outlook.days_low, found.outlook.days_50, found.outlook.days_90
    assert early is not None
    assert likely is not None
    assert late is not None
    one_sided = 1.2816 / 1.6449  # of the 90 % band: a bound that one in ten exceeds
    assert math.log(late / likely) == pytest.approx(one_sided * math.log(found.high_s / found.step_s), rel=0.02)
    assert math.log(likely / early) == pytest.approx(one_sided * math.log(found.step_s / found.low_s), rel=0.02)
    costs = (found.outlook.cost_low, found.outlook.cost_50, found.outlook.cost_90)
    assert [cost / likely for cost in costs if cost] == pytest.approx(
        [costs[1] / likely * end / likely for end in (early, likely, late) if costs[1]]
    )

"""The catalogue has what was asked for, and every fault in it can be injected where a drill or a draw puts it."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from jobs.faults import Kind, resolve
from launcher.commands.drill import command
from launcher.config import compose
from launcher.drill import acts
from launcher.drill.case import Aim, Case, Outcome, faults_of, usual_aim
from launcher.drill.catalogue import CATALOGUE, named
from launcher.drill.draw import draws
from launcher.drill.toy import EVERY, Toy, shrink
from launcher.phase import Phase
from launcher.straggler import LEARNED

ASKED = {
    "rank SIGKILL": "rank_sigkill",
    "rank exception": "rank_exception",
    "SIGSTOP": "rank_sigstop",
    "GIL hold": "gil_hold",
    "node kill": "node_kill",
    "node kill during checkpoint": "node_kill_in_checkpoint",
    "node kill during restore": "node_kill_in_restore",
    "node kill during another recovery": "node_kill_in_recovery",
    "two nodes at once": "two_nodes",
    "partition": "partition",
    "partition that heals": "partition_heals",
    "slow link": "slow_link",
    "straggler": "straggler",
    "disk full": "disk_full",
    "truncated shard": "truncated_shard",
    "flipped bit in a shard": "flipped_bit",
    "missing shard": "missing_shard",
    "corrupt manifest": "corrupt_manifest",
    "stuck storage": "stuck_storage",
    "NaN gradient": "nan_gradient",
    "loss spike": "loss_spike",
    "preemption notice": "preemption",
    "Ray head kill": "ray_head_kill",
    "spare dies first": "spare_dies_first",
    "no spare left": "no_spare_left",
}
PLANS = {
    "tp2 pp2": ["cluster=process", "cluster.nodes=2", "strategy.tp=2", "strategy.pp=2"],
    "tp2 pp2 dp2": ["experiment=gpt3_175b"],
    "dp8": [],
    "pp3": ["cluster=process", "cluster.nodes=3", "cluster.slots_per_node=1", "strategy.pp=3"],
}


@pytest.fixture(scope="module", params=list(PLANS.values()), ids=list(PLANS))
def toy(request: pytest.FixtureRequest) -> Toy:
    words: list[str] = request.param
    return shrink(compose(words))


def check(case: Case, aim: Aim, toy: Toy) -> None:
    """The product's own rules for faults accept it."""
    if any(text.partition("@")[0] not in get_args(Kind) for text in case.faults):
        return  # it needs what this version does not have, and says so
    texts = faults_of(case, aim)
    cluster = toy.config.cluster
    assert cluster.nodes is not None
    shape = {"nodes": cluster.nodes, "world_size": toy.plan.world_size, "pp": toy.plan.pp}
    assert resolve(texts, seed=0, steps=case.steps, checkpoint_every=EVERY, **shape) == texts
    assert not case.ambush or aim.step > 1
    if case.name == "node_kill_in_recovery":  # its agent must be there to say that the rank has died
        assert aim.other != aim.rank * cluster.nodes // toy.plan.world_size


@pytest.mark.parametrize("asked", ASKED)
def test_everything_that_was_asked_for_is_there(asked: str) -> None:
    assert named(ASKED[asked]) is not None


def test_a_controller_dies_in_every_state_of_its_table() -> None:
    assert {phase.value for phase in Phase} <= {case.ambush for case in CATALOGUE}


def test_names_are_unique_and_every_fault_is_described() -> None:
    names = [case.name for case in CATALOGUE]
    assert len(set(names)) == len(names)
    assert all(case.what and (case.faults or case.acts or case.ambush) for case in CATALOGUE)


def test_a_rank_that_is_held_is_let_go_or_killed() -> None:
    for case in CATALOGUE:
        if case.held:
            assert {act.do for act in case.acts} & {acts.let_go, acts.kill_held}, case.name


def test_the_usual_places_are_legal(toy: Toy) -> None:
    assert toy.config.cluster.nodes is not None
    for case in CATALOGUE:
        check(case, usual_aim(case, toy.plan, toy.config.cluster.nodes), toy)


def test_a_seed_always_draws_the_same(toy: Toy) -> None:
    some = [case for case in CATALOGUE if case.drawn]
    first = draws(some, seed=3, count=60, plan=toy.plan, nodes=2)
    assert draws(some, seed=3, count=60, plan=toy.plan, nodes=2) == first
    assert draws(some, seed=3, count=20, plan=toy.plan, nodes=2) == first[:20]
    assert draws(some, seed=4, count=60, plan=toy.plan, nodes=2) != first


def test_whatever_is_drawn_is_legal(toy: Toy) -> None:
    some = [case for case in CATALOGUE if case.drawn]
    nodes = toy.config.cluster.nodes
    assert nodes is not None
    drawn = draws(some, seed=1, count=600, plan=toy.plan, nodes=nodes)
    for one in drawn:
        check(one.case, one.aim, toy)
    assert {one.case.name for one in drawn} == {case.name for case in some}
    assert {one.aim.rank for one in drawn} == set(range(toy.plan.world_size))
    assert len({one.aim.step for one in drawn}) > 10


def test_what_takes_its_time_is_drawn_early_enough(toy: Toy) -> None:
    slow = {case.name: case for case in CATALOGUE if case.last_step}
    assert set(slow) == {"straggler", "disk_full", "stuck_storage"}
    for one in draws(list(slow.values()), seed=1, count=200, plan=toy.plan, nodes=2):
        room = one.case.steps - one.aim.step
        if one.case.name == "straggler":  # named within 20 steps, once its own pace is known
            assert one.aim.step > LEARNED
            assert room >= 20 + 4
        else:  # one checkpoint fails, and the one after that says so
            assert room > 2 * EVERY


def test_everything_is_drawn_but_what_has_one_place_or_takes_minutes() -> None:
    assert {case.name for case in CATALOGUE if not case.drawn} == {"controller_kill_start", "ray_head_kill"}
    told = " ".join(str(command.help).split())
    assert (
        "but for controller_kill_start, whose place is always the same, and ray_head_kill, which takes minutes" in told
    )


def test_only_a_smaller_plan_may_differ() -> None:
    close = {case.name for case in CATALOGUE if case.outcome is Outcome.CLOSE}
    assert close == {"spare_dies_first", "no_spare_left"}


def test_an_aim_outside_the_run_is_noticed(toy: Toy) -> None:
    case = CATALOGUE[0]
    aim = replace(usual_aim(case, toy.plan, 2), rank=toy.plan.world_size)
    with pytest.raises(Exception, match="there are ranks"):
        check(case, aim, toy)

"""Ranks, coordinates, groups and placement."""

from __future__ import annotations

import random

import pytest

from strategies.errors import NotFound, PlanInfeasible
from strategies.topology import Coordinates, NodeRanks, Topology, draw, nodes_needed, place
from tests.strategies.support import plan


def test_ranks_count_model_first_then_data_then_pipe() -> None:
    topology = Topology(plan(tp=2, pp=2, dp=2))
    found = [str(topology.coordinates(rank)) for rank in range(8)]
    assert found == ["(0,0,0)", "(0,0,1)", "(0,1,0)", "(0,1,1)", "(1,0,0)", "(1,0,1)", "(1,1,0)", "(1,1,1)"]


def test_groups_of_two_by_two_by_two() -> None:
    topology = Topology(plan(tp=2, pp=2, dp=2))
    assert topology.tp_group(5) == (4, 5)
    assert topology.dp_group(5) == (5, 7)
    assert topology.pp_group(5) == (1, 5)


@pytest.mark.parametrize("seed", range(20))
def test_coordinates_and_groups_agree_for_any_degrees(seed: int) -> None:
    rng = random.Random(seed)
    tp, pp, dp = (rng.randint(1, 5) for _ in range(3))
    topology = Topology(plan(tp=tp, pp=pp, dp=dp, sp=rng.choice([1, 1, 2])))
    seen = set()
    for rank in range(topology.world_size):
        at = topology.coordinates(rank)
        assert topology.rank_of(at) == rank
        seen.add(at)
        for group, axis in ((topology.tp_group, "model"), (topology.dp_group, "data"), (topology.pp_group, "pipe")):
            peers = [topology.coordinates(peer) for peer in group(rank)]
            assert rank in group(rank)
            assert [getattr(peer, axis) for peer in peers] == list(range(len(peers)))
            others = {"pipe", "data", "model"} - {axis}
            assert all(getattr(peer, other) == getattr(at, other) for peer in peers for other in others)
        sizes = (len(topology.pp_group(rank)), len(topology.dp_group(rank)), len(topology.tp_group(rank)))
        assert sizes == (topology.pipe_size, topology.data_size, topology.model_size)
    assert len(seen) == topology.world_size


def test_the_ranks_of_a_sequence_are_neighbours_on_the_data_axis() -> None:
    topology = Topology(plan(tp=2, pp=2, dp=2, sp=2))
    assert topology.sp_group(0) == topology.sp_group(2) == (0, 2)
    assert topology.sp_group(7) == (5, 7)
    assert topology.sp_group(12) == (12, 14)
    assert topology.dp_group(0) == (0, 2, 4, 6)


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_of_the_world_is_not_found(rank: int) -> None:
    with pytest.raises(NotFound, match=f"no rank {rank}"):
        Topology(plan(tp=2, pp=2, dp=2)).pp_group(rank)


def test_coordinates_outside_of_the_plan_are_not_found() -> None:
    with pytest.raises(NotFound, match=r"\(0,0,2\)"):
        Topology(plan(tp=2)).rank_of(Coordinates(pipe=0, data=0, model=2))


def test_ranks_fill_whole_nodes_and_the_last_may_stay_partly_empty() -> None:
    placement = place(plan(dp=5), ["a", "b", "c", "d"], 2)
    assert placement.assignments == (
        NodeRanks(node="a", ranks=(0, 1)),
        NodeRanks(node="b", ranks=(2, 3)),
        NodeRanks(node="c", ranks=(4,)),
    )
    assert placement.nodes == ("a", "b", "c")
    assert [placement.node_of(rank) for rank in range(5)] == ["a", "a", "b", "b", "c"]
    assert [placement.local_rank(rank) for rank in range(5)] == [0, 1, 0, 1, 0]
    assert [placement.node_rank(rank) for rank in range(5)] == [0, 0, 1, 1, 2]
    with pytest.raises(NotFound):
        placement.node_of(5)
    with pytest.raises(NotFound):
        placement.node_of(-1)


def test_tensor_parallel_groups_stay_inside_a_node_where_they_fit() -> None:
    the_plan = plan(tp=2, pp=2, dp=2)
    placement = place(the_plan, ["a", "b"], 4)
    topology = Topology(the_plan)
    for rank in range(8):
        assert len({placement.node_of(peer) for peer in topology.tp_group(rank)}) == 1


def test_too_few_nodes_name_both_numbers() -> None:
    with pytest.raises(PlanInfeasible, match="needs 8 ranks = 4 nodes of 2 slots, there are 3 nodes"):
        place(plan(tp=2, pp=2, dp=2), ["a", "b", "c"], 2)
    with pytest.raises(PlanInfeasible):
        place(plan(), ["a"], 0)


def test_nodes_needed_rounds_up() -> None:
    assert [nodes_needed(plan(dp=dp), 4) for dp in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_a_small_plan_is_drawn_rank_by_rank() -> None:
    the_plan = plan(tp=2, pp=2, dp=2)
    assert draw(the_plan, place(the_plan, ["node-0", "node-1", "node-2", "node-3"], 2)) == "\n".join(
        [
            "TP2 x PP2 x DP2 ZeRO-1, micro-batch 1 x 8: 8 ranks on 4 nodes of 2 slots; rank (pipe, data, model)",
            "  node-0  | 0 (0,0,0) | 1 (0,0,1) |",
            "  node-1  | 2 (0,1,0) | 3 (0,1,1) |",
            "  node-2  | 4 (1,0,0) | 5 (1,0,1) |",
            "  node-3  | 6 (1,1,0) | 7 (1,1,1) |",
            "  stage 0: blocks 0-1 + embedding",
            "  stage 1: blocks 2-3 + head",
        ]
    )


def test_thousands_of_ranks_fit_on_a_screen() -> None:
    the_plan = plan(tp=8, pp=4, dp=128)
    picture = draw(the_plan, place(the_plan, [f"host-{i}" for i in range(512)], 8))
    assert len(picture.splitlines()) == 1 + 4 + 4
    assert "host-128 .. host-255 (128 nodes)" in picture
    assert "ranks 1024-2047  pipe 1  data 0-127  model 0-7" in picture


def test_wide_nodes_are_drawn_as_ranges() -> None:
    the_plan = plan(tp=8, pp=2)
    assert draw(the_plan, place(the_plan, ["a", "b"], 8)).splitlines()[1:3] == [
        "  a  ranks 0-7   pipe 0  data 0  model 0-7",
        "  b  ranks 8-15  pipe 1  data 0  model 0-7",
    ]


def test_shards_that_never_line_up_with_nodes_still_fit_on_a_screen() -> None:
    the_plan = plan(tp=3, pp=2, dp=1000)
    picture = draw(the_plan, place(the_plan, [f"host-{i}" for i in range(1000)], 8))
    assert len(picture.splitlines()) < 12
    assert "tensor-parallel groups cross nodes" in picture


def test_many_stages_still_fit_on_a_screen() -> None:
    the_plan = plan(tp=8, pp=400)
    assert len(draw(the_plan, place(the_plan, [f"host-{i}" for i in range(400)], 8)).splitlines()) < 80


def test_the_picture_warns_of_split_shards_and_empty_slots() -> None:
    the_plan = plan(tp=2, dp=3)
    picture = draw(the_plan, place(the_plan, ["a", "b"], 3))
    assert "note: 1 of 3 tensor-parallel groups cross nodes (slow: tp 2, 3 slots)" in picture
    the_plan = plan(dp=3)
    assert "note: 1 slot of the last node stays empty" in draw(the_plan, place(the_plan, ["a", "b"], 2))


def test_long_names_are_cut() -> None:
    picture = draw(plan(), place(plan(), ["f" * 56], 1))
    assert max(len(line) for line in picture.splitlines()[1:]) < 50

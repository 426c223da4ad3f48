"""Seconds of collectives, against hand-computed rings."""

from __future__ import annotations

import pytest

from strategies.collectives import Link, Network, all_reduce_s, all_to_all_s, gather_s, ring_link, send_s

GB = 1e9
PLAIN = Network(intra=Link(200 * GB, 0.0), inter=Link(10 * GB, 0.0), domain=8)


def test_a_ring_in_the_domain_uses_its_link() -> None:
    assert ring_link(PLAIN, 8) == PLAIN.intra
    assert ring_link(PLAIN, 2, stride=4) == PLAIN.intra


@pytest.mark.parametrize(("ranks", "stride", "cards"), [(16, 1, 8), (8, 2, 4), (4, 8, 1), (2, 64, 1), (64, 4, 2)])
def test_a_ring_over_nodes_uses_the_cards_of_its_members(ranks: int, stride: int, cards: int) -> None:
    assert ring_link(PLAIN, ranks, stride).bandwidth == cards * 10 * GB


def test_a_ring_is_never_faster_than_the_inner_link() -> None:
    assert ring_link(PLAIN._replace(inter=Link(100 * GB, 0.0)), 64).bandwidth == 200 * GB


def test_all_reduce_moves_twice_what_a_gather_moves() -> None:
    assert gather_s(PLAIN, 16 * GB, 8) == pytest.approx(7 / 8 * 16 / 200)
    assert all_reduce_s(PLAIN, 16 * GB, 8) == pytest.approx(2 * 7 / 8 * 16 / 200)
    assert gather_s(PLAIN, 16 * GB, 4, stride=8) == pytest.approx(3 / 4 * 16 / 10)


def test_rings_over_nodes_lose_a_share() -> None:
    assert gather_s(PLAIN._replace(ring=0.5), 16 * GB, 4, stride=8) == pytest.approx(2 * 3 / 4 * 16 / 10)
    assert gather_s(PLAIN._replace(ring=0.5), 16 * GB, 8) == gather_s(PLAIN, 16 * GB, 8)


def test_one_rank_sends_nothing() -> None:
    slow = PLAIN._replace(start_s=1.0)
    assert gather_s(slow, GB, 1) == all_reduce_s(slow, GB, 1) == all_to_all_s(slow, GB, 1) == 0.0


def test_small_messages_are_bound_by_latency() -> None:
    """8 A100 reduce 1 MB in about 80 us (20 GB/s of bus bandwidth) and 1 GB at 229 GB/s (vTrain's trace)."""
    a100 = Network(intra=Link(0.76 * 300 * GB, 2e-6), inter=Link(25 * GB, 5e-6), domain=8, start_s=5e-5)
    for size, measured in ((1e6, 20 * GB), (16e6, 127 * GB), (64e6, 203 * GB), (1e9, 229 * GB)):
        assert 1.75 * size / all_reduce_s(a100, size, 8) == pytest.approx(measured, rel=0.15)


def test_an_all_to_all_is_as_slow_as_its_slower_link() -> None:
    assert all_to_all_s(PLAIN, 8 * GB, 8) == pytest.approx(7 / 8 * 8 / 200)
    assert all_to_all_s(PLAIN, 8 * GB, 16) == pytest.approx(8 / 16 * 8 / 10)
    assert all_to_all_s(PLAIN, 8 * GB, 16, copies=0.25) == pytest.approx(0.25 * 8 / 16 * 8 / 10)


def test_messages_take_the_link_that_they_cross() -> None:
    network = Network(intra=Link(200 * GB, 1e-6), inter=Link(10 * GB, 5e-6), domain=8)
    assert send_s(network, GB, crosses=False) == pytest.approx(1 / 200 + 1e-6)
    assert send_s(network, GB, crosses=True) == pytest.approx(1 / 10 + 5e-6)


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_more_ranks_never_gather_faster(stride: int) -> None:
    network = Network(intra=Link(200 * GB, 2e-6), inter=Link(10 * GB, 5e-6), domain=8, start_s=5e-5)
    times = [gather_s(network, GB, ranks, stride) for ranks in (1, 2, 3, 4, 8, 16, 64, 512)]
    assert times == sorted(times)

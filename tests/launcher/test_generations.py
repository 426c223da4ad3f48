"""Which generation in memory a gang goes on from: cases, and a search for a state in which the choice is wrong."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from jobs.checkpoint.fence import Branch
from jobs.checkpoint.layout import Token
from jobs.checkpoint.memory import Address, Generation, Holding
from launcher.generations import Stock, choose
from strategies.schedule import Skip


def stock(node: str, parts: Iterable[Holding]) -> Stock:
    return Stock(node=node, address=Address(host=node, port=1, incarnation=node), held=tuple(parts))


def part(step: int, rank: int, *, world: int = 2, attempt: int = 1, own: bool = True, epoch: int = 1) -> Holding:
    return Holding(step=step, epoch=epoch, attempt=attempt, rank=rank, world=world, bytes=12, own=own)


def chosen(
    *stocks: Stock, disk: Generation | None = None, branch: Branch | None = None, rejected: Iterable[str] = ()
) -> object:
    point = choose(stocks, beyond=disk, branch=branch, skips=(), rejected=set(rejected))
    return point and (point.generation.step, point.generation.token.attempt, [one.node for one in point.parts])


def test_the_newest_that_is_complete_wins() -> None:
    a = stock("a", [part(5, 0), part(6, 0), part(7, 0)])
    b = stock("b", [part(5, 1), part(6, 1)])
    assert chosen(a, b) == (6, 1, ["a", "b"])
    assert chosen(a) is None


def test_a_replica_stands_in_for_a_lost_node_and_only_for_that() -> None:
    a = stock("a", [part(5, 0), part(5, 1, own=False)])
    assert chosen(a) == (5, 1, ["a", "a"])
    assert chosen(a, stock("b", [part(5, 1)])) == (5, 1, ["a", "b"])


def test_all_who_hold_a_part_are_known() -> None:
    a = stock("a", [part(5, 0), part(5, 1, own=False)])
    point = choose([a, stock("b", [part(5, 1)])], beyond=None, branch=None, skips=(), rejected=())
    assert point is not None
    assert [[node for node, _ in one.holders] for one in point.parts] == [["a"], ["b", "a"]]


def test_the_disk_wins_unless_memory_is_newer() -> None:
    a = stock("a", [part(5, 0, world=1)])
    assert chosen(a, disk=Generation(5, Token(1, 1))) is None
    assert chosen(a, disk=Generation(4, Token(1, 1))) == (5, 1, ["a"])


def test_a_node_that_comes_back_does_not_win_over_a_newer_gang() -> None:
    back = stock("old", [part(9, 0, world=1, attempt=1)])
    now = stock("new", [part(7, 0, world=1, attempt=2)])
    assert chosen(back, now) == (7, 2, ["new"])
    assert chosen(back, disk=Generation(7, Token(1, 2))) is None
    began_from_8 = Branch(epoch=1, attempt=2, history=((8, 1, 1),))
    assert chosen(back, branch=began_from_8) is None
    assert chosen(stock("old", [part(8, 0, world=1), part(9, 0, world=1)]), branch=began_from_8) == (8, 1, ["old"])


def test_the_youngest_gang_wins_over_more_steps_on_disk() -> None:
    """What an older gang has on disk beyond the state that this one began with is of another history."""
    now = stock("new", [part(96, 0, world=1, attempt=2)])
    assert chosen(now, disk=Generation(100, Token(1, 1))) == (96, 2, ["new"])


def test_an_earlier_epoch_counts_as_long_as_it_is_the_newest() -> None:
    a = stock("a", [part(8, 0, world=1, epoch=1, attempt=1)])
    b = stock("b", [part(3, 0, world=1, epoch=2, attempt=2)])
    assert chosen(a) == (8, 1, ["a"])
    assert chosen(a, b) == (3, 2, ["b"])


def test_what_failed_to_restore_is_not_tried_again() -> None:
    a = stock("a", [part(5, 0, world=1), part(6, 0, world=1)])
    assert chosen(a, rejected=[str(Generation(6, Token(1, 1)))]) == (5, 1, ["a"])


@pytest.mark.parametrize(("recorded", "usable"), [((), False), (((4, 2),), True), (((4, 3),), False)])
def test_other_samples_left_out_are_another_history(recorded: tuple[tuple[int, int], ...], usable: bool) -> None:
    held = Holding(step=5, epoch=1, attempt=1, rank=0, world=1, bytes=12, own=True, skips=recorded)
    skips = (Skip(step=4, samples=2), Skip(step=6, samples=1))  # the second one is still to come
    point = choose([stock("a", [held])], beyond=None, branch=None, skips=skips, rejected=())
    assert (point is not None) is usable


@pytest.mark.parametrize("seed", range(200))
def test_no_better_generation_is_ever_missed(seed: int) -> None:
    """Random histories, nodes that are lost and nodes that come back, against the definition spelled out."""
    rng = random.Random(seed)
    world, nodes = rng.randint(1, 4), [f"n{number}" for number in range(rng.randint(1, 4))]
    held: dict[str, list[Holding]] = {node: [] for node in nodes}
    for attempt in range(1, rng.randint(2, 4)):
        for step in range(attempt, attempt + 4):
            for rank in range(world):
                for node in rng.sample(nodes, rng.randint(0, min(2, len(nodes)))):
                    own = rng.random() < 0.5
                    held[node].append(part(step, rank, world=world, attempt=attempt, own=own))
    alive = rng.sample(nodes, rng.randint(0, len(nodes)))
    disk = rng.choice([None, Generation(rng.randint(1, 6), Token(1, rng.randint(1, 2)))])
    last = rng.randint(0, 6)
    branch = rng.choice([None, Branch(epoch=1, attempt=2, history=((last, 1, 1),))])
    point = choose([stock(n, held[n]) for n in alive], beyond=disk, branch=branch, skips=(), rejected=())

    there: dict[tuple[Token, int], set[int]] = {}
    for node in alive:
        for one in held[node]:
            there.setdefault((one.generation.token, one.step), set()).add(one.rank)
    complete = [
        (token, step)
        for (token, step), ranks in there.items()
        if ranks == set(range(world))
        and (disk is None or (token, step) > (disk.token, disk.step))
        and (branch is None or token.attempt >= 2 or step <= last)
    ]
    assert (point and (point.generation.token, point.step)) == max(complete, default=None)
    if point is not None:
        for rank, located in enumerate(point.parts):
            assert located.node in alive
            assert any(one.generation == point.generation and one.rank == rank for one in held[located.node])

"""The order of samples: a bijection per epoch, different per epoch and seed, and nothing else goes into it."""

from __future__ import annotations

import itertools

import pytest

from jobs.data.order import Permutation, SampleOrder


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4096, 4097])
def test_permutation_is_a_bijection(size: int) -> None:
    permute = Permutation(size, b"key")
    assert sorted(permute(position) for position in range(size)) == list(range(size))


def test_permutation_mixes() -> None:
    permute = Permutation(1000, b"key")
    images = [permute(position) for position in range(1000)]
    assert sum(image == position for position, image in enumerate(images)) < 10
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(images))
    assert neighbours < 15


def test_permutation_refuses_what_is_outside() -> None:
    with pytest.raises(IndexError, match=r"position 5 is outside range\(5\)"):
        Permutation(5, b"key")(5)


def test_keys_give_different_permutations() -> None:
    first, second = Permutation(100, b"a"), Permutation(100, b"b")
    assert [first(i) for i in range(100)] != [second(i) for i in range(100)]


def test_every_epoch_holds_every_window_once_in_another_order() -> None:
    order = SampleOrder(windows=37, seed=1)
    epochs = [[order.locate(epoch * 37 + i) for i in range(37)] for epoch in range(3)]
    for number, located in enumerate(epochs):
        assert {epoch for epoch, _ in located} == {number}
        assert sorted(window for _, window in located) == list(range(37))
    assert epochs[0] != epochs[1]
    assert [w for _, w in epochs[0]] != [w for _, w in epochs[1]] != [w for _, w in epochs[2]]


def test_seeds_give_different_orders() -> None:
    first, second = (SampleOrder(windows=50, seed=seed) for seed in (0, 1))
    assert [first.locate(i) for i in range(50)] != [second.locate(i) for i in range(50)]


def test_the_order_is_frozen() -> None:
    """Runs of earlier versions must be resumable: a change of these numbers changes every run."""
    order = SampleOrder(windows=83363, seed=0)
    assert [order.locate(i)[1] for i in (0, 1, 2, 10**6, 10**12)] == [23322, 13249, 13540, 23290, 74488]

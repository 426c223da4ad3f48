"""The order of a mixture: exact counts over every prefix, a closed form that agrees with counting; shares."""

from __future__ import annotations

import itertools
import random

import pytest

from jobs.data.mixture import SHARES, Interleaving, form_problems, shares
from jobs.spec import SourceSpec

KINDS = ("auto", "text", "jsonl", "stdlib")
GPT3 = (60, 22, 8, 8, 2)  # the mixture of Brown et al., table 2.2, with Wikipedia at 2 so that it sums to 100
WEIGHTS = [(1,), (1, 1), (1, 2, 3), GPT3, (1, 1000), (0, 5, 0, 3), tuple(range(1, 18)), (SHARES - 1, 1)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_closed_form_is_what_counting_gives(weights: tuple[int, ...]) -> None:
    order = Interleaving(weights)
    seen = [0] * len(weights)
    for index in range(3000):
        assert order.counts(index) == seen
        source, before = order.locate(index)
        assert before == seen[source]
        seen[source] += 1


@pytest.mark.parametrize("weights", [*WEIGHTS, *(tuple(random.Random(n).choices(range(50), k=n)) for n in (9, 33))])
def test_no_prefix_is_further_from_its_weights_than_one_and_a_half(weights: tuple[int, ...]) -> None:
    order, total = Interleaving(weights), sum(weights)
    for index in [*range(2000), *(10**k + k for k in range(4, 16))]:
        for weight, count in zip(weights, order.counts(index), strict=True):
            assert abs(count - index * weight / total) < 1.5


def test_a_whole_turn_has_exactly_the_weights() -> None:
    for turns in (1, 2, 7):
        assert Interleaving(GPT3).counts(100 * turns) == [weight * turns for weight in GPT3]


def test_far_positions_are_found_as_fast_as_near_ones() -> None:
    """Seek is a walk of the tree: no more steps at 10**15 than at 0."""
    order = Interleaving(tuple(range(1, 18)))
    steps = 0
    plain = type(order._root).first

    def counted(self: object, count: int) -> int:
        nonlocal steps
        steps += 1
        return plain(self, count)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(order._root), "first", counted)
        for index in (0, 10**15):
            steps = 0
            source, before = order.locate(index)
            assert steps <= 2 * 17
            assert order.counts(index)[source] == before


def test_sources_take_turns() -> None:
    found = [Interleaving((1, 1)).locate(index)[0] for index in range(8)]
    assert all(a != b for a, b in itertools.pairwise(found))


def test_how_far_validation_reaches_without_repeating() -> None:
    for weights in WEIGHTS:
        for windows in ([30] * len(weights), [1000, *([2] * (len(weights) - 1))], [1] * len(weights)):
            order, reach = Interleaving(weights), 0
            while all(count <= number for count, number in zip(order.counts(reach + 1), windows, strict=True)):
                reach += 1
            assert order.until_repeated(windows) == reach >= 1, (weights, windows)
    assert Interleaving((99, 1)).until_repeated((1000, 2)) == 250


def source(**fields: object) -> SourceSpec:
    return SourceSpec(**({"path": "x", "name": "x"} | fields))  # type: ignore[arg-type]


def test_shares_of_weights_and_epochs() -> None:
    found, problem = shares([source(weight=3), source(weight=1)], [10, 10], 100)
    assert (found, problem) == ([SHARES * 3 // 4, SHARES // 4], "")
    found, problem = shares([source(weight=3), source(weight=1), source(epochs=3.4)], [10, 10, 10], 100)
    assert sum(found) == SHARES
    assert Interleaving(found).counts(100) == [50, 16, 34] or Interleaving(found).counts(100) == [49, 17, 34]
    found, _ = shares([source(epochs=1), source(epochs=3)], [30, 10], 10**6)
    assert found == [SHARES // 2, SHARES // 2]


def test_epochs_that_leave_nothing() -> None:
    found, problem = shares([source(weight=1), source(name="wiki", epochs=3.4)], [10, 100], 340)
    assert not found
    assert "340 samples (wiki 3.4 x 100), the run has 340" in problem


def test_every_problem_of_the_form_at_once() -> None:
    sources = [
        source(name="a", weight=-1),
        source(name="b", kind="jsnl", weight=1),
        source(name="b", weight=1, epochs=2),
        source(name="c", path="", kind="text"),
        source(name="d", path="", kind="stdlib", epochs=float("nan")),
    ]
    found = form_problems(sources, KINDS)
    assert [(number, key) for number, key, *_ in found] == [
        (0, "weight"),
        (1, "kind"),
        (2, "name"),
        (2, "weight"),
        (3, "path"),
        (3, "weight"),
        (4, "epochs"),
    ]
    assert "Did you mean 'jsonl'" in found[1][3]


def test_weights_that_are_all_zero() -> None:
    assert [one[2] for one in form_problems([source(weight=0), source(name="y", epochs=0)], KINDS)] == [
        "all weights are zero"
    ]

"""How often the state is copied: as often as was asked for, unless that costs too much."""

from __future__ import annotations

import itertools

import pytest

from jobs.checkpoint.frequency import Frequency, Price


def after(
    one: Frequency,
    *,
    steps: int,
    step_s: float,
    stall_s: float,
    toil_s: float = 0.0,
    first: int = 1,
    stop_s: float = 0.0,
    agreed: list[int] | None = None,
) -> list[int]:
    """Train, with a stop in every seventh step; the steps after which a copy was made. ``agreed``: those of a look."""
    now_s, copied, pending = 0.0, [], False
    for step in range(first, first + steps):
        now_s += step_s + (stall_s if pending else 0.0) + (0.0 if step % 7 else stop_s)
        if pending:
            one.stalled(stall_s)
            one.toiled(toil_s)
        one.passed(step, now_s)
        pending = one.due(step)
        if pending:
            copied.append(step)
            price = one.price(step)
            if price is not None and one.adapts:
                one.reconsider(price)
                if agreed is not None:
                    agreed.append(step)
    return copied


def test_a_long_step_is_copied_every_time() -> None:
    one = Frequency(every=1, share=0.01)
    assert after(one, steps=50, step_s=10.0, stall_s=0.05, toil_s=0.04) == list(range(1, 51))
    assert one.now == 1


@pytest.mark.parametrize(("stall_s", "toil_s"), [(0.01, 0.0), (0.0, 0.01), (0.006, 0.004)])
def test_copies_take_no_more_than_their_share(stall_s: float, toil_s: float) -> None:
    one = Frequency(every=1, share=0.01)
    copied = after(one, steps=400, step_s=0.1, stall_s=stall_s, toil_s=toil_s)
    assert one.now == 16, "0.01 s of 10 steps of 0.1 s each"
    late = [step for step in copied if step > 100]
    assert [b - a for a, b in itertools.pairwise(late)] == [16] * (len(late) - 1)
    assert len(late) * (stall_s + toil_s) <= 0.01 * 300 * 0.1
    assert after(one, first=401, steps=600, step_s=2.0, stall_s=stall_s, toil_s=toil_s)[-3:] == [998, 999, 1000]


def test_whatever_it_costs() -> None:
    one = Frequency(every=2, share=0.0)
    assert not one.adapts
    assert after(one, steps=10, step_s=0.1, stall_s=5.0) == [2, 4, 6, 8, 10]
    assert not Frequency(every=0, share=0.01).due(4)


def test_it_is_never_more_seldom_than_the_disk() -> None:
    one = Frequency(every=1, share=0.01, most=20)
    after(one, steps=3000, step_s=0.1, stall_s=100.0)
    assert one.now == 16
    assert Frequency(every=50, share=0.01, most=20).due(50)


def test_one_copy_that_was_held_up_changes_nothing_for_long() -> None:
    one = Frequency(every=1, share=0.01)
    after(one, steps=20, step_s=1.0, stall_s=0.001)
    one.stalled(30.0)
    assert len(after(one, first=21, steps=20, step_s=1.0, stall_s=0.001)) == 20


@pytest.mark.parametrize("stop_s", [0.0, 2.0])
def test_steps_in_which_everything_stood_still_make_no_copy_cheaper(stop_s: float) -> None:
    one = Frequency(every=1, share=0.01)
    copied = after(one, steps=400, step_s=0.3, stall_s=0.02, stop_s=stop_s)
    assert [step for step in copied if step > 100] == list(range(104, 401, 8))


def test_ranks_agree_seldom_while_nothing_changes_and_at_once_when_it_does() -> None:
    one, agreed = Frequency(every=1, share=0.01), list[int]()
    assert len(after(one, steps=1000, step_s=10.0, stall_s=0.05, agreed=agreed)) == 1000
    assert len(agreed) == 200
    agreed.clear()
    copied = after(one, steps=1000, step_s=0.01, stall_s=0.05, first=1001, agreed=agreed)
    assert one.now == 512, "every copy of the change had a look of its own"
    assert sum(0.05 for step in copied if step > 1200) <= 0.01 * 800 * 0.01 + 0.05
    assert len(agreed) < len(copied)


def test_people_are_told_once_what_a_failure_may_cost() -> None:
    one = Frequency(every=1, share=0.01)
    told = [one.reconsider(Price(0.02, 1.0)) for _ in range(4)]
    told += [one.reconsider(Price(0.001, 1.0)), one.reconsider(Price(0.02, 1.0))]
    assert [bool(word) for word in told] == [True, False, False, False, False, False]
    assert "every 2 steps, so a failure may cost as many: a copy costs 0.02 s, a step takes 1 s" in told[0]
    assert "1.0% of the time (checkpoint.memory_share" in told[0]

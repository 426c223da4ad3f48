"""How long a rank takes to build its engine, by part: on a clock of its own. Real ranks: tests/e2e/test_engine.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jobs.build_time import BuildTime
from jobs.own_time import FUNCTIONS

WATCHED = ("new_group", "new_subgroups_by_enumeration", *FUNCTIONS)


class Clock:
    """Passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock, by which every function of :mod:`torch.distributed` that is watched takes a second."""
    clock = Clock()

    def taking(seconds: float) -> Callable[..., None]:
        return lambda *arguments, **options: clock.pass_by(seconds)

    for name in WATCHED:
        monkeypatch.setattr(dist, name, taking(1.0))
    return clock


def test_parts_are_what_they_say_and_sum_to_the_whole(clock: Clock) -> None:
    took = BuildTime(clock)
    clock.pass_by(0.5)
    with took.taking_device():
        clock.pass_by(4.0)
    clock.pass_by(0.25)
    with took.meeting():
        clock.pass_by(2.0)
        with took.meeting():
            clock.pass_by(8.0)
    clock.pass_by(0.125)
    assert took.end() == {"device_s": 4.0, "communicators_s": 10.0, "engine_s": 0.875}


@pytest.mark.parametrize(("lazy", "seen_s"), [(False, 2.0), (True, 4.0)])
def test_groups_count_and_first_collectives_where_they_connect(clock: Clock, lazy: bool, seen_s: float) -> None:
    """Of three collectives of all ranks, said and unsaid, the first; and of another group the first of two."""
    took = BuildTime(clock)
    other, tensor = Group(), torch.zeros(1)
    with took.watching(lazy=lazy):
        dist.new_group([0])
        dist.new_subgroups_by_enumeration([[0]])  # type: ignore[no-untyped-call]
        dist.barrier()
        dist.all_reduce(tensor, group=None)
        dist.broadcast(tensor, 0)
        dist.broadcast(tensor, 0, other)
        dist.all_reduce(tensor, group=other)
    assert took.end() == {"device_s": 0.0, "communicators_s": seen_s, "engine_s": 7.0 - seen_s}


class Group(dist.ProcessGroup):
    """A group that is only named."""

    def __init__(self) -> None:
        super().__init__(0, 1)  # type: ignore[call-arg]  # of one rank, without a store

    @property
    def group_name(self) -> Any:
        """Of no other group."""
        return "other"


def test_nothing_is_watched_afterwards(clock: Clock) -> None:
    """Nor after an error; and who has kept a function makes it no slower and nothing longer."""
    before = {name: getattr(dist, name) for name in WATCHED}
    took, kept = BuildTime(clock), []

    def fail() -> None:
        assert all(getattr(dist, name) is not function for name, function in before.items())
        kept.append(dist.barrier)
        dist.barrier()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), took.watching(lazy=True):
        fail()
    assert {name: getattr(dist, name) for name in WATCHED} == before
    kept[0]()
    assert took.end() == {"device_s": 0.0, "communicators_s": 1.0, "engine_s": 1.0}


def test_an_error_ends_a_part(clock: Clock) -> None:
    def fail() -> None:
        clock.pass_by(1.0)
        raise RuntimeError("no")

    took = BuildTime(clock)
    for part in (took.taking_device, took.meeting, took.meeting):
        with pytest.raises(RuntimeError, match="no"), part():
            fail()
    assert took.end() == {"device_s": 1.0, "communicators_s": 2.0, "engine_s": 0.0}

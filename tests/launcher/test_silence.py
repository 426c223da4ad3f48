"""Who is silent for too long, on a clock that is moved by hand: agents beat every 1.25 s, 4 s are too long."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from launcher.silence import Silence

BEAT_S, DETECT_S, PATIENCE_S = 1.25, 5.0, 60.0
LATE_S = 4.0
TICK_S = 0.05


@dataclass(eq=False)
class Node:
    name: str
    phase_s: float  # its first beat
    up: bool = True
    cut: tuple[float, float] = (float("inf"), float("inf"))  # nothing is heard of it from ... until before ...

    def beats(self, since: float, until: float) -> bool:
        """Whether one of its beats is heard in (since, until]."""
        times = (self.phase_s + BEAT_S * count for count in range(400))
        heard = (time for time in times if not self.cut[0] <= time < self.cut[1])
        return self.up and any(since < time <= until for time in heard)


class World:
    """Nodes that beat, and somebody who listens to them and looks twenty times a second."""

    def __init__(self, *nodes: Node, patience_s: float = PATIENCE_S) -> None:
        self.now = 0.0
        self.nodes = nodes
        self.silence: Silence[Node] = Silence(detect_s=DETECT_S, beat_s=BEAT_S, patience_s=patience_s, now=0.0)
        self.lost: dict[str, float] = {}
        self.cut_off: list[float] = []
        for node in nodes:
            self.silence.add(node)

    def run(self, until: float, step_s: float = TICK_S) -> None:
        """Listen and look until then."""
        while self.now < until:
            before, self.now = self.now, self.now + step_s
            for node in self.nodes:
                if node.name not in self.lost and node.beats(before, self.now):
                    self.silence.heard(node)
            was = self.silence.cut_off
            for late in self.silence.late(self.now):
                self.lost[late.name] = self.now
                self.silence.remove(late)
            if self.silence.cut_off and not was:
                self.cut_off.append(self.now)


def nodes(count: int, cut: tuple[float, float], of: range) -> list[Node]:
    return [Node(f"n{at}", 0.3 * at, cut=cut if at in of else (1e9, 1e9)) for at in range(count)]


@pytest.mark.parametrize("dead", [1, 2, 3])
def test_some_are_lost_in_time_while_one_is_heard(dead: int) -> None:
    world = World(*nodes(4, (10.0, 1e9), range(dead)))
    world.run(30.0)
    assert sorted(world.lost) == [f"n{at}" for at in range(dead)]
    assert all(10.0 < when <= 10.0 + LATE_S + 2 * TICK_S for when in world.lost.values())
    assert world.cut_off == []


@pytest.mark.parametrize("cut_s", [5.0, 20.0, 55.0])
@pytest.mark.parametrize("count", [2, 5])
def test_when_nobody_is_heard_all_are_waited_for(count: int, cut_s: float) -> None:
    world = World(*nodes(count, (10.0, 10.0 + cut_s), range(count)))
    world.run(200.0)
    assert world.lost == {}
    assert len(world.cut_off) == 1
    assert 10.0 < world.cut_off[0] <= 10.0 + LATE_S + 2 * TICK_S
    assert not world.silence.cut_off


def test_that_has_an_end() -> None:
    world = World(*nodes(3, (10.0, 1e9), range(3)))
    world.run(10.0 + PATIENCE_S)
    assert world.lost == {}
    world.run(10.0 + PATIENCE_S + 2 * LATE_S)
    assert sorted(world.lost) == ["n0", "n1", "n2"]
    assert len(world.cut_off) == 1


def test_others_may_be_heard_as_much_later_as_they_were_cut_off() -> None:
    """TCP tries again the later, the longer it has tried."""
    first, second, dead = nodes(3, (10.0, 30.0), range(3))
    second.cut, dead.cut = (10.0, 45.0), (10.0, 1e9)
    world = World(first, second, dead)
    world.run(200.0)
    assert list(world.lost) == ["n2"]
    assert 45.0 < world.lost["n2"] < 30.0 + (30.0 - 10.0) + LATE_S + 1.0


def test_after_that_one_is_lost_in_time_again() -> None:
    one, two, three = nodes(3, (10.0, 20.0), range(3))
    world = World(one, two, three)
    world.run(60.0)
    one.cut = (60.0, 1e9)
    world.run(80.0)
    assert list(world.lost) == ["n0"]
    assert world.lost["n0"] <= 60.0 + LATE_S + 2 * TICK_S


def test_a_node_that_is_alone_is_lost_in_time() -> None:
    """Nothing tells its end from a cut here, and there is nobody to train on."""
    world = World(*nodes(1, (10.0, 1e9), range(1)))
    world.run(20.0)
    assert list(world.lost) == ["n0"]


def test_one_that_never_answered_says_nothing_about_our_link() -> None:
    never = Node("never", 0.0, up=False)
    world = World(*nodes(1, (10.0, 1e9), range(1)), never)
    world.run(20.0)
    assert sorted(world.lost) == ["n0", "never"]
    assert world.cut_off == []


def test_our_own_pause_is_nobodys_silence() -> None:
    world = World(*nodes(2, (10.0, 1e9), range(1)))
    world.run(11.0)
    world.now += 100.0  # stopped
    world.run(world.now + 0.4)
    assert world.lost == {}
    world.run(world.now + LATE_S)
    assert list(world.lost) == ["n0"]


def test_without_patience_nobody_is_waited_for() -> None:
    world = World(*nodes(2, (10.0, 1e9), range(2)), patience_s=0.0)
    world.run(20.0)
    assert sorted(world.lost) == ["n0", "n1"]

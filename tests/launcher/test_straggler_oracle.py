"""The quick judgement of tens of thousands of ranks is that of a plain one, which looks at one rank after the other."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from statistics import median

import pytest

from launcher.straggler import (
    AGREED,
    ALIKE,
    CLEARLY,
    LASTING,
    LEARNED,
    MATTERS,
    MOST,
    NOISE,
    SLOW,
    WARM_UP,
    WINDOW,
    Pace,
    Slow,
    peers_of,
)
from tests.launcher.test_straggler import nodes_of, plan_of

AROUND, BLOCKS, SETTLED, QUIET, FEW = 9, 7, 3, 6, 8


class PlainRank:
    """The ratios of one rank against somebody or something."""

    def __init__(self) -> None:
        self.ratios: list[float] = []
        self.medians: list[float] = []
        self.level = 1.0

    @property
    def above(self) -> int:
        return sum(ratio > CLEARLY for ratio in self.ratios[-WINDOW:])

    def verdict(self, slow: float) -> float:
        if self.above < MOST:
            return 0.0
        found = median(self.ratios[-WINDOW:])
        return found if found > slow else 0.0

    def off(self) -> float | None:
        self.medians = [*self.medians, median(self.ratios[-WINDOW:])][-AROUND:]
        if len(self.medians) < 3:
            return None
        usual = median(self.medians)
        self.level = min(max(1.0, usual - ALIKE), usual + ALIKE)
        return self.medians[len(self.medians) // 2] - self.level


class PlainPace:
    """What :class:`launcher.straggler.Pace` promises, rank by rank, and every median from the whole list."""

    def __init__(self, peers: Sequence[Sequence[int]]) -> None:
        self.peers, self.seen, self.named = peers, 0, set[int]()
        self.by_peers, self.by_past = [PlainRank() for _ in peers], [PlainRank() for _ in peers]
        self.learned: list[Sequence[float]] = []
        self.usual: list[float] = []
        self.noise: list[float] = []
        self.older: list[float] = []
        self.deviation = self.lasting = 0.0
        self.worst: list[float] = []

    def note(self, step: int, own_s: Sequence[float], step_s: float) -> list[Slow]:
        self.seen += 1
        if self.seen <= WARM_UP or min(own_s) <= 0:
            return []
        compared = [rank for rank, peers in enumerate(self.peers) if peers]
        for rank in compared:
            self.by_peers[rank].ratios.append(own_s[rank] / median(own_s[peer] for peer in self.peers[rank]))
        if compared:
            self._learn_noise([self.by_peers[rank] for rank in compared])
        self._compare_with_past(own_s, bool(compared))
        if self.seen % WINDOW == 0:
            self._learn_windows()
        return [slow for rank in range(len(own_s)) if (slow := self._judge(rank, step, own_s[rank], step_s))]

    def _compare_with_past(self, own_s: Sequence[float], compared: bool) -> None:
        usual = self.usual
        if not self.named and len(self.learned) < BLOCKS * LEARNED:
            self.learned.append(own_s)
            blocks = [self.learned[at : at + LEARNED] for at in range(0, len(self.learned), LEARNED)]
            if len(blocks[-1]) == LEARNED:
                of_blocks = [[median(times) for times in zip(*block, strict=True)] for block in blocks]
                self.usual = [median(times) for times in zip(*of_blocks, strict=True)]
        if not usual:
            return
        drift = [own / before for own, before in zip(own_s, usual, strict=True)]
        common = median(drift)
        for rank, one in enumerate(drift):
            others = common if len(drift) > FEW else median(drift[:rank] + drift[rank + 1 :] or [one])
            self.by_past[rank].ratios.append(one / others)
        if not compared:
            self._learn_noise(self.by_past, [one / common for one in drift])

    def _learn_noise(self, ranks: Sequence[PlainRank], ratios: Sequence[float] = ()) -> None:
        pairs = zip(ratios or [rank.ratios[-1] for rank in ranks], ranks, strict=True)
        self.noise.append(median(abs(ratio - rank.level) for ratio, rank in pairs))
        if len(self.noise) == 3 * WINDOW:
            self.older = [*self.older, *self.noise[:WINDOW]][-20 * WINDOW :]
            self.noise = self.noise[WINDOW:]
            self.deviation = median(self.older)

    def _learn_windows(self) -> None:
        found = []
        for ranks, (rank, _) in itertools.product((self.by_peers, self.by_past), enumerate(self.peers)):
            one = ranks[rank]
            if rank not in self.named and len(one.ratios) >= WINDOW and not one.verdict(SLOW):
                found.append(one.off())
        if known := [off for off in found if off is not None]:
            self.worst = [*self.worst, max(known)][-64:]
        if known and len(self.worst) >= QUIET:
            self.lasting = 1 + LASTING * sorted(self.worst)[math.ceil(0.95 * len(self.worst)) - 1]

    def _judge(self, rank: int, step: int, own_s: float, step_s: float) -> Slow | None:
        both = self.by_peers[rank], self.by_past[rank]
        limit = max(SLOW, 1 + NOISE * self.deviation, self.lasting)
        ratio = max(one.verdict(limit) for one in both)
        settled = len(self.learned) >= SETTLED * LEARNED
        if ratio and settled and median(both[1].ratios[-WINDOW:]) < AGREED:
            ratio = 0.0
        if not ratio and all(one.above * 2 < WINDOW for one in both):
            self.named.discard(rank)
        if not ratio or rank in self.named or own_s * (1 - 1 / ratio) <= MATTERS * step_s:
            return None
        self.named.add(rank)
        return Slow(rank=rank, ratio=ratio, step=step)


def peers_with_gaps() -> list[tuple[int, ...]]:
    """Groups of several sizes, ranks without peers, and ranks of unequal nodes."""
    plan = plan_of(2, 3, 3)
    uneven = {rank: f"n{(rank * rank) // 40}" for rank in range(plan.world_size)}
    return [() if rank in (4, 9) else peers for rank, peers in enumerate(peers_of(plan, uneven))]


PEERS = {
    "two": peers_of(plan_of(1, 1, 2), nodes_of(2, 1)),
    "one node": peers_of(plan_of(8, 1, 1), nodes_of(8, 8)),
    "no peers": peers_of(plan_of(1, 4, 1), nodes_of(4, 1)),
    "no peers, many": peers_of(plan_of(1, 10, 1), nodes_of(10, 1)),
    "stages": peers_of(plan_of(2, 3, 4), nodes_of(24, 4)),
    "gaps": peers_with_gaps(),
    "any": [(1, 2), (0, 2), (0, 1), (0, 1, 2, 4), (1, 2)],
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", PEERS)
def test_it_says_the_same_to_the_last_verdict(shape: str, seed: int) -> None:
    """Ranks are slow for a while, others always a little; some times are equal, and now and then one is missing."""
    draw, peers = random.Random(f"{shape}/{seed}"), PEERS[shape]
    quick, plain = Pace(peers), PlainPace(peers)
    usual = [draw.uniform(0.5, 0.6) for _ in peers]
    slow: dict[int, tuple[int, float]] = {}
    found: list[Slow] = []
    for step in range(1, 700):
        if draw.random() < 0.03:
            slow[draw.randrange(len(peers))] = step + draw.randrange(10, 80), draw.uniform(1.1, 1.6)
        slow = {rank: (until, by) for rank, (until, by) in slow.items() if until >= step}
        own = [one * draw.lognormvariate(0, 0.04) * slow.get(rank, (0, 1.0))[1] for rank, one in enumerate(usual)]
        own = [round(one, draw.choice((1, 6))) for one in own] if seed else own
        own[0] *= draw.random() > 0.005
        step_s = draw.uniform(0.5, 2.0)
        says = quick.note(step, own, step_s)
        found += says
        assert says == plain.note(step, own, step_s), step
    assert found or shape == "no peers"

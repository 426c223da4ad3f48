"""How the log names the nodes of a gang."""

from __future__ import annotations

import random

from launcher import roster

NODES = [f"node-{i:04d}" for i in range(200)]


def test_the_first_gang_is_written_out_and_a_later_one_by_what_changed() -> None:
    assert roster.fields((), NODES) == {"nodes": NODES}
    after = [*NODES[:7], "spare-1", *NODES[8:]]
    assert roster.fields(NODES, after) == {"moved": {"7": "spare-1"}}
    assert roster.fields(after, after) == {"moved": {}}


def test_small_gangs_and_gangs_of_another_size_are_written_out() -> None:
    assert roster.fields(NODES[:8], NODES[:8]) == {"nodes": NODES[:8]}
    assert roster.fields(NODES, NODES[:-1]) == {"nodes": NODES[:-1]}
    assert roster.fields(NODES, NODES[::-1]) == {"nodes": NODES[::-1]}


def test_what_was_recorded_is_read_back_whatever_moved() -> None:
    rng, before, read = random.Random(0), NODES, tuple(NODES)
    for turn in range(200):
        after = list(before)
        for place in rng.sample(range(len(after)), rng.randrange(len(after) * 2 // 3)):
            after[place] = f"node-{turn}-{place}"
        if not turn % 50:
            after = NODES[: rng.randrange(60, 200)]
        read = roster.read(read, roster.fields(before, after))
        assert read == tuple(after)
        before = after

"""Incremental checkpoints on their whole way: what a rank says of the last one reaches those who write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.checkpoint import verify
from jobs.checkpoint.manifest import Origin
from jobs.checkpoint.reader import Reader
from tests.support.persisters import Node, gang


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Node]]:
    nodes = [Node(tmp_path, name) for name in ("a", "b")]
    yield nodes
    for one in nodes:
        one.close()


def test_what_has_not_changed_is_not_written_again(two: list[Node]) -> None:
    """One rank holds what it held, the other trains on: the second checkpoint writes the share of the other alone."""
    ranks = gang(two, elements=20_000)
    for rank in ranks:
        rank.keep(1, 7.0)
    done = ranks[0].outcome(1)
    for rank, value in zip(ranks, (7.0, 8.0), strict=True):
        rank.keep(2, value, base=done["path"])
    again = ranks[0].outcome(2)
    frozen, trained = (shard for shard in Reader(again["path"]).manifest.shards)
    first = Reader(done["path"]).manifest.shards
    origin = Origin(step=1, epoch=1, attempt=1, rank=0, bytes=first[0].bytes, digest=first[0].digest)
    assert (frozen.origin, trained.origin) == (origin, None)
    assert done["written_bytes"] == done["bytes"] == sum(shard.bytes for shard in first) > 20_000 * 12
    assert frozen.bytes < 2000, "what it says of itself"
    assert again["written_bytes"] == frozen.bytes + trained.bytes
    assert again["bytes"] == frozen.bytes + first[0].bytes + trained.bytes
    assert verify(again["path"], deep=True) == []
    read = Reader(again["path"]).read_flat("w", "master", 0, 20_000).tolist()
    assert read == [7.0] * 10_000 + [8.0] * 10_000

"""What is split along the sequence computes what one rank computes: layers, shared parameters, attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs.distributed import Grid
from tests.support.gang import WarmPool


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_lies_between_tensor_parallel_layers_may_be_split(pool: WarmPool, ranks: int) -> None:
    for found in pool.run("tests.support.parallel_bodies:split_region", world_size=ranks):
        assert all(found.values()), found


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_sees_the_whole_sequence(pool: WarmPool, kv_heads: int) -> None:
    arguments = {"kv_heads": kv_heads}
    for found in pool.run("tests.support.parallel_bodies:sequence_ranks", world_size=4, arguments=arguments):
        assert all(found.values()), found


def test_a_document_over_several_ranks_has_the_room_of_one(pool: WarmPool) -> None:
    for found in pool.run("tests.support.parallel_bodies:room_of_documents", world_size=4):
        assert all(found.values()), found


def test_every_token_is_on_one_rank() -> None:
    parts = [Grid(seq=seq, sp=2, model=model, tp=2, split=True) for seq in range(2) for model in range(2)]
    assert [part.tokens(16) for part in parts] == [slice(0, 8), slice(0, 8), slice(8, 16), slice(8, 16)]
    assert [part.positions(4) for part in parts] == [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 16)]
    assert [Grid(seq=1, sp=2, model=1, tp=2).positions(8)] == [slice(8, 16)]

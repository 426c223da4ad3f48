"""Vocabulary-parallel embedding and cross entropy, alone and over a real group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from jobs.distributed import Grid
from jobs.models.init import ParameterFactory
from jobs.parallel.vocabulary import IGNORE, VocabParallelEmbedding, vocab_parallel_cross_entropy
from tests.support.gang import WarmPool


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with WarmPool() as warm:
        yield warm


def test_alone_it_is_torch_s_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator) * 10
    targets = torch.randint(0, 11, (2, 5), generator=generator)
    targets[0, 1] = IGNORE
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = vocab_parallel_cross_entropy(ours, targets, vocab=11, rank=0, group=None)
    wanted = F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    assert torch.allclose(loss, wanted, atol=1e-6)
    assert loss[0, 1] == 0
    weights = torch.randn(2, 5, generator=generator)
    torch.autograd.backward((loss * weights).sum())
    torch.autograd.backward((wanted * weights).sum())
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert not ours.grad[0, 1].any()


def test_padding_takes_no_part() -> None:
    logits = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 5, 2]])
    padded = torch.cat([logits, torch.full((1, 3, 2), 100.0)], dim=-1).requires_grad_()
    loss = vocab_parallel_cross_entropy(padded, targets, vocab=8, rank=0, group=None)
    assert torch.equal(loss, vocab_parallel_cross_entropy(logits, targets, vocab=8, rank=0, group=None))
    torch.autograd.backward(loss.sum())
    assert padded.grad is not None
    assert not padded.grad[..., 8:].any()


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[3e4, 0.0, -3e4]]])
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([[2]]), vocab=3, rank=0, group=None)
    assert float(loss) == 6e4


def test_an_embedding_alone_is_a_table() -> None:
    make = ParameterFactory(grid=Grid(), seed=0, std=1.0)
    table = VocabParallelEmbedding(make, "e", 7, 4)
    tokens = torch.tensor([[0, 6, 3]])
    assert torch.equal(table(tokens), table.weight[tokens])


@pytest.mark.parametrize(("world", "vocab"), [(2, 11), (4, 11), (4, 5)], ids=["2x11", "4x11", "4x5-empty-shard"])
def test_over_a_group_it_is_the_same(pool: WarmPool, world: int, vocab: int) -> None:
    ranks = pool.run("tests.support.parallel_bodies:vocabulary", world_size=world, arguments={"vocab": vocab})
    assert ranks == [{"embedding": True, "loss": True, "grad_x": True, "grad_weight": True, "padding": True}] * world


@pytest.mark.parametrize("world", [2, 4])
def test_column_then_row_is_two_plain_layers(pool: WarmPool, world: int) -> None:
    ranks = pool.run("tests.support.parallel_bodies:linears", world_size=world)
    assert ranks == [{"output": True, "grad_x": True, "grad_weights": True, "grad_bias": True}] * world

"""Initial weights: a function of (seed, name), cut into boxes that put together give the whole."""

from __future__ import annotations

import pytest
import torch

from jobs.distributed import Grid
from jobs.models.init import ParameterFactory, box_of, cut, global_value, seed_of
from jobs.parallel.meta import ParamMeta


def test_the_seed_of_a_name_never_changes() -> None:
    """Written down once: another value would start every run elsewhere, and break resuming old ones bit by bit."""
    assert seed_of(0, "blocks.3.attn.q.weight") == 4402014666054185482
    assert seed_of(1, "blocks.3.attn.q.weight") != seed_of(0, "blocks.3.attn.q.weight")


def test_a_value_depends_on_seed_and_name_only() -> None:
    torch.manual_seed(1)
    first = global_value("a", (64, 64), seed=3, mean=0.0, std=0.02)
    torch.manual_seed(2)
    assert torch.equal(first, global_value("a", (64, 64), seed=3, mean=0.0, std=0.02))
    assert not torch.equal(first, global_value("b", (64, 64), seed=3, mean=0.0, std=0.02))
    assert not torch.equal(first, global_value("a", (64, 64), seed=4, mean=0.0, std=0.02))
    assert first.std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("size", "parts"), [(8, 1), (8, 4), (97, 2), (97, 4), (5, 4)])
@pytest.mark.parametrize("axis", [0, 1])
def test_boxes_cover_the_whole_and_padding_is_zero(size: int, parts: int, axis: int) -> None:
    shape = (size, 3) if axis == 0 else (3, size)
    whole = global_value("a", shape, seed=0, mean=1.0, std=0.1)
    pieces = [cut(whole, box_of(shape, axis, rank, parts)) for rank in range(parts)]
    joined = torch.cat(pieces, dim=axis)
    assert torch.equal(joined.narrow(axis, 0, size), whole)
    assert not joined.narrow(axis, size, joined.shape[axis] - size).any()
    assert len({piece.shape for piece in pieces}) == 1


@pytest.mark.parametrize(
    ("axis", "rank", "split", "primary"),
    [(0, 0, True, True), (0, 1, True, True), (None, 0, False, True), (None, 1, False, False)],
)
def test_a_parameter_says_what_it_is(axis: int | None, rank: int, split: bool, primary: bool) -> None:
    make = ParameterFactory(grid=Grid(model=rank, tp=2), seed=0, std=0.02)
    parameter = make.make("x", (4, 6), axis=axis)
    box = ((2 * rank, 2 * rank + 2), (0, 6)) if split else ((0, 4), (0, 6))
    assert vars(parameter)["phalanx"] == ParamMeta(name="x", shape=(4, 6), box=box, primary=primary)
    assert vars(parameter)["tensor_model_parallel"] is split
    assert parameter.shape == torch.Size([stop - start for start, stop in box])

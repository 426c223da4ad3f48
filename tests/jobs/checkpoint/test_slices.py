"""Slice arithmetic against brute force: every element's place, one by one."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from jobs.checkpoint.shardfile import Slice
from jobs.checkpoint.slices import clip, copy_runs, overlap, runs, whole


def positions(piece: Slice) -> list[int]:
    """Global flat position of each element of a slice, by walking the box."""
    walked = []
    for index in itertools.product(*(range(low, high) for low, high in piece.box)):
        flat = 0
        for i, size in zip(index, piece.shape, strict=True):
            flat = flat * size + i
        walked.append(flat)
    return walked[piece.start : piece.stop]


def random_shape(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 4)))


def random_slice(rng: random.Random, shape: tuple[int, ...]) -> Slice:
    box = tuple(
        (0, size) if rng.random() < 0.4 else (low := rng.randint(0, size), rng.randint(low, size)) for size in shape
    )
    elements = math.prod(high - low for low, high in box)
    start = rng.randint(0, elements)
    return Slice(name="w", shape=shape, box=box, start=start, stop=rng.randint(start, elements))


@pytest.mark.parametrize("seed", range(0, 300, 30))
def test_runs_are_every_element_in_its_place(seed: int) -> None:
    for rng in map(random.Random, range(seed, seed + 30)):
        check_runs(random_slice(rng, random_shape(rng)))


def check_runs(piece: Slice) -> None:
    found = runs(piece)
    expected = positions(piece)
    listed: list[int] = []
    for start, local, length in zip(found.start, found.local, found.length, strict=True):
        assert length > 0
        assert local == len(listed)
        listed += list(range(start, start + length))
    assert listed == expected


@pytest.mark.parametrize("seed", range(0, 600, 30))
def test_an_overlap_is_every_shared_element_once(seed: int) -> None:
    for rng in map(random.Random, range(seed, seed + 30)):
        shape = random_shape(rng)
        check_overlap(random_slice(rng, shape), random_slice(rng, shape))


def check_overlap(left: Slice, right: Slice) -> None:
    shared = overlap(left, right)
    of_left, of_right = positions(left), positions(right)
    pairs = []
    for a, b, length in zip(shared.a, shared.b, shared.length, strict=True):
        assert length > 0
        pairs += [(of_left[a + i], of_right[b + i]) for i in range(length)]
    assert all(a == b for a, b in pairs)
    assert sorted(a for a, _ in pairs) == sorted(set(of_left) & set(of_right))
    assert shared.elements == len(pairs)
    assert list(shared.b) == sorted(shared.b)


@pytest.mark.parametrize("seed", range(0, 100, 10))
def test_any_cut_is_put_together_from_any_other_cut(seed: int) -> None:
    """Written as TP boxes with ZeRO ranges, read as other boxes with other ranges: the same tensor."""
    for rng in map(random.Random, range(seed, seed + 10)):
        check_cuts(rng)


def check_cuts(rng: random.Random) -> None:
    shape = tuple(rng.randint(2, 9) for _ in range(rng.randint(1, 3)))
    tensor = np.arange(math.prod(shape), dtype=np.float32)
    stored = random_cut(rng, shape)
    for wanted in random_cut(rng, shape):
        out = np.full(wanted.elements, -1, np.float32)
        for piece in stored:
            data = tensor[np.array(positions(piece), dtype=np.int64)]
            shared = overlap(wanted, piece)
            copy_runs(out, shared.a, data, shared.b, shared.length)
        assert out.tolist() == positions(wanted)


def random_cut(rng: random.Random, shape: tuple[int, ...]) -> list[Slice]:
    """Boxes along one dimension, each cut into flat ranges: what a plan with TP and ZeRO writes."""
    dim, parts = rng.randrange(len(shape)), rng.randint(1, 3)
    borders = sorted([0, shape[dim], *(rng.randint(0, shape[dim]) for _ in range(parts - 1))])
    cut = []
    for low, high in itertools.pairwise(borders):
        box = tuple((low, high) if d == dim else (0, size) for d, size in enumerate(shape))
        elements = math.prod(b - a for a, b in box)
        ranges = sorted([0, elements, *(rng.randint(0, elements) for _ in range(rng.randint(0, 3)))])
        cut += [Slice(name="w", shape=shape, box=box, start=a, stop=b) for a, b in itertools.pairwise(ranges)]
    return cut


@pytest.mark.parametrize("width", [3, 300])
@pytest.mark.parametrize("dropped", [(), (7, 200)])
def test_many_runs_are_copied_like_few(width: int, dropped: tuple[int, ...]) -> None:
    """Above a number of runs those of a box are copied as a matrix, others by indexing or one by one."""
    shape = (500, 2 * width)
    left = Slice(name="w", shape=shape, box=((0, 500), (1, 1 + width)), start=2, stop=467 * width - 1)
    tensor = np.random.default_rng(0).standard_normal(1000 * width).astype(np.float32)
    shared = overlap(left, whole("w", shape))
    kept = np.delete(np.arange(len(shared.length)), dropped)
    assert len(kept) > 400
    out = np.zeros(left.elements, np.float32)
    copy_runs(out, shared.a[kept], tensor, shared.b[kept], shared.length[kept])
    wanted = tensor[np.array(positions(left))]
    for gone in dropped:
        low = int(shared.a[gone])
        wanted[low : low + int(shared.length[gone])] = 0.0
    assert (out == wanted).all()


def test_padding_is_clipped_off_the_end() -> None:
    """125 tokens over 2 ranks of 64 rows: the second holds 61 real rows."""
    piece = clip("w", (125, 4), ((64, 128), (0, 4)), 200, 256)
    assert (piece.box, piece.start, piece.stop) == (((64, 125), (0, 4)), 200, 244)
    assert clip("w", (125, 4), ((64, 128), (0, 4)), 250, 256).elements == 0
    assert clip("w", (4, 4), ((8, 12), (0, 4)), 0, 16).elements == 0


def test_padding_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="only the first dimension"):
        clip("w", (4, 125), ((0, 4), (64, 128)), 0, 8)


def test_tensors_of_different_shapes_do_not_overlap() -> None:
    with pytest.raises(ValueError, match="shape"):
        overlap(whole("w", (4, 2)), whole("w", (2, 4)))

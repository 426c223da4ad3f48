"""Arithmetic of slices: which elements of one slice are which elements of another, as contiguous runs.

A slice is a flat range inside a box of a global tensor. In the flat order of the global tensor it is a set of *runs*,
one per row of the box that it touches (a single one when the box spans all dimensions but the first). Two slices are
matched by joining their runs, so that any plan can read what any other plan wrote. Pure numpy, no loops over elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jobs.checkpoint.shardfile import Slice

Index = npt.NDArray[np.int64]
Box = tuple[tuple[int, int], ...]


class Runs(NamedTuple):
    """Contiguous runs, ascending and disjoint in global order.

    Attributes:
        start: First element of each run, in the flat order of the global tensor.
        local: The same element, counted from the beginning of the slice.
        length: Elements of each run.
    """

    start: Index
    local: Index
    length: Index


class Overlap(NamedTuple):
    """What two slices share: run i is ``left[a[i] : a[i] + length[i]]`` and ``right[b[i] : b[i] + length[i]]``."""

    a: Index
    b: Index
    length: Index

    @property
    def elements(self) -> int:
        """Number of shared elements."""
        return int(self.length.sum())


def whole(name: str, shape: Sequence[int], start: int = 0, stop: int | None = None) -> Slice:
    """A flat range of the global tensor itself; all of it by default."""
    shape = tuple(shape)
    return Slice(
        name=name,
        shape=shape,
        box=tuple((0, size) for size in shape),
        start=start,
        stop=math.prod(shape) if stop is None else stop,
    )


def clip(name: str, shape: Sequence[int], box: Box, start: int, stop: int) -> Slice:
    """A slice without the padding of its box.

    Args:
        name: Global name.
        shape: Global shape, without padding.
        box: Box, which may reach beyond the shape in its first dimension.
        start: First element, counted inside the padded box.
        stop: One past the last element.

    Raises:
        ValueError: The box reaches beyond the shape in another dimension, or has another number of dimensions.
    """
    shape = tuple(shape)
    if len(box) != len(shape) or any(high > size for (_, high), size in zip(box[1:], shape[1:], strict=True)):
        raise ValueError(f"{name}: box {box} does not lie in shape {shape}; only the first dimension may be padded")
    if shape:
        (low, high), rest = box[0], box[1:]
        low, high = min(low, shape[0]), min(high, shape[0])
        box = ((low, high), *rest)
    # Only rows at the end of the box are cut off, so that flat positions inside the box stay what they are.
    elements = math.prod(high - low for low, high in box)
    start = min(start, elements)
    return Slice(name=name, shape=shape, box=box, start=start, stop=max(start, min(stop, elements)))


def runs(piece: Slice) -> Runs:
    """The runs of a slice."""
    extents = [high - low for low, high in piece.box]
    if piece.elements == 0:
        empty = np.zeros(0, dtype=np.int64)
        return Runs(empty, empty, empty)
    outer, row = _row_dimensions(piece, extents)
    rows = np.arange(piece.start // row, (piece.stop - 1) // row + 1, dtype=np.int64)
    # Cut the first and the last row to the range.
    low: Index = np.maximum(rows * row, piece.start)
    high: Index = np.minimum((rows + 1) * row, piece.stop)
    start = _row_starts(piece, extents, outer, rows) + (low - rows * row)
    return Runs(start, low - piece.start, high - low)


def _row_dimensions(piece: Slice, extents: list[int]) -> tuple[int, int]:
    """Number of dimensions that are walked row by row, and elements per contiguous row."""
    row = 1
    for dim in range(len(extents) - 1, -1, -1):
        row *= extents[dim]
        if extents[dim] != piece.shape[dim]:
            return dim, row
    return 0, row


def _row_starts(piece: Slice, extents: list[int], outer: int, rows: Index) -> Index:
    """Global flat position of the first element of each row."""
    strides = [math.prod(piece.shape[dim + 1 :]) for dim in range(len(piece.shape))]
    start = np.zeros_like(rows)
    rest = rows
    for dim in range(outer - 1, -1, -1):
        rest, index = np.divmod(rest, extents[dim])
        start += (index + piece.box[dim][0]) * strides[dim]
    if outer < len(piece.shape):
        start += piece.box[outer][0] * strides[outer]
    return start


def overlap(left: Slice, right: Slice) -> Overlap:
    """What two slices of one tensor share.

    Raises:
        ValueError: They belong to tensors of different shapes.
    """
    if left.shape != right.shape:
        raise ValueError(f"{left.name}: shape {left.shape} here, {right.shape} there")
    if left.box == right.box:  # the common case, and exact without any run: the same plan, another ZeRO cut
        start, stop = max(left.start, right.start), min(left.stop, right.stop)
        count = 1 if stop > start else 0
        offsets = (start - left.start, start - right.start, stop - start)
        return Overlap(*(np.full(count, value, dtype=np.int64) for value in offsets))
    return _join(runs(left), runs(right))


def _join(left: Runs, right: Runs) -> Overlap:
    if not len(left.start) or not len(right.start):
        empty = np.zeros(0, dtype=np.int64)
        return Overlap(empty, empty, empty)
    # For every run on the left, the range [first, last) of runs on the right that it meets.
    first = np.searchsorted(right.start + right.length, left.start, side="right")
    last = np.searchsorted(right.start, left.start + left.length, side="left")
    counts = np.maximum(last - first, 0)
    of_left = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    of_right = np.arange(int(counts.sum())) - np.repeat(before - first, counts)
    start = np.maximum(left.start[of_left], right.start[of_right])
    stop = np.minimum((left.start + left.length)[of_left], (right.start + right.length)[of_right])
    return Overlap(
        left.local[of_left] + start - left.start[of_left],
        right.local[of_right] + start - right.start[of_right],
        stop - start,
    )


def copy_runs(
    target: npt.NDArray[np.float32], at: Index, source: npt.NDArray[np.float32], source_at: Index, length: Index
) -> None:
    """Copy runs between flat arrays.

    Args:
        target: Written, flat.
        at: Where each run begins in ``target``.
        source: Read, flat.
        source_at: Where each run begins in ``source``.
        length: Elements of each run.
    """
    if len(length) <= _FEW_RUNS:
        _one_by_one(target, at, source, source_at, length)
        return
    inner = slice(1, -1)  # the first and the last row of a box may be cut
    if _is_even(at[inner]) and _is_even(source_at[inner]) and (length[inner] == length[1]).all():
        ends = [0, -1]
        _one_by_one(target, at[ends], source, source_at[ends], length[ends])
        _rows(target, at[inner], int(length[1]))[:] = _rows(source, source_at[inner], int(length[1]))
    elif int(length.sum()) > _LONG_RUN * len(length):
        _one_by_one(target, at, source, source_at, length)
    else:
        steps = np.arange(int(length.sum()), dtype=np.int64) - np.repeat(np.cumsum(length) - length, length)
        target[np.repeat(at, length) + steps] = source[np.repeat(source_at, length) + steps]


def _one_by_one(
    target: npt.NDArray[np.float32], at: Index, source: npt.NDArray[np.float32], source_at: Index, length: Index
) -> None:
    for to, begin, count in zip(at.tolist(), source_at.tolist(), length.tolist(), strict=True):
        target[to : to + count] = source[begin : begin + count]


def _is_even(at: Index) -> bool:
    """Whether positions are equally far apart."""
    return bool((np.diff(at) == at[1] - at[0]).all())


def _rows(flat: npt.NDArray[np.float32], at: Index, length: int) -> npt.NDArray[np.float32]:
    """Runs of one length that are equally far apart, as the rows of a matrix: one copy moves them all."""
    apart = int(at[1] - at[0]) * flat.itemsize
    return np.lib.stride_tricks.as_strided(flat[int(at[0]) :], (len(at), length), (apart, flat.itemsize))


_FEW_RUNS = 16
_LONG_RUN = 128  # elements from which a slice assignment beats fancy indexing

"""Slices of our tensors, read from a Hugging Face folder: each rank maps the files and touches only what it needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.checkpoint.shardfile import Slice
from jobs.hf.folder import Folder, Stored
from jobs.hf.names import parts_of
from strategies.errors import StorageError
from strategies.specs import ModelSpec

Array = npt.NDArray[np.float32]
_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}


class HfWeights:
    """Random access to the weights of a folder by our names, in fp32.

    Args:
        folder: A folder that holds the tensors of ``model``.
        model: The model.
    """

    def __init__(self, folder: Folder, model: ModelSpec) -> None:
        self._places: dict[str, tuple[Stored, int, bool]] = {}  # ours -> theirs, first row in it, transposed
        for part in parts_of(model):
            row = 0
            for name, shape in part.sources:
                self._places[name] = (folder.tensors[part.name], row, part.transposed)
                row += shape[0]

    def read_slice(self, wanted: Slice, out: Array) -> None:
        """Fill ``out`` with a slice of any box.

        Raises:
            StorageError: A file cannot be read.
        """
        if not wanted.elements:
            return
        (low, _), *rest = wanted.box
        row = math.prod(high - start for start, high in rest)
        first, last = wanted.start // row, -(-wanted.stop // row)  # only the rows that the range touches
        values = self._read(wanted.name, ((low + first, low + last), *rest)).reshape(-1)
        out[:] = values[wanted.start - first * row : wanted.stop - first * row]

    def _read(self, name: str, box: tuple[tuple[int, int], ...]) -> Array:
        stored, row, transposed = self._places[name]
        (low, high), *rest = box
        window = [slice(low + row, high + row), *(slice(start, stop) for start, stop in rest)]
        mapped = _mapped(stored)
        taken = mapped[tuple(window[::-1])].T if transposed else mapped[tuple(window)]
        if stored.dtype == "BF16":
            wide: Array = (np.ascontiguousarray(taken).astype(np.uint32) << 16).view(np.float32)
            return wide
        return np.ascontiguousarray(taken, dtype=np.float32)


def _mapped(stored: Stored) -> npt.NDArray[Any]:
    try:
        return np.memmap(stored.file, dtype=_TYPES[stored.dtype], mode="r", offset=stored.offset, shape=stored.shape)
    except (OSError, ValueError) as error:
        raise StorageError(f"Cannot read {stored.file}.", why=str(error)) from error

"""A checkpoint in the layout that Hugging Face's transformers loads: config.json, safetensors, tokenizer. Any plan's.

GPT-3 flavour becomes ``GPT2LMHeadModel`` (its q, k and v are one matrix, and its matrices are stored transposed), Llama
flavour ``LlamaForCausalLM``. Weights are the fp32 masters, rounded when a narrower type is asked for. The folder
appears at once and whole, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jobs.checkpoint.layout import sync_dir
from jobs.checkpoint.reader import Reader
from jobs.folders import made_for
from jobs.hf.config import config_of
from jobs.hf.folder import TOKENIZER
from jobs.hf.names import Part, parts_of
from jobs.hf.tokenizer import write_tokenizer
from jobs.location import Location
from jobs.spec import DataSpec
from strategies.errors import ConfigError, StorageError

Array = npt.NDArray[Any]
Dtype = Literal["fp32", "bf16", "fp16"]
_NAMES: dict[Dtype, tuple[str, str]] = {
    "fp32": ("F32", "float32"),
    "bf16": ("BF16", "bfloat16"),
    "fp16": ("F16", "float16"),
}  # as safetensors calls it, as transformers does
_FILE_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: The folder.
        files: Number of weight files.
        tensors: Number of tensors.
        bytes: Size of the weights.
    """

    path: Path
    files: int
    tensors: int
    bytes: int


def export(
    manifest: str | Location,
    target: Path,
    *,
    dtype: Dtype = "fp32",
    data: DataSpec | None = None,
    file_bytes: int = _FILE_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        manifest: The manifest.
        target: The folder to make; must not exist.
        dtype: Type of the weights.
        data: What was trained on: its tokenizer goes with the weights, if it is still there.
        file_bytes: Largest weight file; a single tensor may be larger.
        progress: Told (bytes done, bytes in all) after every tensor.

    Raises:
        ConfigError: ``target`` exists, or transformers has no such model.
        CorruptCheckpoint: The checkpoint is damaged.
        StorageError: It cannot be read, or the folder cannot be written.
    """
    reader = Reader(manifest)
    model = reader.manifest.model
    config, parts = config_of(model), parts_of(model)
    with appearing(target) as folder:
        written = _write(reader, parts, folder, dtype, file_bytes, progress)
        config |= {"torch_dtype": _NAMES[dtype][1]}
        if data is not None:
            config |= {"bos_token_id": data.end_id, "eos_token_id": data.end_id}
            if (tokenizer := Path(data.store) / TOKENIZER).is_file():
                write_tokenizer(tokenizer, folder, data.end_id)
        _write_json(folder / "config.json", config)
    return Exported(path=target, files=written[0], tensors=len(parts), bytes=written[1])


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` at once and whole, or not at all.

    Raises:
        ConfigError: ``target`` exists.
        StorageError: It cannot be written.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already.", hint="Give --to the name of a folder that does not exist yet.")
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with made_for(target.parent):
            try:
                aside.mkdir()
                yield aside
                os.rename(aside, target)
                sync_dir(target.parent)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        why, hint = (
            error.strerror or str(error),
            "Free some space there, or choose another --to. Nothing of it is left.",
        )
        raise StorageError(f"The export cannot be written to {target}.", why=why, hint=hint) from error


def _write(
    reader: Reader,
    parts: list[Part],
    folder: Path,
    dtype: Dtype,
    file_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, int]:
    """The weight files and, if there are several, their index; returns their number and the bytes of all tensors."""
    files = _deal(parts, dtype, file_bytes)
    total = sum(_bytes(part, dtype) for part in parts)
    done, index = 0, {}
    for number, members in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for part in members:
            tensors[part.name] = _tensor(reader, part, dtype)
            index[part.name] = name
            done += _bytes(part, dtype)
            if progress is not None:
                progress(done, total)
        _save(folder / name, tensors, dtype)
    if len(files) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    return len(files), total


def _deal(parts: list[Part], dtype: Dtype, file_bytes: int) -> list[list[Part]]:
    """Consecutive tensors to files of at most ``file_bytes``."""
    files: list[list[Part]] = [[]]
    held = 0
    for part in parts:
        size = _bytes(part, dtype)
        if files[-1] and held + size > file_bytes:
            files.append([])
            held = 0
        files[-1].append(part)
        held += size
    return files


def _bytes(part: Part, dtype: Dtype) -> int:
    return math.prod(part.shape) * (4 if dtype == "fp32" else 2)


def _tensor(reader: Reader, part: Part, dtype: Dtype) -> Array:
    pieces = []
    for source, shape in part.sources:
        pieces.append(reader.read_flat(source, "master", 0, math.prod(shape)).reshape(shape))
    array: Array = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    array = np.ascontiguousarray(array.T) if part.transposed else array
    if dtype == "bf16":
        return _to_bf16(array)
    return array.astype(np.float16) if dtype == "fp16" else array


def _to_bf16(array: Array) -> Array:
    """Bit patterns of the nearest bf16, ties to even, as torch rounds; NaN stays NaN."""
    bits = array.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _save(path: Path, tensors: dict[str, Array], dtype: Dtype) -> None:
    """One safetensors file. (The library's own writer has no bf16 for numpy, and its low-level call changes.)"""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[dtype][0], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")

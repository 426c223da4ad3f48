"""Checkpoints without a gang: written from arrays, and damaged on purpose."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.checkpoint.layout import Place, Token
from jobs.checkpoint.manifest import Manifest, ShardRecord, TrainerState, commit
from jobs.checkpoint.shardfile import BLOCK_ELEMENTS, ELEMENT_BYTES, KINDS, Slice, write_shard
from jobs.checkpoint.slices import copy_runs, overlap, whole
from jobs.distributed import Grid
from jobs.location import L
from jobs.models.gpt import Decoder, Recipe
from strategies.specs import ModelSpec
from tests.support.jobspecs import GPT, make_plan

Array = npt.NDArray[np.float32]


def values(shape: Sequence[int], kind: str, seed: int = 0) -> Array:
    """The global tensor of a kind, made up."""
    generator = np.random.default_rng([seed, KINDS.index(kind), *shape])
    return generator.standard_normal(math.prod(shape)).astype(np.float32)


def cut(piece: Slice, tensor: Array) -> Array:
    """The elements of a slice, out of the flat global tensor."""
    out = np.empty(piece.elements, np.float32)
    shared = overlap(piece, whole(piece.name, piece.shape))
    copy_runs(out, shared.a, tensor, shared.b, shared.length)
    return out


def write_shards(
    place: Place[L], ranks: Sequence[Sequence[Slice]], seed: int = 0, *, scale: float = 1.0
) -> list[ShardRecord]:
    """One shard per rank, uncommitted; ``scale`` is the deviation of the values."""
    records = []
    for rank, pieces in enumerate(ranks):
        views = [
            (piece, {kind: (cut(piece, values(piece.shape, kind, seed)) * np.float32(scale)).data for kind in KINDS})
            for piece in pieces
        ]
        size, digest = write_shard(place.shard(rank), views, {"rank": rank})
        elements = sum(piece.elements for piece in pieces)
        records.append(ShardRecord(rank=rank, bytes=size, digest=digest, elements=elements))
    return records


def manifest_of(
    place: Place[L],
    records: Sequence[ShardRecord],
    tensors: Mapping[str, tuple[int, ...]],
    model: ModelSpec = GPT,
    samples: Mapping[str, Any] | None = None,
) -> Manifest:
    """A manifest, uncommitted."""
    return Manifest(
        run_id="test",
        step=place.step,
        epoch=place.token.epoch,
        attempt=place.token.attempt,
        time=1.5,
        plan=make_plan(GPT, 8),
        model=model,
        tensors=tensors,
        shards=tuple(records),
        trainer=TrainerState(optimizer_steps=place.step, learning_rates=(0.1,), counters={}, loss_scaler={}),
        extra={"sample_index": 8 * place.step} | ({} if samples is None else {"data": samples}),
    )


def write_checkpoint(
    root: L,
    step: int = 1,
    token: tuple[int, int] = (1, 1),
    ranks: Sequence[Sequence[Slice]] | None = None,
    *,
    model: ModelSpec = GPT,
    scale: float = 1.0,
    samples: Mapping[str, Any] | None = None,
) -> L:
    """A committed checkpoint; by default of one tensor in two shards. Returns its manifest."""
    place = Place(root, step, Token(*token))
    ranks = ranks or [[whole("w", (30, 10), 0, 120)], [whole("w", (30, 10), 120, 300)]]
    records = write_shards(place, ranks, scale=scale)
    tensors = {piece.name: piece.shape for part in ranks for piece in part}
    return commit(root, manifest_of(place, records, tensors, model, samples))


def write_model_checkpoint(
    root: L, model: ModelSpec, *, step: int = 1, scale: float = 0.3, samples: Mapping[str, Any] | None = None
) -> L:
    """A committed checkpoint of a whole model with random weights, dealt to two shards. Returns its manifest.

    Args:
        root: Folder of the checkpoints.
        model: The model.
        step: Its step.
        scale: Deviation of the weights.
        samples: What it says of the samples that it was made with.
    """
    decoder = Decoder(Recipe.of(model, Grid(), seed=0))
    metas = {p.phalanx.name: p.phalanx for p in decoder.parameters()}  # type: ignore[attr-defined]
    pieces = [whole(name, meta.shape) for name, meta in metas.items()]
    halves = [pieces[::2], pieces[1::2]]
    return write_checkpoint(root, step=step, ranks=halves, model=model, scale=scale, samples=samples)


def flip_bit(path: Path, at: int) -> None:
    """Flip the lowest bit of one byte of a file; negative positions count from the end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def flip_and_sign_again(manifest: Path, rank: int, name: str, bit: int) -> None:
    """Flip bit ``bit`` (0: lowest) of the first master weight of ``name`` in a shard; mend every digest above it."""
    shard = manifest.parent / manifest.name.removesuffix(".manifest.json") / f"shard-{rank:05d}.safetensors"
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    document: dict[str, Any] = json.loads(data[8:start])
    first, last = (start + offset for offset in document[f"master/{name}"]["data_offsets"])
    data[first + bit // 8] ^= 1 << bit % 8
    ours = json.loads(document["__metadata__"]["phalanx"])
    row = next(row for row in ours["slices"] if row["name"] == name)
    block = bytes(data[first : min(last, first + BLOCK_ELEMENTS * ELEMENT_BYTES)])
    row["blocks"]["master"][0] = hashlib.sha256(block).hexdigest()
    document["__metadata__"]["phalanx"] = json.dumps(ours)
    header = json.dumps(document).encode()
    data[8:start] = header + b" " * (start - 8 - len(header))
    shard.write_bytes(data)
    record = json.loads(manifest.read_bytes())
    del record["digest"]
    record["shards"][rank]["digest"] = hashlib.sha256(data[:start]).hexdigest()
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    record["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    manifest.write_text(json.dumps(record))

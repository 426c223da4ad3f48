"""Weights that a job begins with: a Hugging Face folder, or a checkpoint of a run. One way to name and read them.

``PATH`` (or ``hf:PATH``) is a folder with a config.json, a run directory (its newest checkpoint), or a manifest. The
first half of this module needs no numpy: the launcher looks at weights where a run is planned.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jobs.checkpoint.errors import CorruptCheckpoint
from jobs.checkpoint.identity import model_differences
from jobs.checkpoint.manifest import list_checkpoints, read_manifest
from jobs.hf import folder as hf
from jobs.location import locate
from jobs.paths import RunPaths
from jobs.spec import WeightsSpec
from strategies.errors import ConfigError, NotFound, StorageError
from strategies.specs import ModelSpec

if TYPE_CHECKING:
    from jobs.checkpoint.shardfile import Slice
    from jobs.hf.weights import Array

_FORMS = "PATH is a folder with config.json and safetensors, a run directory, or the manifest of a checkpoint."
_MANIFEST = ".manifest.json"
# In these a model may differ from the one whose weights it takes: no tensor depends on them, and they are not what is
# made of a token, but how that is trained and planned.
_TRAINED = tuple(f"moe.{name}" for name in ("balance_weight", "z_weight", "capacity_factor", "imbalance"))
_FREE = ("name", "seq", "init_std", "rope_theta", "position_rows", *_TRAINED)


class WeightSource(Protocol):
    """Gives out slices of the weights, in fp32, by global name."""

    def read_slice(self, wanted: Slice, out: Array) -> None:
        """Fill ``out``. Raises CorruptCheckpoint, StorageError, KeyError."""


def find(text: str) -> WeightsSpec:
    """What a person means by ``text``; nothing of it has been checked or digested.

    Raises:
        ConfigError: There is nothing of the kind.
        NotFound: A run has no checkpoint.
        StorageError: It cannot be read.
    """
    named = text.startswith("hf:")
    path = Path(text.removeprefix("hf:"))
    if named or hf.is_folder(path):
        return WeightsSpec(kind="hf", path=str(path))
    if text.endswith(_MANIFEST):
        return WeightsSpec(kind="checkpoint", path=str(locate(text)))
    paths = RunPaths(path)
    if paths.request.is_file():
        found = list_checkpoints(paths.checkpoints)
        if not found:
            raise NotFound(f"The run {path} has no checkpoint that can be used.", hint="phalanx checkpoint ls")
        return WeightsSpec(kind="checkpoint", path=str(found[0].path), run=str(path))
    if path.is_dir():
        return WeightsSpec(kind="hf", path=str(path))  # whose problems will be told
    raise ConfigError(f"There are no weights at {path}.", hint=_FORMS)


def tokenizer_of(weights: WeightsSpec) -> Path | None:
    """The tokenizer that the weights know: in their folder, or that of their run; None if there is none any more."""
    folder = Path(weights.path) if weights.kind == "hf" else Path(data_of(weights).get("store") or "/nowhere")
    path = folder / hf.TOKENIZER
    return path if path.is_file() else None


def data_of(weights: WeightsSpec) -> dict[str, Any]:
    """What a run was trained on, as its request says; empty where a checkpoint is apart from its run."""
    beside = Path(weights.path).parent.parent.parent  # <run>/checkpoints/<step>/<token>.manifest.json
    request = RunPaths(Path(weights.run) if weights.run else beside).request
    found: dict[str, Any] = json.loads(request.read_text())["job"]["data"] if request.is_file() else {}
    return found


def samples_of(weights: WeightsSpec) -> Mapping[str, Any]:
    """What a checkpoint says of the samples that it was made with: ``packing`` and ``end_id`` of :class:`DataSpec`.

    Empty for a folder; checkpoints of earlier versions do not say so either.

    Raises:
        CorruptCheckpoint: The manifest is damaged.
        StorageError: It cannot be read.
    """
    found = read_manifest(weights.path).extra.get("data") if weights.kind == "checkpoint" else None
    return found or {}


def model_of(weights: WeightsSpec) -> ModelSpec:
    """The model that the weights belong to.

    Raises:
        ConfigError: A folder that is no model of ours; every problem is listed.
        CorruptCheckpoint: The manifest is damaged.
        StorageError: It cannot be read.
    """
    if weights.kind == "hf":
        return hf.model_of(Path(weights.path))
    return read_manifest(weights.path).model


def check(weights: WeightsSpec, model: ModelSpec) -> None:
    """Check that the weights are those of ``model``, tensor by tensor.

    Raises:
        ConfigError: They are not; every difference is listed.
        CorruptCheckpoint: The manifest is damaged.
        StorageError: They cannot be read.
    """
    if weights.kind == "hf":
        hf.open_folder(Path(weights.path), model)
        return
    there = read_manifest(weights.path).model
    different = model_differences(there, model, _FREE)
    hint = "Take its model; the sequence length and the rotary base may be others."
    if there.learned_positions != model.learned_positions:
        rows = there.learned_positions
        different.append(f"learned positions: {rows} in the checkpoint, {model.learned_positions} here")
        hint = f"Learned positions cannot be extended: keep model.seq={rows}."
        if model.seq < rows:
            hint = f"model.position_rows={rows} keeps the positions that shorter sequences do not use."
    if different:
        raise ConfigError(f"The checkpoint {weights.path} is of another model.", why="; ".join(different), hint=hint)


def digested(weights: WeightsSpec, model: ModelSpec) -> WeightsSpec:
    """The same with the digest of every file, so that ranks notice when they are others. Reads all of a folder.

    Raises:
        ConfigError: The weights are not those of ``model``; every problem is listed.
        StorageError: They cannot be read.
    """
    check(weights, model)
    if weights.kind == "checkpoint":  # its manifest has the digests of all that it consists of
        return dataclasses.replace(weights, files={"manifest": _manifest_digest(weights)})
    folder = hf.open_folder(Path(weights.path), model)
    files = [folder.path / hf.CONFIG, *folder.files]
    return dataclasses.replace(weights, files={file.name: hf.file_digest(file) for file in files})


def verify(weights: WeightsSpec, rank: int = 0, world: int = 1) -> None:
    """Compare this rank's share of the files with their digests.

    Raises:
        StorageError: A file was changed since, or cannot be read.
    """
    if weights.kind == "checkpoint":
        changed = [weights.path] if weights.files and _manifest_digest(weights) != weights.files["manifest"] else []
    else:
        mine = sorted(weights.files)[rank::world]
        changed = [name for name in mine if hf.file_digest(Path(weights.path) / name) != weights.files[name]]
    if changed:
        raise StorageError(
            f"The weights in {weights.path} have changed since the job was submitted: {', '.join(changed)}.",
            hint="Bring them back, or submit a new run.",
        )


def open_weights(weights: WeightsSpec, model: ModelSpec, rank: int = 0) -> WeightSource:
    """Random access to the weights; needs numpy.

    Raises:
        ConfigError: A folder does not hold the tensors of ``model``.
        CorruptCheckpoint: A checkpoint is damaged.
        StorageError: They cannot be read.
    """
    if weights.kind == "hf":
        from jobs.hf.weights import HfWeights

        return HfWeights(hf.open_folder(Path(weights.path), model), model)
    return _CheckpointWeights(weights.path, rank)


class _CheckpointWeights:
    """The fp32 masters of a checkpoint, whatever plan wrote it."""

    def __init__(self, manifest: str, rank: int) -> None:
        from jobs.checkpoint.reader import Reader

        self._reader = Reader(locate(manifest), rank)

    def read_slice(self, wanted: Slice, out: Array) -> None:
        """See :class:`WeightSource`."""
        stored = self._reader.manifest.tensors.get(wanted.name)
        if stored != wanted.shape:
            raise CorruptCheckpoint(self._reader.path, f"{wanted.name} has shape {stored}, {wanted.shape} is needed")
        self._reader.read_slice(wanted, "master", out)


def _manifest_digest(weights: WeightsSpec) -> str:
    import hashlib

    from strategies.codec import to_json

    document = to_json(read_manifest(weights.path))
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

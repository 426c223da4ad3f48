"""The manifest: the record whose existence makes a checkpoint, and the questions that are asked of it.

No torch, no numpy: the controller lists, picks and verifies checkpoints where neither is installed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.checkpoint.errors import AbsentFile, CheckpointConflict, CorruptCheckpoint, OtherVersion, storage_error
from jobs.checkpoint.fence import Branch, current, in_order, refuse_if_fenced
from jobs.checkpoint.layout import Place, Token, manifests, place_of, writers
from jobs.checkpoint.shardfile import KINDS, DamagedShard, block_count, read_block, read_header
from jobs.checkpoint.storage import storage_of
from jobs.location import L, Location, locate
from strategies.codec import from_json, to_json
from strategies.errors import ConfigError, StorageError
from strategies.plan import ParallelPlan
from strategies.specs import ModelSpec

MANIFEST_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The shard of an earlier checkpoint of the run that holds the tensors of a shard in which nothing has changed.

    Attributes:
        step: Step of that checkpoint.
        epoch: Epoch of its writers.
        attempt: Attempt of its writers.
        rank: Rank that wrote it.
        bytes: Size of the file.
        digest: SHA-256 of its header.
    """

    step: int
    epoch: int
    attempt: int
    rank: int
    bytes: int
    digest: str

    def place(self, root: L) -> Place[L]:
        """The checkpoint whose file it is."""
        return Place(root, self.step, Token(self.epoch, self.attempt))


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One shard, as promised by the manifest.

    Attributes:
        rank: Rank that wrote it.
        bytes: Size of the file.
        digest: SHA-256 of its header, which holds the digests of the data (:mod:`jobs.checkpoint.shardfile`).
        elements: Elements per kind.
        origin: Where its tensors are, if they are those of an earlier checkpoint; the file then has none.
    """

    rank: int
    bytes: int
    digest: str
    elements: int
    origin: Origin | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """State of the optimizer and its engine that is the same on every rank.

    Attributes:
        optimizer_steps: Updates that Adam has made; less than the step when fp16 skipped some.
        learning_rates: Learning rate per parameter group, as last used.
        counters: The engine's own counts of steps and samples.
        loss_scaler: State of the dynamic loss scale (fp16); empty without one.
    """

    optimizer_steps: int
    learning_rates: tuple[float, ...]
    counters: Mapping[str, int]
    loss_scaler: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A committed checkpoint.

    Attributes:
        run_id: The run that wrote it.
        step: Optimizer steps that the state contains.
        epoch: Incarnation of the controller that launched the writers.
        attempt: Incarnation of the gang that wrote it.
        time: When it was committed, UTC seconds.
        plan: The plan of the writers. Readers may have another.
        model: The model.
        tensors: Global name -> global shape of every tensor.
        shards: The files.
        trainer: Optimizer and engine state beside the tensors.
        extra: What the caller wants back, verbatim (position in the data, tracking, digests of data and model).
        version: Version of this document.
    """

    run_id: str
    step: int
    epoch: int
    attempt: int
    time: float
    plan: ParallelPlan
    model: ModelSpec
    tensors: Mapping[str, tuple[int, ...]]
    shards: tuple[ShardRecord, ...]
    trainer: TrainerState
    extra: Mapping[str, Any]
    version: int = MANIFEST_VERSION

    @property
    def bytes(self) -> int:
        """Size of all shards, those of earlier checkpoints included."""
        return self.written_bytes + sum(shard.origin.bytes for shard in self.shards if shard.origin)

    @property
    def written_bytes(self) -> int:
        """Size of the files that were written for it."""
        return sum(shard.bytes for shard in self.shards)

    def files(self, root: L) -> list[tuple[Place[L], int, int, str]]:
        """Every file that it consists of: checkpoint, rank, size in bytes, digest of the header."""
        own = Place(root, self.step, Token(self.epoch, self.attempt))
        found = [(own, shard.rank, shard.bytes, shard.digest) for shard in self.shards]
        earlier = [shard.origin for shard in self.shards if shard.origin]
        return found + [(one.place(root), one.rank, one.bytes, one.digest) for one in earlier]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A committed checkpoint, for lists.

    Attributes:
        step: Optimizer steps that the state contains.
        token: (epoch, attempt) of the writers.
        path: The manifest.
        bytes: Size of all shards, those of earlier checkpoints included.
        written_bytes: Size of the files that were written for it.
        plan: The plan of the writers.
        time: When it was committed, UTC seconds.
    """

    step: int
    token: Token
    path: Location
    bytes: int
    written_bytes: int
    plan: ParallelPlan
    time: float


def survey(root: str | Location, branch: Branch | None = None) -> tuple[list[Checkpoint], list[tuple[Location, str]]]:
    """All committed checkpoints below ``root`` that count, and manifests that cannot be used, each with the reason.

    Both best first (:mod:`jobs.checkpoint.fence`), and each read once.

    Args:
        root: Folder of all checkpoints of the run.
        branch: What decides which ones count; None for what is on record there.

    Raises:
        StorageError: The folder cannot be listed, or a manifest cannot be read.
    """
    found, broken = [], []
    for place in best_first(locate(root), branch):
        try:
            manifest = read_manifest(place.manifest)
        except CorruptCheckpoint as error:
            broken.append((place.manifest, error.reason))
            continue
        found.append(
            Checkpoint(
                step=place.step,
                token=place.token,
                path=place.manifest,
                bytes=manifest.bytes,
                written_bytes=manifest.written_bytes,
                plan=manifest.plan,
                time=manifest.time,
            )
        )
    return found, broken


def list_checkpoints(root: str | Location) -> list[Checkpoint]:
    """The checkpoints of :func:`survey`."""
    return survey(root)[0]


def damaged(root: str | Location) -> list[tuple[Location, str]]:
    """The manifests that :func:`list_checkpoints` leaves out, each with the reason; raises as :func:`survey`."""
    return survey(root)[1]


def newest(root: str | Location, exclude: Collection[str | Location] = frozenset()) -> Location | None:
    """The checkpoint to restore: of those that count the best, by the order of :mod:`jobs.checkpoint.fence`.

    Args:
        root: Folder of all checkpoints of the run.
        exclude: Manifests that failed before.

    Returns:
        Path of its manifest; None when there is none.

    Raises:
        StorageError: The folder cannot be listed.
    """
    excluded = {locate(path).absolute() for path in exclude}
    for place in best_first(locate(root)):
        if place.manifest.absolute() in excluded:
            continue
        try:
            read_manifest(place.manifest)
        except CorruptCheckpoint:
            continue
        return place.manifest
    return None


def best_first(root: Location, branch: Branch | None = None) -> list[Place[Location]]:
    """Places of the manifests that count, intact or not, best first; arguments and errors as of :func:`survey`."""
    try:
        return in_order(manifests(root), branch or current(root))
    except OSError as error:
        raise storage_error("list the checkpoints", root, error) from error


def read_manifest(path: str | Location) -> Manifest:
    """Read a manifest and check that it is whole.

    Raises:
        AbsentFile: It does not exist.
        OtherVersion: Another version of phalanx has written it.
        CorruptCheckpoint: It is damaged, or does not belong where it lies.
        StorageError: It cannot be read.
    """
    path = locate(path)
    try:
        document = json.loads(storage_of(path).read(path))
        digest = document.pop("digest")
        if document.get("version") != MANIFEST_VERSION:
            raise OtherVersion(path, document.get("version"), MANIFEST_VERSION)
        if digest != _digest(document):
            raise CorruptCheckpoint(path, "the manifest does not match its own digest")
        manifest = from_json(Manifest, document, where="manifest")
        place = place_of(path)
    except FileNotFoundError:
        raise AbsentFile(path, "the manifest does not exist") from None
    except OSError as error:
        raise storage_error("read the checkpoint manifest", path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CorruptCheckpoint(path, f"the manifest cannot be understood: {error}") from error
    if (manifest.step, manifest.epoch, manifest.attempt) != (place.step, *place.token):
        raise CorruptCheckpoint(path, f"the manifest is of step {manifest.step}, which is not what its name says")
    return manifest


def commit(root: L, manifest: Manifest) -> L:
    """Make the checkpoint exist. Its shards must be durable.

    Returns:
        Path of the manifest.

    Raises:
        CheckpointConflict: It is committed already, or another gang has taken over: it was fenced out, or a higher
            token has written. (If that comes to light only when the manifest is there, it counts for nothing unless the
            other gang has begun with it.)
        StorageError: The manifest cannot be written, or a shard is not there.
    """
    place = Place(root, manifest.step, Token(manifest.epoch, manifest.attempt))
    document = to_json(manifest)
    document["digest"] = _digest(document)
    storage = place.storage
    try:
        _refuse_if_replaced(place)
        _require_shards(place, manifest)
        storage.settle(place.shard_dir, place.step_dir, root)
        storage.create(place.manifest, [json.dumps(document, indent=1).encode() + b"\n"])
        storage.settle(place.step_dir)
        refuse_if_fenced(place)
    except FileExistsError:
        raise CheckpointConflict(
            f"The checkpoint {place.manifest} is committed already.",
            why="another gang with the same token has written it",
            hint="Nothing is lost; start one controller only for this run.",
        ) from None
    except OSError as error:
        raise storage_error("commit the checkpoint", place.manifest, error) from error
    return place.manifest


def _refuse_if_replaced(place: Place[Any]) -> None:
    refuse_if_fenced(place)
    # Gangs that no controller has started are known by what they write.
    highest = max((other.token for other in writers(place.root)), default=place.token)
    if highest > place.token:
        raise CheckpointConflict(
            f"The gang {place.token} may not commit step {place.step}.",
            why=f"a later gang, {highest}, already writes checkpoints of this run",
            hint="Nothing is lost; this gang was replaced and ends.",
        )


def _require_shards(place: Place[Any], manifest: Manifest) -> None:
    problems = _missing(place, manifest)
    if problems:
        raise StorageError(
            f"Step {manifest.step} cannot be committed.",
            why="; ".join(problems[:3]),
            hint="Check that every node sees the same run directory.",
        )


def absent(path: str | Location) -> list[str]:
    """A quick look: shards of a checkpoint that are not there or not of their size, in sentences.

    Raises:
        CorruptCheckpoint: The manifest itself is damaged.
        StorageError: It cannot be looked at.
    """
    manifest = read_manifest(path)
    try:
        return _missing(place_of(locate(path)), manifest)
    except OSError as error:
        raise storage_error("look at the checkpoint", path, error) from error


def verify(path: str | Location, deep: bool = False) -> list[str]:
    """Look for damage.

    Args:
        path: A manifest.
        deep: Read and check every byte, not only names and sizes.

    Returns:
        What is wrong, in sentences; empty when nothing is.
    """
    try:
        manifest = read_manifest(path)
        place = place_of(locate(path))
        problems = _missing(place, manifest)
    except StorageError as error:
        return [error.why or error.what]
    except OSError as error:
        return [f"{path}: {error.strerror or error}"]
    if deep and not problems:
        for home, rank, size, header in manifest.files(place.root):
            problems += _check_shard(home.shard(rank), size, header)
    return problems


def _missing(place: Place[Any], manifest: Manifest) -> list[str]:
    """Shards that are not there or not of their size; one listing per folder. Raises OSError."""
    there: dict[Place[Any], dict[str, int]] = {}
    problems = []
    for home, rank, size, _ in manifest.files(place.root):
        if home not in there:
            there[home] = place.storage.sizes(home.shard_dir)
        path = home.shard(rank)
        found = there[home].get(path.name)
        if found is None:
            problems.append(f"{path} is missing")
        elif found != size:
            problems.append(f"{path} has {found} bytes instead of {size}")
    return problems


def _check_shard(path: Location, size: int, digest: str) -> list[str]:
    try:
        header = read_header(path, size=size, digest=digest)
        for stored in header.slices:
            for kind in KINDS:
                for index in range(block_count(stored)):
                    read_block(header, stored, kind, index)
    except DamagedShard as error:
        return [str(error)]
    except OSError as error:
        return [f"{path}: {error.strerror or error}"]
    return []


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

"""What the ranks of a gang agree on while they save or restore: nobody waits for a rank that has failed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from jobs.checkpoint.digest import combine_digests, partial_digest
from jobs.checkpoint.errors import AbsentFile, CheckpointConflict, CorruptCheckpoint, OutOfReach
from jobs.checkpoint.manifest import read_manifest
from jobs.location import Location
from strategies.errors import PhalanxError, ResumeRefused, StorageError

_UNFIT: dict[str, type[CorruptCheckpoint]] = {
    "unreachable": OutOfReach,  # before what it derives from
    "absent": AbsentFile,
    "corrupt": CorruptCheckpoint,
}
_KINDS: dict[str, type[PhalanxError]] = {
    "conflict": CheckpointConflict,  # before what it derives from
    "storage": StorageError,
    "refused": ResumeRefused,
}


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) outside a gang."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: Any) -> list[Any]:
    """Every rank's JSON value, in the order of ranks. Collective.

    (``all_gather_object`` would do it with pickles.)
    """
    if rank_and_world()[1] == 1:
        return [value]
    return [json.loads(text) for text in gather_bytes(json.dumps(value).encode())]


def most(values: Sequence[float]) -> list[float]:
    """The largest that any rank has of each value. Collective."""
    if rank_and_world()[1] == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float32, device=device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [float(value) for value in found.tolist()]


def gather_bytes(value: bytes) -> list[bytes]:
    """Every rank's bytes (at least one), in the order of ranks. Collective."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    where = device()
    data = torch.frombuffer(bytearray(value), dtype=torch.uint8).to(where)
    sizes = [torch.zeros(1, dtype=torch.int64, device=where) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([data.numel()], dtype=torch.int64, device=where))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=where)
    padded[: data.numel()] = data
    rows = [torch.zeros(longest, dtype=torch.uint8, device=where) for _ in range(world)]
    dist.all_gather(rows, padded)
    return [bytes(row[: int(size)].cpu().numpy()) for row, size in zip(rows, sizes, strict=True)]


def agree(error: Exception | None, value: Any = None) -> list[Any]:
    """Tell the others how it went here; returns only if it went well everywhere. Collective.

    Args:
        error: What went wrong on this rank.
        value: A JSON value to share if all is well.

    Returns:
        The values of all ranks.

    Raises:
        CorruptCheckpoint: A rank has found damage; every rank raises this.
        CheckpointConflict: A rank was fenced; every rank raises this.
        StorageError: A rank could not read or write; every rank raises this.
        ResumeRefused: The checkpoint is of another model; every rank raises this.
        Exception: Another error of this rank, unchanged; the other ranks raise ``PhalanxError``.
    """
    rank, _ = rank_and_world()
    reports = gather([_describe(error), None if error is not None else value])
    failed = [(index, report[0]) for index, report in enumerate(reports) if report[0] is not None]
    if not failed:
        return [report[1] for report in reports]
    if error is not None:
        raise error
    index, description = failed[0]
    raise revive(description, f"rank {index}: " if index != rank else "")


def _describe(error: Exception | None) -> dict[str, str] | None:
    if error is None:
        return None
    if isinstance(error, CorruptCheckpoint):
        kind = next(name for name, cls in _UNFIT.items() if isinstance(error, cls))
        return {"kind": kind, "path": error.path, "why": error.reason}
    kind = next((name for name, cls in _KINDS.items() if isinstance(error, cls)), "other")
    if isinstance(error, PhalanxError):
        return {"kind": kind, "what": error.what, "why": error.why, "hint": error.hint}
    return {"kind": kind, "what": f"{type(error).__name__}: {error}", "why": "", "hint": ""}


def revive(description: dict[str, str], where: str = "") -> PhalanxError:
    """The error that another process has described."""
    kind = description["kind"]
    if kind in _UNFIT:
        return _UNFIT[kind](description["path"], where + description["why"])
    cls = _KINDS.get(kind, PhalanxError)
    return cls(where + description["what"], why=description["why"], hint=description["hint"])


def gang_weights_digest(manifest: str | Location) -> str:
    """The digest of the weights of a checkpoint, each rank reading a share of them. Collective.

    Raises:
        CorruptCheckpoint: What is stored is damaged; on every rank.
        StorageError: It cannot be read; on every rank.
    """
    rank, world = rank_and_world()
    error, share = None, None
    try:
        share = partial_digest(manifest, rank, world)
    except StorageError as caught:
        error = caught
    return combine_digests(read_manifest(manifest), agree(error, share))


def device() -> torch.device:
    """Where tensors have to be that ranks send to each other."""
    if "gloo" in dist.get_backend():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())

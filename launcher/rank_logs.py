"""Reading the log of a rank: from the run directory when a copy is there, else from the agent on the rank's node."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths
from launcher.host import announce, wire
from launcher.host.logs import read_piece
from launcher.host.reader import LogReader
from strategies.errors import ClusterError, NotFound, StorageError

TIMEOUT_S = 3.0
PIECE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a log.

    Attributes:
        text: The part.
        begin: Offset at which it begins, in bytes; less than was asked for when the log has been cut meanwhile.
        next: Offset of what follows, in bytes.
        source: Where it comes from, for people.
    """

    text: str
    begin: int
    next: int
    source: str


def read(paths: RunPaths, attempt: int, rank: int, offset: int) -> Piece | None:
    """One piece of a log; None when nobody has it.

    Args:
        paths: The run.
        attempt: The attempt.
        rank: The rank.
        offset: Where to begin, in bytes.
    """
    live = _from_agent(paths, attempt, rank, offset)
    return live if live is not None else _from_file(paths.rank_log(attempt, rank), offset)


def read_all(paths: RunPaths, attempt: int, rank: int) -> Piece | None:
    """A whole log as of now."""
    texts: list[str] = []
    offset, source = 0, None
    while (piece := read(paths, attempt, rank, offset)) is not None:
        source = piece.source
        texts.append(piece.text)
        if piece.next <= offset:
            break
        offset = piece.next
    return Piece(text="".join(texts), begin=0, next=offset, source=source) if source is not None else None


def existing(paths: RunPaths) -> list[tuple[int, int]]:
    """(attempt, rank) of every log in the run directory."""
    found = []
    for path in paths.attempts.glob("*/rank-*.log"):
        rank = path.stem.removeprefix("rank-")
        if path.parent.name.isdigit() and rank.isdigit():
            found.append((int(path.parent.name), int(rank)))
    return sorted(found)


def missing(paths: RunPaths, name: str, attempt: int, rank: int) -> NotFound:
    """The error for a log that nobody has, with what there is."""
    there = [f"attempt {a} rank {r}" for a, r in existing(paths)]
    return NotFound(
        f"There is no log of rank {rank} in attempt {attempt} of '{name}'.",
        why="it is not in the run directory, and no agent that is alive has it",
        hint=f"There are: {', '.join(there)}." if there else "No log has been brought to the run directory yet.",
    )


def _from_file(path: Path, offset: int) -> Piece | None:
    try:
        data, begin, _ = read_piece(path, offset, PIECE_BYTES)
    except OSError:
        return None
    return Piece(text=data.decode(errors="replace"), begin=begin, next=begin + len(data), source=str(path))


def _from_agent(paths: RunPaths, attempt: int, rank: int, offset: int) -> Piece | None:
    node = _node_of(paths, attempt, rank)
    address = announce.read(announce.path_of(paths, node)) if node else None
    if address is None:
        return None
    try:
        with LogReader(address, wire.read_secret(paths.secret), timeout_s=TIMEOUT_S) as reader:
            found = reader.read(attempt, rank, offset, PIECE_BYTES)
    except (ClusterError, NotFound, StorageError):
        return None
    return Piece(text=found.text, begin=found.offset, next=found.next, source=f"node {address.node}")


def _node_of(paths: RunPaths, attempt: int, rank: int) -> str | None:
    try:
        rows = json.loads(paths.ranks(attempt).read_text())
    except (OSError, ValueError):
        return None
    return next((str(row["node"]) for row in rows if row["rank"] == rank), None)


def newest_attempt(run: Any) -> int:
    """Number of the newest attempt; 0 for none."""
    return run.attempt.number if run.attempt else 0

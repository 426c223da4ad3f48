"""One shard: a safetensors file whose header carries the slice table and the digests of its data.

The file is read and written here rather than by the safetensors package, because digests are taken while writing and
because a reader of another plan wants byte ranges (the package's own reader opens our files; a test proves it).

The digest of a shard is the SHA-256 of its header, and the header holds the SHA-256 of every block of
:data:`BLOCK_ELEMENTS` elements of every tensor. So the one digest in the manifest vouches for every byte, each byte is
hashed once, and a reader that needs a part verifies just the blocks it touches. No torch, no numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.checkpoint.storage import storage_of
from jobs.location import Location

KINDS = ("master", "exp_avg", "exp_avg_sq")
BLOCK_ELEMENTS = 1 << 20
ELEMENT_BYTES = 4  # float32, little-endian
SHARD_VERSION = 1
_MAX_HEADER_BYTES = 1 << 30
_GLANCE_BYTES = 1 << 16  # most headers are shorter: one read instead of two


class DamagedShard(Exception):
    """A shard is not what its digest promises; the message names the file and the difference."""


class MissingShard(DamagedShard):
    """There is no such file; perhaps its file system is not mounted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A piece of a global tensor: the elements [start, stop), in row-major order, of a box of it.

    Attributes:
        name: Global name of the tensor.
        shape: Its global shape, without vocabulary padding.
        box: Per dimension, [from, to) of the part that the piece is cut from.
        start: First element of the piece, counted inside the box.
        stop: One past its last element.
    """

    name: str
    shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSlice:
    """A slice in a shard.

    Attributes:
        slice: What it is.
        offsets: Per kind, the byte offset of its data in the file.
        blocks: Per kind, the SHA-256 of each block.
    """

    slice: Slice
    offsets: Mapping[str, int]
    blocks: Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        path: The file.
        slices: The slice table.
        rank_state: State of the writing rank that belongs to no tensor (random number generators).
    """

    path: Location
    slices: tuple[StoredSlice, ...]
    rank_state: Mapping[str, Any] = field(default_factory=dict)


def write_shard(
    path: Location,
    pieces: Sequence[tuple[Slice, Mapping[str, memoryview]]],
    rank_state: Mapping[str, Any],
    *,
    table: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[int, str]:
    """Write a new shard, durably.

    Args:
        path: The file, which must not exist.
        pieces: Each slice with the bytes of every kind of :data:`KINDS`.
        rank_state: JSON values to keep beside the slices.
        table: The :func:`slice_table` of the pieces, if it is known already.

    Returns:
        Size in bytes, and digest.

    Raises:
        FileExistsError: It exists.
        OSError: It cannot be written; nothing is left of it.
        StorageError: Nothing here can reach such a place.
    """
    header = _encode_header(pieces, slice_table(pieces) if table is None else table, rank_state)
    parts = [memoryview(header), *(data[kind] for kind in KINDS for _, data in pieces)]
    return storage_of(path).create(path, parts), hashlib.sha256(header).hexdigest()


def slice_table(pieces: Sequence[tuple[Slice, Mapping[str, memoryview]]]) -> list[dict[str, Any]]:
    """What a header says of its slices: what they are, and the digests of their blocks. Reads every byte."""
    return [
        {
            "name": piece.name,
            "shape": piece.shape,
            "box": piece.box,
            "range": (piece.start, piece.stop),
            "blocks": {kind: _digests(data[kind].cast("B")) for kind in KINDS},
        }
        for piece, data in pieces
    ]


def content_digest(table: Sequence[Mapping[str, Any]]) -> str:
    """The digest of slices and data alone, whatever else the file holds."""
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _encode_header(
    pieces: Sequence[tuple[Slice, Mapping[str, memoryview]]],
    table: Sequence[Mapping[str, Any]],
    rank_state: Mapping[str, Any],
) -> bytes:
    tensors: dict[str, Any] = {}
    offset = 0
    for kind in KINDS:  # by kind, so that a reader of weights only reads one contiguous part
        for piece, _ in pieces:
            end = offset + piece.elements * ELEMENT_BYTES
            tensors[f"{kind}/{piece.name}"] = {
                "dtype": "F32",
                "shape": [piece.elements],
                "data_offsets": [offset, end],
            }
            offset = end
    ours = {"version": SHARD_VERSION, "slices": list(table), "rank_state": dict(rank_state)}
    text = json.dumps({"__metadata__": {"format": "pt", "phalanx": json.dumps(ours)}, **tensors}).encode()
    text += b" " * (-len(text) % 8)  # data stays aligned
    return len(text).to_bytes(8, "little") + text


def _digests(data: memoryview) -> list[str]:
    step = BLOCK_ELEMENTS * ELEMENT_BYTES
    return [hashlib.sha256(data[at : at + step]).hexdigest() for at in range(0, len(data), step)]


def read_header(path: Location, *, size: int, digest: str) -> ShardHeader:
    """Read and verify the header of a shard.

    Args:
        path: The file.
        size: Bytes that it must have.
        digest: Digest that its header must have.

    Raises:
        MissingShard: It is not there.
        DamagedShard: It does not match.
        OSError: It cannot be read.
    """
    storage = storage_of(path)
    try:
        found = storage.size(path)
        if found != size:
            raise DamagedShard(f"{path} has {found} bytes instead of {size}")
        start = storage.read(path, 0, min(size, _GLANCE_BYTES))
        prefix, text = start[:8], start[8:]
        length = int.from_bytes(prefix, "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise DamagedShard(f"{path}: the header claims {length} bytes")
        text = text[:length] if len(text) >= length else text + storage.read(path, len(start), 8 + length)
    except FileNotFoundError:
        raise MissingShard(f"{path} is missing") from None
    if hashlib.sha256(prefix + text).hexdigest() != digest:
        raise DamagedShard(f"{path}: the header does not match its digest")
    return _decode_header(path, json.loads(text), data_start=8 + length)


def _decode_header(path: Location, document: dict[str, Any], *, data_start: int) -> ShardHeader:
    # The digest has vouched for the content, so what is wrong here is a newer version, not damage.
    ours = json.loads(document["__metadata__"]["phalanx"])
    if ours["version"] != SHARD_VERSION:
        raise DamagedShard(f"{path} has format version {ours['version']}, and this program reads {SHARD_VERSION}")
    slices = tuple(
        StoredSlice(
            slice=Slice(
                name=row["name"],
                shape=tuple(row["shape"]),
                box=tuple((low, high) for low, high in row["box"]),
                start=row["range"][0],
                stop=row["range"][1],
            ),
            offsets={kind: data_start + document[f"{kind}/{row['name']}"]["data_offsets"][0] for kind in KINDS},
            blocks=row["blocks"],
        )
        for row in ours["slices"]
    )
    return ShardHeader(path=path, slices=slices, rank_state=ours["rank_state"])


def read_block(header: ShardHeader, stored: StoredSlice, kind: str, index: int) -> bytes:
    """Read and verify one block of one kind of a slice.

    Raises:
        DamagedShard: The block does not match its digest.
        OSError: The file cannot be read.
    """
    first = index * BLOCK_ELEMENTS
    count = min(BLOCK_ELEMENTS, stored.slice.elements - first)
    start = stored.offsets[kind] + first * ELEMENT_BYTES
    data = storage_of(header.path).read(header.path, start, start + count * ELEMENT_BYTES)
    if hashlib.sha256(data).hexdigest() != stored.blocks[kind][index]:
        raise DamagedShard(f"{header.path}: block {index} of {kind}/{stored.slice.name} does not match its digest")
    return data


def block_count(stored: StoredSlice) -> int:
    """Number of blocks per kind of a slice."""
    return math.ceil(stored.slice.elements / BLOCK_ELEMENTS)

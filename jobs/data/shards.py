"""The shards of a source: what one worker makes of one unit, and how ranks read all of them as one row of tokens.

A shard is two files of little-endian tokens, one to train on and one to validate with, and a record that is written
last: without its record a shard does not exist, so that a killed worker leaves nothing that could be taken for one.
Two workers that make the same shard at once write the same bytes and rename them into place: neither harms the other.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.checkpoint.layout import sync_dir
from jobs.data.documents import Findings, Piece, read_part
from jobs.data.sources import Unit
from jobs.data.spelling import Plain
from jobs.data.store import file_digest
from strategies.codec import from_json, to_json
from strategies.errors import ConfigError, StorageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FORMAT_VERSION = 1
META = "meta.json"
TRAIN, VALID = "train", "valid"
SIDES = (TRAIN, VALID)
BATCH_BYTES = 2 << 20
_BUCKETS = 1 << 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One file of a shard.

    Attributes:
        count: Tokens in it.
        digest: SHA-256 of the file.
        documents: Documents that end in it.
    """

    count: int
    digest: str
    documents: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """What was made of one unit.

    Attributes:
        train: What is trained on.
        valid: What is validated with.
    """

    train: Side
    valid: Side


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceMeta:
    """What ``meta.json`` of a source says; it is written once all shards are there.

    Attributes:
        version: Version of this format.
        digest: SHA-256 over the digests of all shards.
        width: Bytes per token, 2 or 4.
        vocab: Tokens of the tokenizer.
        end_id: The token that ends a document.
        tokenizer_digest: SHA-256 of ``tokenizer.json``.
        source: What was tokenized, for people.
        text_bytes: Length of its text.
        empty: Documents without any text, left out.
        skipped: Files left out because they are not text.
        shards: All of them, in order.
    """

    version: int = FORMAT_VERSION
    digest: str
    width: int
    vocab: int
    end_id: int
    tokenizer_digest: str
    source: str
    text_bytes: int
    empty: int
    skipped: int
    shards: tuple[Shard, ...]

    def side(self, name: str) -> list[Side]:
        """One side of all shards."""
        return [getattr(shard, name) for shard in self.shards]

    def tokens(self, name: str) -> int:
        """Tokens of one side."""
        return sum(side.count for side in self.side(name))

    def documents(self, name: str) -> int:
        """Documents of one side."""
        return sum(side.documents for side in self.side(name))


def file_of(folder: Path, number: int, side: str) -> Path:
    """Where one side of a shard lies."""
    return folder / f"{number:05d}.{side}.bin"


def record_of(folder: Path, number: int) -> Path:
    """Where the record of a shard lies."""
    return folder / f"{number:05d}.json"


def read_shard(folder: Path, number: int) -> Shard | None:
    """A shard that is whole; None if it has to be made."""
    try:
        shard = from_json(Shard, json.loads(record_of(folder, number).read_text(encoding="utf-8")))
        width = int((folder / "width").read_text())
        sizes = [file_of(folder, number, side).stat().st_size for side in SIDES]
    except (OSError, ValueError, ConfigError):
        return None
    return shard if sizes == [shard.train.count * width, shard.valid.count * width] else None


def is_whole(shard: Shard, folder: Path, number: int) -> bool:
    """Whether the files of a shard are byte by byte what was made; reads them."""
    try:
        return all(file_digest(file_of(folder, number, side)) == getattr(shard, side).digest for side in SIDES)
    except OSError:
        return False


def side_of(head: bytes, validation: float) -> str:
    """Which side a document is on: a function of its beginning, so that equal documents are on the same."""
    bucket = int.from_bytes(hashlib.blake2b(head, digest_size=4).digest(), "little")
    return VALID if bucket < validation * _BUCKETS else TRAIN


def make_shard(
    unit: Unit, folder: Path, number: int, *, tokenizer: Plain, end_id: int, width: int, validation: float
) -> Shard:
    """Tokenize a unit into a shard.

    Args:
        unit: What to read.
        folder: Folder of the source's store.
        number: Number of the shard.
        tokenizer: Reads text.
        end_id: Token to put after each document.
        width: Bytes per token.
        validation: Part of the documents that is validated with.

    Raises:
        OSError: Something cannot be read or written.
    """
    _sweep(folder, number)
    with contextlib.ExitStack() as stack:
        writers = {side: stack.enter_context(_Writer(file_of(folder, number, side), end_id, width)) for side in SIDES}
        side = TRAIN
        for batch in _batches(unit):
            for piece, ids in zip(batch, tokenizer.batch([piece.text for piece in batch]), strict=True):
                if piece.head is not None:
                    side = side_of(piece.head, validation) if validation else TRAIN
                writers[side].add(ids, ends=piece.last)
        sides = {name: writer.close() for name, writer in writers.items()}
    shard = Shard(**sides)
    write_whole(record_of(folder, number), json.dumps(to_json(shard)).encode())
    sync_dir(folder)
    return shard


def _batches(unit: Unit) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for part in unit.parts:
        for piece in read_part(unit.kind, unit.field, part, Findings()):
            batch.append(piece)
            size += len(piece.text)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """One side of a shard, written aside and renamed into place when it is whole."""

    def __init__(self, path: Path, end_id: int, width: int) -> None:
        import numpy as np

        self._path, self._aside = path, _aside(path)
        self._array, self._type = np.array, np.dtype(f"<u{width}")
        self._end = np.array([end_id], dtype=self._type).tobytes()
        self._width = width
        self._digest = hashlib.sha256()
        self._size = self._documents = 0

    def __enter__(self) -> _Writer:
        self._file = self._aside.open("wb")
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)

    def add(self, ids: list[int], *, ends: bool) -> None:
        """Write the tokens of a piece; ``ends`` a document."""
        data = self._array(ids, dtype=self._type).tobytes() + (self._end if ends else b"")
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)
        self._documents += ends

    def close(self) -> Side:
        """Make it durable and visible."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._aside, self._path)
        return Side(count=self._size // self._width, digest=self._digest.hexdigest(), documents=self._documents)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file aside and put it in place: whoever reads it meanwhile finds the former one, or all of this."""
    aside = _aside(path)
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _sweep(folder: Path, number: int) -> None:
    """Remove what killed workers of this host left of a shard."""
    for left in folder.glob(f".{number:05d}.*.{socket.gethostname()}.*"):
        pid = left.name.rpartition(".")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            left.unlink(missing_ok=True)


def open_store(folder: Path, width: int) -> None:
    """Make the folder of a source whose shards are to be made; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "width", str(width).encode())


def close_store(folder: Path, meta: SourceMeta) -> None:
    """All shards are there: say so."""
    write_whole(folder / META, (json.dumps(to_json(meta), indent=1) + "\n").encode())
    sync_dir(folder)
    sync_dir(folder.parent)


def digest_of(shards: Iterable[Shard], *, tokenizer: str, end_id: int, width: int) -> str:
    """Digest of a source's tokens and of what they stand for (``tokenizer``: the digest of that)."""
    digest = hashlib.sha256(f"{FORMAT_VERSION}|{tokenizer}|{end_id}|{width}".encode())
    for shard in shards:
        digest.update(f"|{shard.train.digest}|{shard.valid.digest}".encode())
    return digest.hexdigest()


def read_source(folder: Path) -> SourceMeta:
    """Read ``meta.json`` of a source and check it against the sizes of its files.

    Raises:
        StorageError: The store is missing, unreadable, damaged, or of another version.
    """
    try:
        meta = from_json(SourceMeta, json.loads((folder / META).read_text(encoding="utf-8")), where=META)
        for number, shard in enumerate(meta.shards):
            for side in SIDES:
                wanted = getattr(shard, side).count * meta.width
                size = file_of(folder, number, side).stat().st_size
                if size != wanted:
                    raise ValueError(f"{file_of(folder, number, side).name} has {size} bytes, not {wanted}")
    except (OSError, ValueError, ConfigError) as error:
        raise broken(folder, str(error).splitlines()[0]) from error
    if meta.version != FORMAT_VERSION:
        raise broken(folder, f"its format is version {meta.version}, this phalanx reads {FORMAT_VERSION}")
    return meta


def broken(folder: Path, reason: str) -> StorageError:
    """The error for a store that cannot be used."""
    return StorageError(
        f"The token store {folder} cannot be used.",
        why=f"{reason}.",
        hint="Check that the folder is shared by all nodes; remove it and submit again to prepare it anew.",
    )


class Tokens:
    """All tokens of one side of a source, mapped shard by shard.

    Args:
        folder: Folder of the source's store.
        meta: What it says of itself.
        side: ``train`` or ``valid``.
    """

    def __init__(self, folder: Path, meta: SourceMeta, side: str) -> None:
        self._folder, self._meta, self._side = folder, meta, side
        self._starts = [0, *itertools.accumulate(one.count for one in meta.side(side))]
        self._maps: dict[int, npt.NDArray[np.unsignedinteger[Any]]] = {}
        self.count = self._starts[-1]

    def slice(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens ``start`` to ``stop``; raises StorageError when a shard is gone."""
        import numpy as np

        out = np.empty(stop - start, dtype=np.int64)
        at = start
        while at < stop:
            number = bisect.bisect_right(self._starts, at) - 1
            first, end = self._starts[number], min(stop, self._starts[number + 1])
            out[at - start : end - start] = self._shard(number)[at - first : end - first]
            at = end
        return out

    def _shard(self, number: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        import numpy as np

        if number not in self._maps:
            path = file_of(self._folder, number, self._side)
            try:
                self._maps[number] = np.memmap(path, dtype=f"<u{self._meta.width}", mode="r")
            except (OSError, ValueError) as error:
                raise broken(self._folder, str(error)) from error
        return self._maps[number]

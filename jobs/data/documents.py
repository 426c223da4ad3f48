"""The documents of a part of a file: text, JSON lines, Parquet, Arrow; plain or compressed (``.gz``, ``.zst``)."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from jobs.data.corpus import PIECE_BYTES, character_start
from strategies.errors import ConfigError, StorageError

HEAD_BYTES = 1 << 16  # of a document, which decide whether it is trained on
COMPRESSED = (".gz", ".zst")
SHOWN = 3
_DAMAGE = (OSError, EOFError, ValueError, NotImplementedError, zlib.error)  # Arrow's are among them


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of a file that can be read without the rest of it.

    Attributes:
        path: The file.
        start: Where it starts: bytes (text, JSON lines), row groups (Parquet) or record batches (Arrow).
        stop: Where it ends, exclusive; -1 is the end of the file. A line belongs to the part it starts in.
    """

    path: str
    start: int = 0
    stop: int = -1


class Piece(NamedTuple):
    """Text of a document, whole or cut after a line.

    Attributes:
        text: The text.
        head: What decides about the document, at its first piece in this part; else None.
        last: The document ends here.
    """

    text: str
    head: bytes | None
    last: bool


@dataclass(kw_only=True, slots=True)
class Findings:
    """What reading a part has shown.

    Attributes:
        lines: Lines or rows read (not of text).
        empty: Documents without any text, which are left out.
        bad: Records that cannot be used.
        problems: The first of those: (line or row, counted from 1 within the part, and what is wrong).
        binary: It holds NUL bytes, hence is not text.
    """

    lines: int = 0
    empty: int = 0
    bad: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)
    binary: bool = False

    def complain(self, place: int, what: str) -> None:
        """Count a record that cannot be used."""
        self.bad += 1
        if len(self.problems) < SHOWN:
            self.problems.append((place, what))


def read_part(kind: str, name: str, part: Part, found: Findings) -> Iterator[Piece]:
    """Every document of a part.

    Args:
        kind: ``text``, ``jsonl``, ``parquet`` or ``arrow``.
        name: Field of a record that holds the text.
        part: What to read.
        found: Told what was left out.

    Raises:
        StorageError: The file cannot be read, or is damaged; it is named.
    """
    try:
        yield from _text(part, found) if kind == "text" else _records(kind, name, part, found)
    except _DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise StorageError(f"{part.path}: cannot be read, or not to its end ({reason.splitlines()[0]})") from error


def _records(kind: str, name: str, part: Part, found: Findings) -> Iterator[Piece]:
    for text in _json_lines(part, name, found) if kind == "jsonl" else _rows(kind, part, name, found):
        if text and not text.isspace():
            yield Piece(text, text[:HEAD_BYTES].encode("utf-8", "replace")[:HEAD_BYTES], True)
        else:
            found.empty += 1


def open_bytes(path: str) -> IO[bytes]:
    """A file as it was before it was compressed."""
    if path.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.endswith(".zst"):
        return io.BufferedReader(arrow().input_stream(path, compression="zstd"), PIECE_BYTES)
    return Path(path).open("rb")  # the caller's to close


def arrow(module: str = "pyarrow") -> Any:
    """The library that reads Parquet, Arrow and zstd.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "Parquet, Arrow and .zst files need pyarrow.",
            why="It is not installed here.",
            hint="pip install 'phalanx[train]'",
        ) from error


def _span(file: IO[bytes], part: Part) -> tuple[int, int]:
    """Where the lines that start in the part begin and end; an end of -1 is that of the file."""
    stop = -1 if part.stop < 0 else _line_start(file, part.stop)
    start = _line_start(file, part.start) if part.start else 0
    if part.start or part.stop >= 0:
        file.seek(start)
    return start, stop


def _line_start(file: IO[bytes], offset: int) -> int:
    """The first place from ``offset`` on at which a line starts; the end of the file if there is none."""
    file.seek(offset - 1)
    while (rest := file.readline(PIECE_BYTES)) and not rest.endswith(b"\n"):
        pass
    return file.tell()


def _json_lines(part: Part, name: str, found: Findings) -> Iterator[str]:
    with open_bytes(part.path) as file:
        at, stop = _span(file, part)
        while (stop < 0 or at < stop) and (line := file.readline()):
            at += len(line)
            found.lines += 1
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                found.complain(found.lines, f"is not JSON ({str(error).partition(':')[0]})")
                continue
            except RecursionError:
                found.complain(found.lines, "is nested too deeply")
                continue
            text = _field(record, name, found, found.lines)
            if text is not None:
                yield text


def _field(record: Any, name: str, found: Findings, place: int) -> str | None:
    if not isinstance(record, dict):
        found.complain(place, f"is no record but {type(record).__name__}")
    elif name not in record:
        known = ", ".join(map(str, list(record)[:8])) or "none"
        found.complain(place, f"has no field {name!r} (its fields: {known})")
    elif record[name] is None:
        return ""
    elif not isinstance(record[name], str):
        found.complain(place, f"has no text in {name!r} but {type(record[name]).__name__}")
    else:
        return _characters(record[name])
    return None


def _characters(text: str) -> str:
    """Text with U+FFFD for every half of a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _text(part: Part, found: Findings) -> Iterator[Piece]:
    """One document per file, or what of it starts in the part."""
    with open_bytes(part.path) as file:
        head: bytes | None = file.read(HEAD_BYTES)
    held = ""
    with open_bytes(part.path) as file:
        start, stop = _span(file, part)
        for text in _blocks(file, stop - start if stop >= 0 else -1, found):
            if held:
                yield Piece(held, head, False)
                head = None
            held = text
        ends = not file.read(1)
    if held and (head is None or not held.isspace()):
        yield Piece(held, head, ends)
    elif not part.start and ends:
        found.empty += 1


def _blocks(file: IO[bytes], size: int, found: Findings) -> Iterator[str]:
    """``size`` bytes (-1: all) as text of about :data:`PIECE_BYTES` each, cut after a line where there is one."""
    rest = b""
    while block := file.read(PIECE_BYTES if size < 0 else min(PIECE_BYTES, size)):
        size -= len(block) if size > 0 else 0
        found.binary = found.binary or b"\0" in block
        rest += block
        if len(block) == PIECE_BYTES:
            cut = rest.rfind(b"\n") + 1 or character_start(rest)
            yield rest[:cut].decode("utf-8", "replace")
            rest = rest[cut:]
    if rest:
        yield rest.decode("utf-8", "replace")


def _rows(kind: str, part: Part, name: str, found: Findings) -> Iterator[str]:
    for column in _columns(kind, part, name):
        for value in column.to_pylist():
            found.lines += 1
            if value is None or isinstance(value, str):
                yield value or ""
            else:
                found.complain(found.lines, f"has no text in {name!r} but {type(value).__name__}")


def _columns(kind: str, part: Part, name: str) -> Iterator[Any]:
    if kind == "parquet":
        with arrow("pyarrow.parquet").ParquetFile(part.path) as file:
            groups = list(range(part.start, file.num_row_groups if part.stop < 0 else part.stop))
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[name]):
                yield batch.column(0)
        return
    with batches(part.path) as stream:
        for number, batch in enumerate(stream):
            if part.start <= number and (part.stop < 0 or number < part.stop):
                yield batch.column(name)


def batches(path: str) -> Any:
    """Record batches of an Arrow file in either of its two formats; a context manager that iterates."""
    library = arrow()
    source = library.memory_map(path)
    try:
        return _FileBatches(library.ipc.open_file(source))
    except library.ArrowInvalid:
        source.seek(0)
        return library.ipc.open_stream(source)


class _FileBatches:
    """The random-access format, read in order."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.schema = reader.schema

    def __enter__(self) -> _FileBatches:
        return self

    def __exit__(self, *unused: object) -> None:
        return None

    def __iter__(self) -> Iterator[Any]:
        return (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))

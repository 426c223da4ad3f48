"""From what a person calls a source to the files it is made of, cut into units of work of about equal size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.data.documents import COMPRESSED, Part, arrow, batches
from jobs.data.kinds import EXTENSIONS
from jobs.data.layout import choose
from jobs.spec import SourceSpec
from strategies.errors import ConfigError, StorageError

UNIT_BYTES = 2 << 20  # so small that a kill costs little and that all workers end together, on small corpora, too
MAX_UNITS = 4096  # of a source: more shards than that are too many files


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What one worker does at once.

    Attributes:
        kind: How documents lie in the parts: ``text``, ``jsonl``, ``parquet`` or ``arrow``.
        field: Field of a record that holds the text.
        parts: What to read, in order.
        size: About how many bytes that are.
    """

    kind: str
    field: str
    parts: tuple[Part, ...]
    size: int


def default_name(source: SourceSpec) -> str:
    """What a source is called when nobody says it: the last part of its path."""
    name = Path(source.path).name
    for ending in (*COMPRESSED, *(one for some in EXTENSIONS.values() for one in some), ".txt"):
        name = name.removesuffix(ending)
    named = name or source.kind
    return f"{named}-{source.config.replace('/', '-')}" if source.config else named


def units(source: SourceSpec) -> list[Unit]:
    """All there is to do for a source, in the order of its documents.

    Raises:
        ConfigError: It is missing or holds nothing of its kind, or its records have no such field, or nobody can tell
            which of its splits is meant.
        StorageError: A folder or file cannot be read.
    """
    chosen = choose(source)
    kind, paths = chosen.kind, chosen.paths
    limit = max(UNIT_BYTES, sum(_size(path) for path in paths) // MAX_UNITS)
    found: list[Unit] = []
    gathered: list[Part] = []
    size = 0
    for path in paths:
        for part, weight in _parts(kind, path, source.field, limit):
            if gathered and size + weight > limit:
                found.append(Unit(kind=kind, field=source.field, parts=tuple(gathered), size=size))
                gathered, size = [], 0
            gathered.append(part)
            size += weight
    if gathered:
        found.append(Unit(kind=kind, field=source.field, parts=tuple(gathered), size=size))
    return found


def held_out(source: SourceSpec) -> str:
    """What of a dataset's folder is taken and what is left out of it, in a line; "" for nothing.

    Raises:
        ConfigError, StorageError: As :func:`units`.
    """
    return choose(source).note


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error


def _parts(kind: str, path: Path, field: str, limit: int) -> Iterator[tuple[Part, int]]:
    """A file in parts of at most about ``limit`` bytes, with the bytes of each."""
    size = _size(path)
    try:
        if kind in ("parquet", "arrow"):
            fields, count = _table(kind, path)
            if field not in fields:
                raise ConfigError(f"{path}: has no field {field!r} (its fields: {', '.join(fields) or 'none'})")
            step = max(1, count * limit // max(1, size))
        elif path.name.endswith(COMPRESSED) or size <= limit:
            yield Part(path=str(path)), size
            return
        else:
            count, step = size, -(-size // -(-size // limit))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error
    for start in range(0, count, step):
        stop = start + step
        share = size * (min(stop, count) - start) // count
        yield Part(path=str(path), start=start, stop=-1 if stop >= count else stop), share


def _table(kind: str, path: Path) -> tuple[list[str], int]:
    """Fields of a table, and how many row groups or record batches it has."""
    library = arrow()
    try:
        if kind == "parquet":
            with arrow("pyarrow.parquet").ParquetFile(path) as file:
                return list(file.schema_arrow.names), int(file.num_row_groups)
        with batches(str(path)) as stream:
            return list(stream.schema.names), sum(1 for _ in stream)
    except library.ArrowInvalid as error:
        raise ConfigError(f"{path}: is not {kind} ({str(error).splitlines()[0]})") from error

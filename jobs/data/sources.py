"""From what a person calls a source to the files it is made of, cut into units of work of about equal size."""

from __future__ import annotations

import json
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.data.corpus import GENERATED, SKIPPED_FOLDERS, walk
from jobs.data.documents import COMPRESSED, Part, arrow, batches
from jobs.data.splits import TRAIN, trained
from jobs.spec import SourceSpec
from strategies.errors import ConfigError, StorageError

KINDS = ("auto", "text", "jsonl", "parquet", "arrow", "stdlib")
UNIT_BYTES = 2 << 20  # so small that a kill costs little and that all workers end together, on small corpora, too
MAX_UNITS = 4096  # of a source: more shards than that are too many files
_EXTENSIONS = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather"),
}
_DATASET = "dataset_info.json"  # in a folder that Hugging Face's save_to_disk made
_SPLITS = "dataset_dict.json"


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
    for ending in (*COMPRESSED, *(one for some in _EXTENSIONS.values() for one in some), ".txt"):
        name = name.removesuffix(ending)
    return name or source.kind


def units(source: SourceSpec) -> list[Unit]:
    """All there is to do for a source, in the order of its documents.

    Raises:
        ConfigError: It is missing or holds nothing of its kind, or its records have no such field, or nobody can tell
            which of its splits is meant.
        StorageError: A folder or file cannot be read.
    """
    kind, paths, _ = _files(source)
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
    """What of a dataset's folder is left out because it is not the split to train on, in a line; "" for nothing.

    Raises:
        ConfigError, StorageError: As :func:`units`.
    """
    left = _files(source)[2]
    told = " and ".join(f"{split} ({number} {'file' if number == 1 else 'files'})" for split, number in left.items())
    return f"of {source.path} the split {TRAIN} is taken, {told} left out" if told else ""


def _files(source: SourceSpec) -> tuple[str, list[Path], Mapping[str, int]]:
    """The kind of a source, its files, and how many are left out by the split that they are of."""
    if source.kind == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return "text", walk(root, suffix=".py", skipped=SKIPPED_FOLDERS | GENERATED), {}
    root = Path(source.path).expanduser().absolute()
    if not root.exists():
        raise ConfigError(f"{root}: there is no such file or folder")
    if not root.is_dir():
        kind = _kind_of(root) if source.kind == "auto" else source.kind
        return kind, [root], {}
    if source.kind in ("auto", "arrow") and (dataset := _dataset(root)):
        return "arrow", [dataset / name for name in _shards(dataset)], {}
    paths = walk(root)
    kind = _kind_of_all(root, paths) if source.kind == "auto" else source.kind
    chosen = [path for path in paths if kind == "text" or _kind_of(path) == kind]
    if not chosen:
        raise ConfigError(f"{root}: holds no files of kind {kind} ({len(paths)} files were found)")
    if source.kind == "text":
        return kind, chosen, {}  # a folder of any texts, asked for as such
    return kind, *trained(root, chosen, strict=kind != "text")


def _kind_of_all(root: Path, paths: Sequence[Path]) -> str:
    """The kind of all files of a folder; nothing of it is left out unasked.

    Raises:
        ConfigError: They are of more than one kind.
    """
    kinds = Counter(_kind_of(path) for path in paths)
    if kinds.keys() == {"text", "jsonl"} and all(
        _plain(path).endswith(".json") for path in paths if _kind_of(path) == "jsonl"
    ):
        return "text"  # beside text such a file is most likely none of JSON lines
    if len(kinds) > 1:
        told = ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds))
        raise ConfigError(
            f"{root}: holds files of more than one kind ({told}). Say which is meant, kind: "
            f"{' or '.join(sorted(kinds))}, or give each a source and a folder of its own"
        )
    return next(iter(kinds), "text")


def _plain(path: Path) -> str:
    """The name of a file without what says how it is compressed."""
    name = path.name
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name


def _kind_of(path: Path) -> str:
    name = _plain(path)
    return next((kind for kind, endings in _EXTENSIONS.items() if name.endswith(endings)), "text")


def _dataset(root: Path) -> Path | None:
    """The folder of a Hugging Face dataset: itself, or its ``train`` split."""
    if (root / _SPLITS).is_file():
        splits = list(_read(root / _SPLITS).get("splits", []))
        if "train" not in splits:
            raise ConfigError(f"{root}: has no split 'train'; give the folder of one of {', '.join(splits) or 'none'}")
        return root / "train"
    return root if (root / _DATASET).is_file() else None


def _shards(dataset: Path) -> list[str]:
    state = _read(dataset / "state.json")
    try:
        return [str(one["filename"]) for one in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{dataset / 'state.json'}: does not name the files of a dataset (_data_files)") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    return value if isinstance(value, dict) else {}


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

"""How documents lie in a file, by its name, and which files that lie beside documents are none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jobs.data.documents import COMPRESSED
from jobs.data.splits import as_texts
from strategies.errors import ConfigError

KINDS = ("auto", "text", "jsonl", "parquet", "arrow", "stdlib")
EXTENSIONS = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather"),
}
_TABLES = (".csv", ".tsv")  # nobody reads them here, and as a text their commas would be trained on
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|authors|changelog|contributing|code_of_conduct)"
    r"([-_]\w+)?(\.(md|txt|rst|cff|bib))?"
)


def kind_of(path: Path) -> str:
    """The kind of a file by its name; ``table`` is one that cannot be read."""
    name = path.name
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    if name.endswith(_TABLES):
        return "table"
    return next((kind for kind, endings in EXTENSIONS.items() if name.endswith(endings)), "text")


def is_about(path: Path) -> bool:
    """Whether a file tells about the documents that lie beside it: a card, a licence, a table of contents."""
    name = path.name.lower()
    return name in _METADATA or _ABOUT.fullmatch(name) is not None


def common_kind(where: Path, paths: Sequence[Path]) -> str:
    """The kind of all files; nothing is left out unasked.

    Args:
        where: What they are of, for messages.
        paths: The files; of none the kind is ``text``.

    Raises:
        ConfigError: They are of more than one kind, or of one that cannot be read.
    """
    kinds = Counter(map(kind_of, paths))
    tables = kinds.pop("table", 0)
    told = ", ".join([*(f"{kinds[kind]} {kind}" for kind in sorted(kinds)), *([f"{tables} csv or tsv"] * bool(tables))])
    texts = as_texts(where, paths)
    if tables and not kinds:
        more = f"; {texts} trains on them as they are, commas and all" if texts else ""
        raise ConfigError(f"{where}: tables of text (csv, tsv) are not read. Make JSON lines or Parquet of them{more}")
    if len(kinds) + bool(tables) > 1:
        other = " or ".join(sorted(kinds.keys() - {"text"}))
        meant = " or ".join(filter(None, [other and f"kind: {other}", texts if kinds["text"] else ""]))
        raise ConfigError(
            f"{where}: holds files of more than one kind ({told}). Say which is meant, {meant}, or give each a source "
            "and a folder of its own"
        )
    return next(iter(kinds), "text")

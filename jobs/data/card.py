"""The card of a dataset on the Hugging Face hub (``README.md``): its configurations, and which files each split has.

The head of the card is YAML, as the ``datasets`` library reads it: ``configs`` is a list of ``config_name``,
``default``, ``data_dir`` and ``data_files``, patterns below the folder, by split or all of them for ``train``.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.data.splits import TRAIN
from strategies.errors import ConfigError

CARD = "README.md"
_MOST_BYTES = 4 << 20
_HEAD = re.compile(r"\A---[ \t]*\n(.*?\n)---[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """A configuration of a dataset.

    Attributes:
        name: What it is called.
        default: It is the one that is meant where none is named.
        folder: Where its files are, below the folder of the card; "" for there.
        patterns: Which files, below ``folder``, by split; empty where their names say it.
    """

    name: str
    default: bool
    folder: str
    patterns: Mapping[str, tuple[str, ...]]


def read_card(root: Path) -> list[Configuration] | None:
    """The configurations that the card of a folder names; None where there is no card.

    Raises:
        ConfigError: The card cannot be understood.
    """
    try:
        with (root / CARD).open(encoding="utf-8", errors="replace") as file:
            head = _HEAD.match(file.read(_MOST_BYTES))
    except OSError:
        return None
    if head is None:
        return None
    import yaml  # type: ignore[import-untyped]

    try:
        reader = yaml.SafeLoader(head[1])
        node = reader.get_single_node()
        again = _twice(node)
        found = reader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        if "configs:" not in head[1]:
            return None  # rules between the lines of a text
        raise _bad(root, f"its head is no YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(found, dict):
        return None
    given = found.get("configs") or []
    if given and again:
        raise _bad(root, f"its head names {again} twice in one place")  # as ``datasets`` has it
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise _bad(root, "its configs are no list of mappings")
    return _read_all(root, given)


def _twice(top: Any) -> str:
    """A key that stands twice in a mapping below a node of YAML, which is read as if only the later one were there."""
    todo, done = [top], set()
    while todo:
        node = todo.pop()
        if id(node) in done or not isinstance(getattr(node, "value", None), list):
            continue
        done.add(id(node))
        pairs = [one for one in node.value if isinstance(one, tuple)]
        counts = Counter(str(key.value) for key, _ in pairs)
        if again := next((key for key, count in counts.items() if count > 1), ""):
            return again
        todo += [value for _, value in pairs] or node.value
    return ""


def _read_all(root: Path, given: Sequence[Mapping[str, Any]]) -> list[Configuration]:
    names = [str(one.get("config_name", "default")) for one in given]
    defaults = [one for one in names if one == "default"]
    named = [name for name, one in zip(names, given, strict=True) if one.get("default")]
    meant = names if len(names) == 1 else named or defaults
    if len(names) > len(set(names)) or len(meant) > 1:
        raise _bad(root, f"it names a configuration twice, or two as the default ({', '.join(names)})")
    return [
        Configuration(
            name=name,
            default=name in meant,
            folder=str(one.get("data_dir") or ""),
            patterns=_patterns(root, one.get("data_files")),
        )
        for name, one in zip(names, given, strict=True)
    ]


def _patterns(root: Path, given: Any) -> dict[str, tuple[str, ...]]:
    """Patterns by split, however they are written."""
    if given is None:
        return {}
    if isinstance(given, dict):
        return {str(split): _texts(root, some) for split, some in given.items()}
    some = given if isinstance(given, list) else [given]
    if not all(isinstance(one, dict) for one in some):
        return {TRAIN: _texts(root, some)}
    if not all("split" in one and "path" in one for one in some):
        raise _bad(root, "its data_files are no list of split and path")
    names = [str(one["split"]) for one in some]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise _bad(root, f"its data_files name the split {' and '.join(twice)} twice")  # as ``datasets`` has it
    return {name: _texts(root, one["path"]) for name, one in zip(names, some, strict=True)}


def _texts(root: Path, given: Any) -> tuple[str, ...]:
    some = given if isinstance(given, list) else [given]
    if not all(isinstance(one, str) for one in some):
        raise _bad(root, "its data_files are no patterns")
    return tuple(some)


def matching(root: Path, patterns: Iterable[str], folder: str, names: Iterable[str]) -> list[str]:
    """The names that match any pattern, in their own order.

    Args:
        root: Where the card lies, for messages.
        patterns: What to match.
        folder: Where patterns begin, below ``root``.
        names: Paths relative to ``root``.

    Raises:
        ConfigError: A pattern is none.
    """
    from fsspec.utils import glob_translate

    try:
        known = [re.compile(glob_translate(posixpath.normpath(posixpath.join(folder, one)))) for one in patterns]
    except ValueError as error:
        raise _bad(root, f"a pattern of its data_files is none ({error})") from error
    return [name for name in names if any(one.match(name) for one in known)]


def _bad(root: Path, what: str) -> ConfigError:
    return ConfigError(f"{root / CARD}: the card of the dataset cannot be used: {what}. Mend it, or take it away")

"""Which files of what a person calls a source are its documents to train on; what is left out of a folder is told.

A folder may be any texts, a dataset as it lies on the Hugging Face hub, with a card (:mod:`jobs.data.card`) or with
names that say it (:mod:`jobs.data.splits`), or one that the ``datasets`` library has saved.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.data.card import Configuration, matching, read_card
from jobs.data.corpus import GENERATED, SKIPPED_FOLDERS, walk
from jobs.data.kinds import common_kind, is_about, kind_of
from jobs.data.splits import ALL, SHOWN, TRAIN, Taken, by_names, named, named_in, others, several, unknown
from jobs.spec import SourceSpec
from strategies.errors import ConfigError, StorageError

_DATASET, _STATE = "dataset_info.json", "state.json"  # in a folder that save_to_disk made
_SPLITS = "dataset_dict.json"
_POINTER = b"version https://git-lfs.github.com/"
_POINTER_BYTES = 1024  # no pointer is longer


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The files of a source.

    Attributes:
        kind: How documents lie in them.
        paths: The files, in order.
        note: What of a folder is taken and what is left out, in a line; "" where all of it is taken.
    """

    kind: str
    paths: tuple[Path, ...]
    note: str = ""


def choose(source: SourceSpec) -> Chosen:
    """The files of a source.

    Raises:
        ConfigError: It is missing or holds nothing of its kind, or nobody can tell which of its files are meant.
        StorageError: A folder or file cannot be read.
    """
    if source.kind == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return Chosen(kind="text", paths=tuple(walk(root, suffix=".py", skipped=SKIPPED_FOLDERS | GENERATED)))
    root = Path(source.path).expanduser().absolute()
    if not root.exists():
        raise ConfigError(f"{root}: there is no such file or folder")
    if not root.is_dir():
        if source.split or source.config:
            raise ConfigError(f"{root}: is one file, which has neither splits nor configurations")
        return Chosen(kind=_kind(source, root, [root]), paths=(root,))
    if source.kind in ("auto", "arrow") and (saved := _saved(root, source)) is not None:
        return saved
    found = _of_folder(root, source)
    if not found.paths:
        kind = "text" if source.kind == "auto" else source.kind
        raise ConfigError(f"{root}: holds no files of kind {kind} ({len(walk(root))} files were found)")
    _refuse_pointers(root, found.paths)
    return found


def _kind(source: SourceSpec, where: Path, paths: Sequence[Path]) -> str:
    return common_kind(where, paths) if source.kind == "auto" else source.kind


def _of_folder(root: Path, source: SourceSpec) -> Chosen:
    files = walk(root)
    if source.kind == "text" and not source.split and not source.config:
        return Chosen(kind="text", paths=tuple(files), note=_everything(root, files))  # asked for as any texts
    configurations = read_card(root)
    if configurations:
        return _by_card(root, files, configurations, source)
    return _by_names(root, files, source, card=configurations is not None)


def _by_names(root: Path, files: Sequence[Path], source: SourceSpec, *, card: bool, listed: bool = False) -> Chosen:
    documents = [path for path in files if not is_about(path)]
    kind = _kind(source, root, documents)
    documents = _of_kind(kind, documents)
    if not documents and source.kind == "auto" and not card:
        return Chosen(kind=kind, paths=tuple(files))  # it tells about nothing but itself
    taken = by_names(
        root,
        documents,
        split=source.split,
        configuration=source.config,
        strict=kind != "text",
        card=card,
        listed=listed,
    )
    if kind == "text" and not taken.what and not card and not source.split:
        return Chosen(kind=kind, paths=tuple(files))  # no dataset, but a folder of any texts
    about = [path for path in files if is_about(path)]
    left = [str(path.relative_to(root)) for path in (about if source.kind == "auto" else _of_kind(kind, about))]
    return Chosen(kind=kind, paths=tuple(taken.paths), note=_note(root, taken, [*taken.left, *left]))


def _of_kind(kind: str, paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if kind == "text" or kind_of(path) == kind]


def _by_card(root: Path, files: Sequence[Path], configurations: list[Configuration], source: SourceSpec) -> Chosen:
    """What the card says is to be trained on."""
    meant = _pick(root, configurations, source.config)
    beside = [f"the configuration {one.name}" for one in configurations if one is not meant]
    name = meant.name if beside else ""
    if not meant.patterns:
        place = root / meant.folder
        below = [path for path in files if path.is_relative_to(place)]
        found = _by_names(place, below, replace(source, config=""), card=True, listed=True)
        more = _note(root, Taken(paths=[], what=f"the configuration {name}"), beside)
        return replace(found, note="; ".join(filter(None, (found.note, more))))
    relative = {path.relative_to(root).as_posix(): path for path in files if not is_about(path)}
    splits = {
        split: [relative[one] for one in matching(root, patterns, meant.folder, relative)]
        for split, patterns in meant.patterns.items()
    }
    wanted = source.split or TRAIN
    if wanted not in (*splits, ALL):
        raise ConfigError(f"{root}: has no split {wanted!r}. Name one, split: {' or '.join(splits)}, or split: {ALL}")
    chosen = {path for split, some in splits.items() if wanted in (split, ALL) for path in some}
    if not chosen:
        told = ", ".join(meant.patterns.get(wanted, ()))
        raise ConfigError(f"{root}: holds none of the files that its card names for the split {wanted} ({told})")
    paths = sorted(chosen, key=lambda path: path.relative_to(root).parts)
    kind = _kind(source, root, paths)
    counts = {split: len(some) for split, some in splits.items()} if wanted != ALL else {}
    taken = Taken(paths=_of_kind(kind, paths), what=named(wanted, name) if wanted != ALL else f"all of {name}")
    return Chosen(kind=kind, paths=tuple(taken.paths), note=_note(root, taken, [*others(counts, wanted), *beside]))


def _pick(root: Path, configurations: Sequence[Configuration], asked: str) -> Configuration:
    """The configuration that is asked for, or else the one that the card says is meant."""
    names = [one.name for one in configurations]
    for one in configurations:
        if one.name == asked or (not asked and one.default):
            return one
    if asked:
        raise unknown(root, asked, names)
    raise several(root, names, f"config: {names[0]}")


def _note(root: Path, taken: Taken, left: Sequence[str]) -> str:
    """In a line what is taken of a folder, if anything is left out."""
    if not left:
        return ""
    return f"of {root} {taken.what or 'everything else'} is taken, {_listed(left)} left out"


def _everything(root: Path, files: Sequence[Path]) -> str:
    """What is taken of a folder of texts though it looks as if it were not to be trained on, in a line."""
    counts = named_in(root, files)
    about = [str(path.relative_to(root)) for path in files if is_about(path)]
    found = [*others({split: count for split, count in counts.items() if split}, TRAIN), *about]
    if not found:
        return ""
    less = f"; split: {TRAIN} takes only what is named so" if counts[TRAIN] else ""
    return f"of {root} every file is taken, as kind: text says, {_listed(found)} too{less}"


def _listed(names: Sequence[str]) -> str:
    shown = [*names[:SHOWN], *([f"{len(names) - SHOWN} more"] if len(names) > SHOWN else [])]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


# ---- what save_to_disk made --------------------------------------------------------------------------------------


def _saved(root: Path, source: SourceSpec) -> Chosen | None:
    """The files of a dataset that was saved, of its split ``train`` where it has splits; None where it is none."""
    if not (root / _SPLITS).is_file():
        if not (root / _DATASET).is_file() or not (root / _STATE).is_file():
            return None
        if source.config or source.split not in ("", ALL):
            raise ConfigError(f"{root}: is a single saved dataset, which has neither splits nor configurations")
        return Chosen(kind="arrow", paths=tuple(_shards(root)))
    splits = [str(one) for one in _read(root / _SPLITS).get("splits", [])]
    wanted = source.split or TRAIN
    if source.config:
        raise ConfigError(f"{root}: is a saved dataset, which has no configurations")
    if wanted not in (*splits, ALL):
        told = ", ".join(splits) or "none"
        raise ConfigError(f"{root}: has no split {wanted!r}; give the folder of one of {told}, or its name as split")
    taken = splits if wanted == ALL else [wanted]
    counts = {split: len(list((root / split).glob("*.arrow"))) for split in splits if split not in taken}
    paths = [path for split in taken for path in _shards(root / split)]
    note = _note(root, Taken(paths=paths, what=named(wanted, "")), others(counts, wanted))
    return Chosen(kind="arrow", paths=tuple(paths), note=note)


def _shards(dataset: Path) -> list[Path]:
    state = _read(dataset / _STATE)
    try:
        return [dataset / str(one["filename"]) for one in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{dataset / _STATE}: does not name the files of a dataset (_data_files)") from error


def _read(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    return value if isinstance(value, dict) else {}


def _refuse_pointers(root: Path, paths: Sequence[Path]) -> None:
    """Refuse a clone that has, instead of files, what git lfs would bring them by; as text that would be trained on."""
    if not any((folder / ".gitattributes").is_file() for folder in (root, *root.parents[:3])):
        return
    try:
        found = [path for path in paths if path.stat().st_size <= _POINTER_BYTES and path.read_bytes()[:35] == _POINTER]
    except OSError as error:
        raise StorageError(f"{error.filename or root}: cannot be read ({error.strerror or error})") from error
    if found:
        raise ConfigError(
            f"{root}: {len(found)} of its files are only pointers, {found[0].relative_to(root)} is one. "
            "Fetch them: git lfs pull"
        )

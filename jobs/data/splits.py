"""Which files of a dataset's folder are to be trained on, where their names say of which split they are.

That is how datasets lie on the Hugging Face hub: ``data/train-00000-of-00002.parquet`` beside
``data/test-00000-of-00001.parquet``, ``train.jsonl`` beside ``valid.jsonl``, or a folder for each. What is kept for
tests must not be trained on because it lies in the same folder, nor what is of another configuration of the dataset.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from strategies.errors import ConfigError, did_you_mean

TRAIN, ALL = "train", "all"
_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_BETWEEN = re.compile(r"[-_. \d]+")
_EXACT = re.compile(r"(\w+?)-\d{5}-of-\d{5}")  # in a folder ``data`` the hub takes all of that for the split
_PROGRAM = re.compile(  # code and its settings: train.py beside test.py are two programs
    r"\.(pyi?|ipynb|[cmhr]|cc|[ch]pp|cu|java|kt|scala|[jt]sx?|go|rs|rb|php|swift|cs|lua|pl|jl|hs|ml|(ba)?sh|ps1|sql|"
    r"ya?ml|toml|cfg|ini)"
)
SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What of a folder is taken.

    Attributes:
        paths: The files.
        what: What they are, for people; "" for all that there is.
        left: What is left out, for people.
    """

    paths: list[Path]
    what: str = ""
    left: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """What a relative path says of itself.

    Attributes:
        split: The split that it names; "" if it names none.
        folder: Where the splits are that it is one of: each such folder is a configuration.
        way: How it names it: "" by a folder, else the ending of the file.
        program: It is no text, but a program or its settings.
    """

    split: str
    folder: str
    way: str
    program: bool


def _place_of(path: PurePath, *, programs: bool = False) -> _Place:
    """What a path says; the names of ``programs`` say no split unless they are asked for."""
    program = not programs and _PROGRAM.fullmatch(path.suffix.lower()) is not None
    for depth, folder in enumerate(path.parts[:-1]):
        if split := _word_in(folder):
            return _Place(split=split, folder=PurePath(*path.parts[:depth]).as_posix(), way="", program=program)
    exact = _EXACT.match(path.name.lower()) if path.parent.name == "data" else None
    split = "" if program else _word_in(path.name)
    if split and exact and exact[1] not in _WORDS:
        split = exact[1]  # train_sft and train_gen are two
    return _Place(split=split, folder=path.parent.as_posix(), way=path.suffix, program=program)


def _word_in(name: str) -> str:
    return next((_WORDS[word] for word in _BETWEEN.split(name.lower()) if word in _WORDS), "")


def by_names(
    root: Path,
    paths: Sequence[Path],
    *,
    split: str,
    configuration: str,
    strict: bool,
    card: bool,
    listed: bool = False,
) -> Taken:
    """The files to train on.

    Args:
        root: The folder.
        paths: Files below it, all of one kind.
        split: The split that is wanted; "" for ``train`` where there are any.
        configuration: The folder below ``root`` whose splits are meant; "" where there is only one such.
        strict: Refuse where only some names say a split; else such a folder is no dataset, unless what names splits
            lies side by side, and all of it is taken.
        card: It is a dataset, even if its files are programs.
        listed: Its card lists configurations: folders are none.

    Raises:
        ConfigError: Nobody can tell which are meant, or there are none such.
    """
    places = {path: _place_of(path.relative_to(root), programs=card or bool(split)) for path in paths}
    if configuration:
        places = _inside(root, places, configuration)
    counts = Counter(place.split for place in places.values())
    wanted = _WORDS.get(split, split) or TRAIN
    if wanted == ALL or (not split and not _are_splits(places.values(), counts, strict=strict)):
        return Taken(paths=list(places), what=f"all of {configuration}" if configuration else "")
    if not counts[wanted] or (counts[""] and not split):
        told = ", ".join(f"{counts[one]} {one or 'of no split'}" for one in sorted(counts, reverse=True))
        raise ConfigError(
            f"{root}: its files are named by splits, and which are meant is not clear ({told}). Name one, split: "
            f"{_likely(counts)}, or split: {ALL}; or give those to train on a folder of their own"
        )
    chosen = [path for path, place in places.items() if place.split == wanted]
    if len(folders := sorted({places[path].folder for path in chosen})) > 1:
        name = "" if listed else f", or config: {folders[-1]}"
        raise several(root, folders, f"path: {root / folders[-1]}{name}")
    return Taken(paths=chosen, what=named(wanted, configuration), left=others(counts, wanted))


def _likely(splits: Iterable[str]) -> str:
    """The split that is meant most likely: one to train on, if there is any."""
    return min(filter(None, splits), key=lambda one: (one != TRAIN, not one.startswith(TRAIN), one), default=TRAIN)


def named_in(root: Path, paths: Iterable[Path]) -> Counter[str]:
    """How many files name each split; "" is none."""
    return Counter(_place_of(path.relative_to(root)).split for path in paths)


def as_texts(root: Path, paths: Iterable[Path]) -> str:
    """How to ask for all of them as texts and for none that is kept for tests; "" if that cannot be asked for."""
    counts = named_in(root, paths)
    split = _likely(counts)
    if split.startswith(TRAIN):
        return f"kind: text, split: {split}" if counts[split] else "kind: text"
    return ""


def _inside(root: Path, places: Mapping[Path, _Place], configuration: str) -> dict[Path, _Place]:
    folders = {place.folder for place in places.values()}
    if configuration not in folders:
        raise unknown(root, configuration, folders)
    below = (configuration, f"{configuration}/")
    return {
        path: place
        for path, place in places.items()
        if place.folder == below[0] or (place.folder.startswith(below[1]) and not place.split)
    }


def _are_splits(places: Iterable[_Place], counts: Mapping[str, int], *, strict: bool) -> bool:
    """Whether names that say splits are meant so."""
    if not counts.get(TRAIN):
        return len(counts) > 1 and (strict or not counts.get(""))  # one other split alone is asked for as it lies there
    if strict or not counts.get(""):
        return True
    texts = [one for one in places if not one.program]
    ways = [{(one.folder, one.way) for one in texts if one.split == split} for split in (TRAIN, "validation", "test")]
    return bool(ways[0] & (ways[1] | ways[2]))


def named(split: str, configuration: str) -> str:
    """What is taken, for people."""
    return f"the split {split}" + (f" of the configuration {configuration}" if configuration else "")


def others(counts: Mapping[str, int], wanted: str) -> tuple[str, ...]:
    """The other splits, for people, by the number of their files."""
    return tuple(
        f"{split or 'what is of no split'} ({number} {'file' if number == 1 else 'files'})"
        for split, number in sorted(counts.items())
        if split != wanted
    )


def several(root: Path, configurations: Sequence[str], hint: str) -> ConfigError:
    """A dataset has configurations, and nobody said which is meant."""
    more = f" and {len(configurations) - SHOWN} more" if len(configurations) > SHOWN else ""
    told = ", ".join(configurations[:SHOWN]) + more
    return ConfigError(
        f"{root}: the dataset has {len(configurations)} configurations ({told}), and which is meant is not clear. "
        f"Name one, {hint}; for more of them give each a source of its own"
    )


def unknown(root: Path, configuration: str, known: Iterable[str]) -> ConfigError:
    """A configuration is named that there is not."""
    hint = did_you_mean(configuration, known).rstrip(".")
    return ConfigError(f"{root}: has no configuration {configuration!r}. {hint}")

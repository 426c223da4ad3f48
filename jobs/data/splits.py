"""Which files of a dataset's folder are to be trained on, where their names say of which split they are.

That is how datasets lie on the Hugging Face hub: ``data/train-00000-of-00002.parquet`` beside
``data/test-00000-of-00001.parquet``, ``train.jsonl`` beside ``valid.jsonl``, or a folder for each. What is kept for
tests must not be trained on because it lies in the same folder.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from strategies.errors import ConfigError

TRAIN = "train"
_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"[-_.]?\d+-of-\d+.*$")  # what names of shards end with
_BETWEEN = re.compile(r"[-_. ]")


def split_of(path: Path) -> str:
    """The split that a relative path names, in a folder or as the file's first word; "" if it names none.

    The last word before the number of a shard counts, too: ``c4-train.00000-of-01024.json.gz``.
    """
    for folder in path.parts[:-1]:
        if split := _WORDS.get(folder.lower()):
            return split
    name = path.name.lower()
    words = _BETWEEN.split(name)[:1]
    if (stem := _SHARD.sub("", name)) != name:
        words += _BETWEEN.split(stem)[-1:]
    return next((_WORDS[word] for word in words if word in _WORDS), "")


def trained(root: Path, paths: Sequence[Path], *, strict: bool) -> tuple[list[Path], Mapping[str, int]]:
    """The files to train on.

    Args:
        root: The folder.
        paths: Files below it, all of one kind.
        strict: Refuse where only some names say a split; else such a folder is no dataset, and all of it is taken.

    Returns:
        The files, and how many are left out, by the split that they are of.

    Raises:
        ConfigError: Nobody can tell which are meant.
    """
    splits = {path: split_of(path.relative_to(root)) for path in paths}
    counts = Counter(splits.values())
    if len(counts) <= 1 or (counts[""] and not strict):
        return list(paths), {}
    if counts[""] or not counts[TRAIN]:
        told = ", ".join(f"{counts[split]} {split or 'of no split'}" for split in sorted(counts, reverse=True))
        raise ConfigError(
            f"{root}: its files are named by splits, and which are meant is not clear ({told}). Give those to train on "
            f"a folder of their own, or name them {TRAIN}-..."
        )
    left = {split: number for split, number in sorted(counts.items()) if split != TRAIN}
    return [path for path in paths if splits[path] == TRAIN], left

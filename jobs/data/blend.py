"""Prepare a mixture: look at every source, tokenize each into shards that outlive a kill, and give each its share.

Everything is looked at before anything is written, and all that is wrong is told at once; only what nobody knows before
the text is tokenized comes later. The store of a source is a folder named by what it depends on (its text, the
tokenizer, the part for validation), so that other weights need no new tokens, and a submit that was killed goes on with
the shards that are missing. Shards that are found are read and compared with their digests; a restart or a resume of a
run looks at their sizes only, because it must be fast.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.data import tokenizer as bpe
from jobs.data.build import Progress, silent
from jobs.data.ends import MAP, End, find_end, usual
from jobs.data.fitting import excluded, settled
from jobs.data.making import Place, Recipe, make_shards
from jobs.data.shards import (
    FORMAT_VERSION,
    TRAIN,
    Shard,
    SourceMeta,
    close_store,
    open_store,
    read_shard,
    read_source,
    write_whole,
)
from jobs.data.store import TOKENIZER, file_digest
from jobs.data.surveying import Surveyed, formed, misformed, named, survey_sources
from jobs.data.work import Processes, Request, Runner, texts
from jobs.spec import DataSpec, SourceSpec
from strategies.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["flaws", "named", "prepare_mixture"]

Given = tuple["Tokenizer", End | None]
"""A tokenizer that a person has named, and the token that ends a document; None where nobody knows it."""
_PROOF = "digest"  # beside a tokenizer: the SHA-256 of its file


def flaws(data: DataSpec, vocab: int, *, most_bytes: float, seq: int = 0, form: bool = True) -> list[str]:
    """All that is wrong with a mixture and its tokenizer, where it is not going to be prepared. Writes nothing.

    Args:
        data: The mixture.
        vocab: Tokens of the model; 0 if that is not known.
        most_bytes: So much text is read, of the smallest sources; of the others, what can be told without reading them.
        seq: Tokens per sequence; 0 if that is not known.
        form: Say, too, what is wrong with the list of sources itself.

    Raises:
        ConfigError: A library is missing.
    """
    bpe.tokenizers_version()
    sources = named(data)
    problems = misformed(sources) if form else []
    some = [one for one in sources if formed(one)]
    found = survey_sources(some, Processes(), problems, silent, most_bytes=most_bytes)
    given = _given(data, vocab, problems)
    return problems + excluded(found, seq, given and given[0])


def prepare_mixture(
    data: DataSpec,
    root: Path,
    vocab: int,
    progress: Progress = silent,
    *,
    seq: int,
    samples: int,
    runner: Runner | None = None,
    end_id: int | None = None,
) -> DataSpec:
    """Make the token stores of a mixture, or find those made before.

    Args:
        data: The mixture.
        root: Folder of all stores, on the file system that the ranks see; made if missing.
        vocab: Tokens of the model.
        progress: Told the phase (``reading``, ``training the tokenizer``, ``tokenizing``, ``ready``) and its fraction.
        seq: Tokens per sequence.
        samples: Sequences of the whole run.
        runner: Where the work is done; None takes processes here.
        end_id: The token that has ended documents before, where nobody names another; None finds it.

    Returns:
        ``data`` with everything filled that ranks need.

    Raises:
        ConfigError: Everything that is wrong with the sources and the tokenizer.
        StorageError: Something cannot be read or written.
    """
    library = bpe.tokenizers_version()
    runner = runner or Processes()
    problems = misformed(named(data))
    found = survey_sources(named(data), runner, problems, progress)
    given = _given(data, vocab, problems, end_id)
    _refuse(problems + excluded(found, seq, given and given[0], samples=samples, validation=data.validation))
    try:
        tokenizer, end, folder = _tokenizer(given, found, root.absolute(), vocab, library, progress)
        recipe = Recipe.of(tokenizer, end, folder / TOKENIZER, data.validation)
        metas = _tokenize(recipe, found, folder, runner, progress)
    except OSError as error:
        raise StorageError(
            f"The token store cannot be written to {root}.",
            why=f"{error.strerror or error}.",
            hint="Free some space or check the permissions, then submit again: shards that are finished are kept.",
        ) from error
    parts = settled(found, [meta for _, meta in metas], seq, samples)
    sources = tuple(
        replace(
            one.source,
            store=str(store),
            digest=meta.digest,
            share=part,
            documents=meta.documents(TRAIN),
            tokens=meta.tokens(TRAIN),
        )
        for one, (store, meta), part in zip(found, metas, parts, strict=True)
    )
    progress("ready", 1.0)
    return replace(
        data,
        store=str(folder),
        vocab=metas[0][1].vocab,
        end_id=metas[0][1].end_id,
        digest=mixture_digest(sources),
        sources=sources,
    )


def ended(data: DataSpec, end_id: int | None = None) -> str:
    """What ends a document under the tokenizer that is given, and who says so, in a line; "" where none is given.

    Raises:
        ConfigError: Nobody knows.
    """
    if not data.tokenizer:
        return ""
    end = find_end(bpe.read_tokenizer(Path(data.tokenizer)), Path(data.tokenizer), data.end_token, end_id)
    return f"{end.name} ends a document: {end.why}"


def mixture_digest(sources: Sequence[SourceSpec]) -> str:
    """What the samples depend on beside the seed and their length."""
    told = "|".join(f"{source.digest}:{source.share}" for source in sources)
    return hashlib.sha256(f"mixture {FORMAT_VERSION}|{told}".encode()).hexdigest()


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise ConfigError(
            f"The data have {count}:\n" + "\n".join(f"  - {one}" for one in problems),
            hint="Nothing was written. Mend them, or leave the source out.",
        )


# ---- the tokenizer ----------------------------------------------------------------------------------------------


def _given(data: DataSpec, vocab: int, problems: list[str], end_id: int | None = None) -> Given | None:
    """The tokenizer that is given, checked; None for one to train, which can have ``vocab`` tokens."""
    if not data.tokenizer:
        if flaw := bpe.vocab_flaw(vocab) if vocab else "":
            problems.append(flaw)
        return None
    path = Path(data.tokenizer)
    try:
        tokenizer = bpe.read_tokenizer(path)
    except ConfigError as error:
        problems.append(f"data.tokenizer: {error.what}")
        return None
    size = bpe.vocabulary(tokenizer)
    if size > vocab > 0:
        problems.append(
            f"data.tokenizer: {path} has {size} tokens, model.vocab={vocab} is too small for it. "
            f"Set model.vocab to {size} or more."
        )
    try:
        return tokenizer, find_end(tokenizer, path, data.end_token, end_id)
    except ConfigError as error:
        problems.append(error.what)
        return tokenizer, None


def _tokenizer(
    given: Given | None, found: Sequence[Surveyed], root: Path, vocab: int, library: str, progress: Progress
) -> tuple[Tokenizer, int, Path]:
    """The tokenizer, the token that ends a document, and the folder that it lies in."""
    if given is not None:
        tokenizer, end = given
        assert end is not None, "else it is refused"
        return tokenizer, end.id, _laid_down(root, tokenizer, end)
    key = _key("tokenizer", FORMAT_VERSION, bpe.TRAINING_BYTES, library, vocab, *(one.digest for one in found))
    folder = root / key
    with contextlib.suppress(OSError):
        if file_digest(folder / TOKENIZER) == (folder / _PROOF).read_text(encoding="utf-8"):
            return bpe.read_tokenizer(folder / TOKENIZER), bpe.END_OF_TEXT_ID, folder
    progress("training the tokenizer", 0.0)
    size = sum(one.text_bytes for one in found)
    made = bpe.train_on(_training_text(found), vocab, where=", ".join(one.source.name for one in found), size=size)
    _lay_down(folder, made)
    return made, bpe.END_OF_TEXT_ID, folder


def _laid_down(root: Path, tokenizer: Tokenizer, end: End) -> Path:
    """A folder with the tokenizer that is given; beside it stands what ends a document, for whoever goes on with it."""
    common = usual(tokenizer)
    other = () if common is not None and common.id == end.id else (end.name,)
    folder = root / _key("tokenizer", tokenizer.to_str(), *other)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MAP, json.dumps({"eos_token": end.name}).encode())
    _lay_down(folder, tokenizer)
    return folder


def _lay_down(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TOKENIZER, tokenizer.to_str().encode())
    write_whole(folder / _PROOF, file_digest(folder / TOKENIZER).encode())


def _training_text(found: Sequence[Surveyed]) -> Iterator[str]:
    """Text to learn from, spread over all sources and all of each, whatever their weights."""
    stride = max(1, -(-sum(one.text_bytes for one in found) // bpe.TRAINING_BYTES))
    seen = taken = 0
    for unit in (unit for one in found for unit in one.units):
        if seen + unit.size <= taken * stride:
            seen += unit.size  # not its turn: not even opened
            continue
        for piece in texts(unit):
            if seen >= taken * stride:
                yield piece.text
                taken += len(piece.text)
            seen += len(piece.text)


def _key(word: str, *parts: object) -> str:
    return f"{word}-{hashlib.sha256('|'.join(map(str, parts)).encode()).hexdigest()[:32]}"


# ---- tokens -----------------------------------------------------------------------------------------------------


def _tokenize(
    recipe: Recipe, found: Sequence[Surveyed], folder: Path, runner: Runner, progress: Progress
) -> list[tuple[Path, SourceMeta]]:
    """Every source's store: what is missing of it, or damaged, is made."""
    stores = [folder.parent / _key("source", *recipe.key(one)) for one in found]
    whole = [_whole(store) for store in stores]
    requests: list[Request] = []
    sizes: list[int] = []
    known: dict[Place, Shard] = {}
    for one, store, meta in zip(found, stores, whole, strict=True):
        if meta is None:
            open_store(store, recipe.width)
        for number, unit in enumerate(one.units):
            shard = read_shard(store, number) if meta is None else meta.shards[number]
            if shard is not None:
                known[str(store), number] = shard
            sizes.append(unit.size)
            requests.append(recipe.request(unit, store, number))
    made = make_shards(requests, sizes, known, runner, progress)
    for one, store, meta in zip(found, stores, whole, strict=True):
        shards = tuple(made[str(store), number] for number in range(len(one.units)))
        if meta is None or meta.shards != shards:
            close_store(store, recipe.meta(one, shards))
    return [(store, read_source(store)) for store in stores]


def _whole(store: Path) -> SourceMeta | None:
    try:
        return read_source(store)
    except StorageError:
        return None

"""Prepare a corpus once, where a run is submitted: tokenize it into a store in a folder named by what it depends on.

The store is written aside and renamed into place, so that two submits at once, or a kill at any moment, leave either a
whole store or none. What a killed writer left aside is removed by the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from jobs.checkpoint.layout import sync_dir
from jobs.data import tokenizer as bpe
from jobs.data.corpus import Corpus, Document, pieces, scan
from jobs.data.store import (
    FORMAT_VERSION,
    META,
    TOKENIZER,
    TOKENS,
    StoreMeta,
    file_digest,
    read_meta,
    token_width,
    too_short,
)
from jobs.spec import DataSpec
from strategies.codec import to_json
from strategies.errors import StorageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Progress = Callable[[str, float], None]
BATCH_BYTES = 2 << 20
_FRESH, _ASIDE = ".fresh-", ".aside-"
_LOCK = "lock"


class Sink(Protocol):
    """What tokens are written to."""

    def write(self, data: bytes, /) -> int:
        """Take in some bytes; returns how many."""


def silent(phase: str, fraction: float) -> None:
    """A progress callback that tells nobody."""


def prepare(data: DataSpec, root: Path, vocab: int, progress: Progress = silent, *, seq: int = 0) -> DataSpec:
    """Make the token store of a corpus, or find the one made before.

    Args:
        data: The corpus; ``kind`` and ``path`` are read.
        root: Folder of all stores, on the file system that the ranks see; made if missing.
        vocab: Number of tokens of the tokenizer.
        progress: Told the phase (``reading``, ``training the tokenizer``, ``tokenizing``, ``ready``) and its
            fraction, 0 to 1.
        seq: Tokens per sequence, to refuse a corpus shorter than one; 0 checks nothing.

    Returns:
        ``data`` with ``store``, ``digest`` and ``vocab`` filled.

    Raises:
        ConfigError: No path, an empty or too short corpus, or a vocabulary that does not fit.
        StorageError: The corpus cannot be read, or the store cannot be written.
    """
    bpe.check_vocab(vocab)
    library = bpe.tokenizers_version()
    corpus = scan(data, lambda fraction: progress("reading", fraction))
    most = 3 * corpus.size + len(corpus.documents)  # a token is a byte at least, and a bad byte becomes three
    if most < seq + 1:
        raise too_short(corpus.where, f"at most {most}", seq)
    folder = root.absolute() / _key(corpus, vocab, library)
    if not _whole(folder, progress):
        with _storage_errors(root):
            _build(corpus, vocab, library, folder, progress)
    meta = read_meta(folder)
    if seq and meta.count < seq + 1:
        raise too_short(meta.corpus, str(meta.count), seq, most=meta.count - 1)
    progress("ready", 1.0)
    return dataclasses.replace(data, store=str(folder), digest=meta.digest, vocab=meta.vocab)


def same_tokens(data: DataSpec, store: Path) -> bool:
    """Whether a corpus would become the tokens of a store that was made of one. Writes nothing.

    Raises:
        ConfigError: The corpus is empty.
        StorageError: It, or the store, cannot be read.
    """
    meta, corpus = read_meta(store), scan(data)
    if corpus.digest == meta.corpus_digest:
        return True
    if (corpus.size, len(corpus.documents)) != (meta.text_bytes, meta.documents):
        return False
    digest = _Digest()  # files under other names may still have the same text
    _tokenize(corpus, bpe.read_tokenizer(store / TOKENIZER), digest, meta.width, silent)
    return digest.hexdigest() == meta.digest


class _Digest:
    """The SHA-256 of what would be written to a file."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Take in some bytes; returns how many."""
        self._hash.update(data)
        return len(data)

    def hexdigest(self) -> str:
        """Of all so far."""
        return self._hash.hexdigest()


def _key(corpus: Corpus, vocab: int, library: str) -> str:
    parts = [FORMAT_VERSION, bpe.TRAINING_BYTES, library, vocab, corpus.digest]
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:32]


def _whole(folder: Path, progress: Progress = silent) -> bool:
    """Whether a store is there, byte by byte as it was made. Reads all of it, which is less than its corpus."""
    try:
        meta = read_meta(folder)
        progress("checking", 0.0)
        return (file_digest(folder / TOKENS), file_digest(folder / TOKENIZER)) == (meta.digest, meta.tokenizer_digest)
    except (OSError, StorageError):
        return False


def _build(corpus: Corpus, vocab: int, library: str, folder: Path, progress: Progress) -> None:
    progress("training the tokenizer", 0.0)
    tokenizer = bpe.train(corpus, vocab)  # before anything is written: it may be refused
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent)
    with aside_in(folder.parent) as aside:
        (aside / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
        with (aside / TOKENS).open("wb") as file:
            count = _tokenize(corpus, tokenizer, file, token_width(vocab), progress)
        meta = StoreMeta(
            digest=file_digest(aside / TOKENS),
            count=count,
            width=token_width(vocab),
            vocab=vocab,
            tokenizer_digest=file_digest(aside / TOKENIZER),
            corpus=corpus.where,
            corpus_digest=corpus.digest,
            documents=len(corpus.documents),
            text_bytes=corpus.size,
            skipped=corpus.skipped,
            library=library,
        )
        (aside / META).write_text(json.dumps(to_json(meta), indent=2) + "\n", encoding="utf-8")
        _publish(aside, folder)


def _tokenize(corpus: Corpus, tokenizer: Tokenizer, out: Sink, width: int, progress: Progress) -> int:
    import numpy as np

    end = np.array([bpe.END_OF_TEXT_ID], dtype=f"<u{width}").tobytes()
    done = count = 0
    for batch in _batches(corpus.documents):
        encodings = tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for (text, last), encoding in zip(batch, encodings, strict=True):
            out.write(np.array(encoding.ids, dtype=f"<u{width}").tobytes() + (end if last else b""))
            count += len(encoding.ids) + last
            done += len(text)
        progress("tokenizing", min(1.0, done / corpus.size))
    return count


def _batches(documents: tuple[Document, ...]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of text, each with whether its document ends there, in batches of about :data:`BATCH_BYTES`."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in _pieces(documents):
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(documents: tuple[Document, ...]) -> Iterator[tuple[str, bool]]:
    for document in documents:
        held = ""
        for text in pieces(document):
            if held:
                yield held, False
            held = text
        yield held, True


@contextlib.contextmanager
def aside_in(root: Path) -> Iterator[Path]:
    """A folder next to the stores, gone at the end; its lock is held as long as its writer lives."""
    fresh = Path(tempfile.mkdtemp(prefix=_FRESH, dir=root))
    aside = fresh.with_name(fresh.name.replace(_FRESH, _aside_prefix(), 1))
    try:
        with (fresh / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            fresh.rename(aside)  # only now, with its lock held, does it bear a name that others may clean up
            yield aside
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _aside_prefix() -> str:
    return f"{_ASIDE}{socket.gethostname()}-"


def remove_abandoned(root: Path) -> None:
    """Remove what killed writers of this host left aside: a folder whose lock nobody holds."""
    for aside in root.glob(f"{_aside_prefix()}*"):
        with contextlib.suppress(OSError), (aside / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(aside, ignore_errors=True)


def _publish(aside: Path, folder: Path) -> None:
    """Make the store durable, then visible under its name. Another writer of the same store may have come first."""
    for name in (TOKENIZER, TOKENS, META):
        with (aside / name).open("rb") as file:
            os.fsync(file.fileno())
    aside.chmod(0o755)
    sync_dir(aside)
    try:
        os.rename(aside, folder)
    except OSError:
        if _whole(folder):
            return  # the other's store is the same
        ruin = Path(tempfile.mkdtemp(prefix=_FRESH, dir=folder.parent))
        os.rename(folder, ruin / folder.name)
        os.rename(aside, folder)
        shutil.rmtree(ruin, ignore_errors=True)
    (folder / _LOCK).unlink(missing_ok=True)
    sync_dir(folder.parent)


@contextlib.contextmanager
def _storage_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"The token store cannot be written to {root}.",
            why=f"{error.strerror or error}.",
            hint="Free some space or check the permissions, then submit again: the store is prepared anew.",
        ) from error

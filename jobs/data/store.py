"""The token store: ``tokens.bin`` (raw little-endian uint16 or uint32), ``tokenizer.json`` and ``meta.json``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.data.order import SampleOrder
from jobs.data.tokenizer import read_tokenizer
from jobs.spec import DataSpec
from strategies.codec import from_json
from strategies.errors import ConfigError, StorageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from tokenizers import Tokenizer

FORMAT_VERSION = 1
META, TOKENS, TOKENIZER = "meta.json", "tokens.bin", "tokenizer.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreMeta:
    """What ``meta.json`` says.

    Attributes:
        version: Version of this format.
        digest: SHA-256 of ``tokens.bin``.
        count: Number of tokens.
        width: Bytes per token, 2 or 4.
        vocab: Number of distinct tokens.
        tokenizer_digest: SHA-256 of ``tokenizer.json``.
        corpus: What was tokenized, for people.
        corpus_digest: Digest of the corpus.
        documents: Number of files in it.
        text_bytes: Their length.
        skipped: Files left out because they are not text.
        library: Version of the tokenizers library.
    """

    version: int = FORMAT_VERSION
    digest: str
    count: int
    width: int
    vocab: int
    tokenizer_digest: str
    corpus: str
    corpus_digest: str
    documents: int
    text_bytes: int
    skipped: int
    library: str


def token_width(vocab: int) -> int:
    """Bytes per token in the store."""
    return 2 if vocab <= 1 << 16 else 4


def read_meta(folder: Path) -> StoreMeta:
    """Read ``meta.json`` and check it against the size of ``tokens.bin``.

    Raises:
        StorageError: The store is missing, unreadable, damaged, or of another version.
    """
    try:
        document = json.loads((folder / META).read_text(encoding="utf-8"))
        meta = from_json(StoreMeta, document, where=META)
        size = (folder / TOKENS).stat().st_size
    except (OSError, ValueError, ConfigError) as error:
        raise _broken(folder, str(error).splitlines()[0]) from error
    if meta.version != FORMAT_VERSION:
        raise _broken(folder, f"its format is version {meta.version}, this phalanx reads {FORMAT_VERSION}")
    if size != meta.count * meta.width:
        raise _broken(folder, f"{TOKENS} has {size} bytes, {META} says {meta.count * meta.width}")
    return meta


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _broken(folder: Path, reason: str) -> StorageError:
    return StorageError(
        f"The token store {folder} cannot be used.",
        why=f"{reason}.",
        hint="Check that the folder is shared by all nodes; remove it and submit again to prepare it anew.",
    )


class TokenStore:
    """Samples of a prepared corpus.

    Window ``w`` covers tokens ``[w * seq, w * seq + seq]``: ``seq`` inputs and the target of the last one. A rest that
    fills no window is left out.

    Args:
        data: A prepared corpus (:func:`jobs.data.prepare`).
        seq: Tokens per sequence.

    Raises:
        StorageError: The store is missing or damaged, or does not carry the digest and vocabulary of ``data``.
        ConfigError: The corpus is shorter than one sequence.
    """

    def __init__(self, data: DataSpec, seq: int) -> None:
        import numpy as np

        folder = Path(data.store)
        meta = read_meta(folder)
        if (meta.digest, meta.vocab) != (data.digest, data.vocab):
            raise _broken(
                folder,
                f"it holds tokens {meta.digest[:12]} of vocabulary {meta.vocab}, "
                f"the run was made with {data.digest[:12]} of vocabulary {data.vocab}",
            )
        if meta.count < seq + 1:
            raise too_short(meta.corpus, str(meta.count), seq, most=meta.count - 1)
        self.meta = meta
        self.seq = seq
        self.windows = (meta.count - 1) // seq
        self._folder = folder
        try:
            self._tokens = np.memmap(folder / TOKENS, dtype=f"<u{meta.width}", mode="r")
        except OSError as error:
            raise _broken(folder, str(error)) from error

    def order(self, seed: int) -> SampleOrder:
        """The order of samples under ``seed``."""
        return SampleOrder(windows=self.windows, seed=seed)

    def window(self, number: int) -> npt.NDArray[np.int64]:
        """Tokens of window ``number``, shape [seq + 1]."""
        import numpy as np

        start = number * self.seq
        return np.asarray(self._tokens[start : start + self.seq + 1], dtype=np.int64)

    def sample(self, seed: int, index: int) -> npt.NDArray[np.int64]:
        """Sample ``index`` (from 0) of the global order under ``seed``, shape [seq + 1]."""
        return self.window(self.order(seed).locate(index)[1])

    def validation(self) -> None:
        """There is no part for validation."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store; raises StorageError when its file is damaged."""
        path = self._folder / TOKENIZER
        try:
            if file_digest(path) != self.meta.tokenizer_digest:
                raise _broken(self._folder, f"{TOKENIZER} was changed")
        except OSError as error:
            raise _broken(self._folder, str(error)) from error
        return read_tokenizer(path)

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``."""
        return list(self.tokenizer().encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """Text of ``tokens``; ends of documents are left out."""
        return str(self.tokenizer().decode(tokens))


def too_short(corpus: str, tokens: str, seq: int, most: int = 0) -> ConfigError:
    """The error for a corpus that does not fill one sequence.

    Args:
        corpus: Which.
        tokens: How many it has, in words.
        seq: Tokens per sequence.
        most: The longest sequence that it does fill; 0 if that is not known.
    """
    return ConfigError(
        f"The corpus {corpus} is shorter than one sequence.",
        why=f"It has {tokens} tokens; model.seq={seq} needs {seq + 1}.",
        hint=f"Use a larger corpus, or set model.seq to {most} or less." if most > 0 else "Use a larger corpus.",
    )

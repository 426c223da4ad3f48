"""A byte-level BPE tokenizer: trained on a deterministic part of the corpus, so that it takes seconds."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.data.corpus import PIECE_BYTES, Corpus, pieces
from jobs.data.ends import END_OF_TEXT
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT_ID = 0
MIN_VOCAB = 257  # every byte, and the end of a document
MAX_VOCAB = 1 << 31
TRAINING_BYTES = 4 << 20


def tokenizers_version() -> str:
    """Version of the ``tokenizers`` library.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.metadata.version("tokenizers")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            "Preparing a corpus needs the tokenizers library.",
            why="It is not installed here.",
            hint="pip install 'phalanx[train]'",
        ) from error


def check_vocab(vocab: int) -> None:
    """Raise ConfigError when no byte-level tokenizer has ``vocab`` tokens."""
    if what := vocab_flaw(vocab):
        raise ConfigError(
            what,
            why="A byte-level tokenizer has 256 bytes and one end-of-document token, before any merge.",
            hint=f"Set model.vocab to {MIN_VOCAB} or more.",
        )


def vocab_flaw(vocab: int) -> str:
    """The same in a line; "" where one has."""
    return "" if MIN_VOCAB <= vocab <= MAX_VOCAB else f"model.vocab={vocab} is outside {MIN_VOCAB}..{MAX_VOCAB}."


def train(corpus: Corpus, vocab: int) -> Tokenizer:
    """Train a tokenizer of exactly ``vocab`` tokens; the same corpus and library give the same one.

    Raises:
        ConfigError: The corpus is too small for so many tokens.
        StorageError: The corpus cannot be read.
    """
    return train_on(training_text(corpus), vocab, where=corpus.where, size=corpus.size)


def train_on(texts: Iterator[str], vocab: int, *, where: str, size: int) -> Tokenizer:
    """The same, on given text.

    Args:
        texts: What to learn from.
        vocab: Number of tokens.
        where: What the text is of, for messages.
        size: Bytes of all that there is.

    Raises:
        ConfigError: The text is too little for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab:
        raise ConfigError(
            f"model.vocab={vocab} is more than the corpus can give.",
            why=f"The corpus {where} ({size} bytes) runs out of pairs to merge at {found} tokens.",
            hint=f"Set model.vocab to {found} or less, or use a larger corpus.",
        )
    tokenizer.encode_special_tokens = True  # as :func:`read_tokenizer` does
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """A ``tokenizer.json`` as it is used here: it neither pads nor cuts, and text is text, whatever the file says.

    What spells a special token, as an article about ``<|endoftext|>`` does, is not that token: a document could else
    end itself, and what follows would be another one.

    Raises:
        ConfigError: It is none.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library knows no narrower one
        raise ConfigError(f"{path}: is no tokenizer.json ({str(error).splitlines()[0]})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary(tokenizer: Tokenizer) -> int:
    """How many tokens a model needs for it: one more than the largest number."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def bytewise(tokenizer: Tokenizer) -> bool:
    """Whether no text gives more tokens than it has bytes: those of GPT-2 and Llama 3, not those with a prefix."""
    state = json.loads(tokenizer.to_str())
    steps = state["pre_tokenizer"] or {}
    last = steps.get("pretokenizers", [steps])[-1]
    return state["normalizer"] is None and last.get("type") == "ByteLevel" and not last["add_prefix_space"]


def training_text(corpus: Corpus) -> Iterator[str]:
    """About :data:`TRAINING_BYTES` of the corpus, spread over all of it: every k-th piece."""
    stride = max(1, -(-corpus.size // TRAINING_BYTES))
    taken, seen = 0, 0
    for document in corpus.documents:
        if document.size <= PIECE_BYTES and seen + document.size <= taken * stride:
            seen += document.size  # not its turn: not even opened
            continue
        for piece in pieces(document):
            if seen >= taken * stride:
                yield piece
                taken += len(piece)
            seen += len(piece)

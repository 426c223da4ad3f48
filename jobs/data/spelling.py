"""Text that spells a special token is text: a vocabulary that holds the token as a word would make it that token.

``encode_special_tokens`` keeps the library from looking for special tokens in text, but a model that finds ``</s>``
among its pieces (Unigram), or ``[SEP]`` among its words (WordPiece), gives that piece all the same, and a document
would end itself. Such tokens are spelled by others, letter by letter if need be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.data.ends import special_tokens, unknown_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Plain:
    """Reads text as nothing but text.

    Args:
        tokenizer: As :func:`jobs.data.tokenizer.read_tokenizer` reads it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        state = json.loads(tokenizer.to_str())
        self._spelled: Mapping[int, list[int]] = {} if _cut_apart(state) else _spellings(tokenizer, state["model"])
        self._special = frozenset(self._spelled)

    @property
    def spells(self) -> bool:
        """Whether any text is read otherwise than the tokenizer alone would read it."""
        return bool(self._spelled)

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, none of which is special."""
        return [self.spelled(one.ids) for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, none of which is special."""
        return self.spelled(list(self._tokenizer.encode(text, add_special_tokens=False).ids))

    def spelled(self, ids: list[int]) -> list[int]:
        """What the tokenizer has found in a text, with those spelled that are special."""
        if not self._special or self._special.isdisjoint(ids):
            return ids
        return [one for number in ids for one in self._spelled.get(number, (number,))]


def _cut_apart(state: Mapping[str, Any]) -> bool:
    """Whether letters and signs are never in one word, as GPT-2 cuts text: then no word is a special token."""
    steps = state["pre_tokenizer"] or {}
    return state["model"]["type"] == "BPE" and steps.get("type") == "ByteLevel" and bool(steps.get("use_regex", True))


def _spellings(tokenizer: Tokenizer, model: Mapping[str, Any]) -> dict[int, list[int]]:
    given = model["vocab"]
    vocab = given if isinstance(given, Mapping) else {piece: number for number, (piece, _) in enumerate(given)}
    unknown = unknown_id(tokenizer)
    special = {name: vocab[name] for name, one in special_tokens(tokenizer).items() if one and name in vocab}
    usable = {piece: number for piece, number in vocab.items() if piece not in special}
    prefix = str(model.get("continuing_subword_prefix") or "")
    return {number: _spell(name, usable, prefix, unknown) for name, number in special.items() if number != unknown}


def _spell(name: str, vocab: Mapping[str, int], prefix: str, unknown: int | None) -> list[int]:
    """The longest pieces that spell a name; what no piece spells is unknown."""
    found: list[int] = []
    at = 0
    while at < len(name):
        pieces = ((stop, vocab.get((prefix if at else "") + name[at:stop])) for stop in range(len(name), at, -1))
        stop, number = next(((stop, number) for stop, number in pieces if number is not None), (at + 1, None))
        found += [number] if number is not None else _bytes(name[at], vocab, unknown)
        at = stop
    return found


def _bytes(letter: str, vocab: Mapping[str, int], unknown: int | None) -> list[int]:
    found = [vocab.get(f"<0x{byte:02X}>") for byte in letter.encode()]
    if all(one is not None for one in found):
        return [one for one in found if one is not None]
    return [] if unknown is None else [unknown]

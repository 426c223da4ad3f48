"""How text becomes shards: what a worker is told, those found and compared with their digests, and the others made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.data import tokenizer as bpe
from jobs.data.shards import FORMAT_VERSION, Shard, SourceMeta, digest_of
from jobs.data.sources import Unit
from jobs.data.spelling import Plain
from jobs.data.store import file_digest, token_width
from jobs.data.surveying import Surveyed
from jobs.data.work import Request, Runner, answers
from strategies.codec import from_json, to_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Place = tuple[str, int]
"""Where a shard lies: the folder of its source's store, and its number."""
_FASTER = 32  # about so many times faster than making a shard is reading it


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that tokens depend on beside the text.

    Attributes:
        tokenizer: The tokenizer's file.
        digest: SHA-256 of that.
        vocab: Tokens that it has.
        end_id: The token that ends a document.
        width: Bytes per token.
        validation: Part of the documents that is kept from training.
        spells: Special tokens are words of its vocabulary, and text that spells one is spelled by others.
    """

    tokenizer: Path
    digest: str
    vocab: int
    end_id: int
    width: int
    validation: float
    spells: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, end_id: int, path: Path, validation: float) -> Recipe:
        """The recipe of a tokenizer that lies in ``path``, one token of which ends a document."""
        vocab = bpe.vocabulary(tokenizer)
        return cls(
            tokenizer=path,
            digest=file_digest(path),
            vocab=vocab,
            end_id=end_id,
            width=token_width(vocab),
            validation=validation,
            spells=Plain(tokenizer).spells,
        )

    def key(self, one: Surveyed) -> tuple[object, ...]:
        """What the store of a source is named by.

        Earlier versions took text that spells a special token for that token, where a vocabulary has it as a word.
        Stores that they made so have other names; all others are found as they are.
        """
        plain = ("plain",) if self.spells else ()
        return FORMAT_VERSION, self.digest, self.end_id, one.digest, len(one.units), self.validation, *plain

    def request(self, unit: Unit, store: Path, number: int) -> Request:
        """What makes a shard."""
        return {
            "verb": "tokenize",
            "unit": to_json(unit),
            "folder": str(store),
            "number": number,
            "tokenizer": str(self.tokenizer),
            "end_id": self.end_id,
            "width": self.width,
            "validation": self.validation,
        }

    def meta(self, one: Surveyed, shards: tuple[Shard, ...]) -> SourceMeta:
        """What a store says of itself."""
        return SourceMeta(
            digest=digest_of(shards, tokenizer=self.digest, end_id=self.end_id, width=self.width),
            width=self.width,
            vocab=self.vocab,
            end_id=self.end_id,
            tokenizer_digest=self.digest,
            source=one.source.path or one.source.kind,
            text_bytes=one.text_bytes,
            empty=one.empty,
            skipped=one.skipped,
            shards=shards,
        )


def make_shards(
    requests: Sequence[Request],
    sizes: Sequence[int],
    known: Mapping[Place, Shard],
    runner: Runner,
    progress: Callable[[str, float], None],
) -> dict[Place, Shard]:
    """Every shard that is asked for.

    Args:
        requests: What makes each.
        sizes: About how many bytes of text each has.
        known: Those that are there: the workers read them, and one that is not what was made is made anew.
        runner: Where the work is done.
        progress: Told the phase and which part of it is done.
    """
    places = [(str(request["folder"]), int(request["number"])) for request in requests]
    asked = [
        _check(one, known[one]) if one in known else made_by for one, made_by in zip(places, requests, strict=True)
    ]
    weights = [max(1, size // _FASTER) if one in known else size for one, size in zip(places, sizes, strict=True)]
    missing = sum(size for one, size in zip(places, sizes, strict=True) if one not in known)
    total = max(1, sum(sizes))

    def tell(phase: str, part: float) -> None:
        progress(phase, 1 - (1 - part) * missing / total if missing else part)

    told = answers(runner, asked, weights, "tokenizing" if missing else "checking", tell)
    damaged = [number for number, answer in enumerate(told) if answer["shard"] is None]
    if damaged:
        phase = f"making {len(damaged)} damaged {'shard' if len(damaged) == 1 else 'shards'} anew"
        again = answers(runner, [requests[one] for one in damaged], [sizes[one] for one in damaged], phase, progress)
        for number, answer in zip(damaged, again, strict=True):
            told[number] = answer
    return {one: from_json(Shard, answer["shard"]) for one, answer in zip(places, told, strict=True)}


def _check(place: Place, shard: Shard) -> Request:
    return {"verb": "check", "folder": place[0], "number": place[1], "shard": to_json(shard)}

"""Whether sources have what a run asks for: what their text alone excludes, and what their tokens say in the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.data.mixture import SHARES, beyond, shares
from jobs.data.shards import TRAIN, SourceMeta
from jobs.data.surveying import Surveyed, wanted
from jobs.data.tokenizer import bytewise
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def excluded(
    found: Sequence[Surveyed], seq: int, tokenizer: Tokenizer | None, *, samples: int = 0, validation: float = 0.0
) -> list[str]:
    """What is certain before a token is made, which may take hours.

    Args:
        found: The sources.
        seq: Tokens per sequence.
        tokenizer: The one that is given; None for one that is trained on the text.
        samples: Sequences of the whole run; 0 if that is not known.
        validation: Part of the documents that is kept from training.
    """
    problems = []
    if tokenizer is None or bytewise(tokenizer):
        for one in found:
            most = one.text_bytes + one.documents  # with the end of each document
            if one.documents and wanted(one.source) and most < seq + 1:
                problems.append(_short(one, f"at most {most}", seq))
    if samples and not problems and not validation:
        least = 2 if tokenizer is None else 1  # the end of a document, and something before it
        windows = [max(0, (least * one.documents - 1) // seq) for one in found]
        if problem := beyond([one.source for one in found], windows, samples):
            problems.append(f"data.sources: {problem}, at least")
    return problems


def settled(found: Sequence[Surveyed], metas: Sequence[SourceMeta], seq: int, samples: int) -> list[int]:
    """Parts of all samples, by the sources' windows.

    Raises:
        ConfigError: A source is shorter than one sequence, or the epochs cannot be had.
    """
    windows = [max(0, (meta.tokens(TRAIN) - 1) // seq) for meta in metas]
    problems = [
        _short(one, str(meta.tokens(TRAIN)), seq)
        for one, meta, number in zip(found, metas, windows, strict=True)
        if not number and wanted(one.source)
    ]
    parts, problem = shares([one.source for one in found], windows, samples) if not problems else ([], "")
    if problem:
        problems.append(f"data.sources: {problem}")
    if problems:
        raise ConfigError("The data do not fit the run:\n" + "\n".join(f"  - {one}" for one in problems))
    assert sum(parts) == SHARES
    return parts


def _short(one: Surveyed, tokens: str, seq: int) -> str:
    return (
        f"{one.source.name}: is shorter than one sequence: it has {tokens} tokens to train on, "
        f"model.seq={seq} needs {seq + 1}"
    )

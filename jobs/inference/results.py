"""What an evaluation found, from the scores of its rows: perplexity, accuracy and its standard error. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.inference.rows import Row


def summary(rows: Sequence[Row], losses: Mapping[int, float]) -> dict[str, Any]:
    """Everything that was measured.

    Args:
        rows: The rows.
        losses: Negative log-likelihood of what counts in each row, by its number.

    Returns:
        ``text`` (tokens, bytes, documents, loss per token, perplexity, bits per byte) and ``choices`` (questions,
        accuracy raw and normalised by the length of the choices in bytes, each with its standard error); null for what
        was not asked.
    """
    texts = [number for number, row in enumerate(rows) if row.choice < 0]
    choices = [number for number, row in enumerate(rows) if row.choice >= 0]
    return {
        "text": _perplexity(rows, losses, texts) if texts else None,
        "choices": _accuracy(rows, losses, choices) if choices else None,
    }


def _perplexity(rows: Sequence[Row], losses: Mapping[int, float], numbers: Sequence[int]) -> dict[str, Any]:
    tokens = sum(len(rows[number].tokens) - rows[number].begin for number in numbers)
    size = sum(rows[number].bytes for number in numbers)
    total = math.fsum(losses[number] for number in numbers)  # exact, so that the order of batches does not matter
    return {
        "documents": len({rows[number].item for number in numbers}),
        "tokens": tokens,
        "bytes": size,
        "loss": total / tokens,
        "perplexity": math.exp(min(total / tokens, 700.0)),
        "bits_per_byte": total / math.log(2) / size,
    }


def _accuracy(rows: Sequence[Row], losses: Mapping[int, float], numbers: Sequence[int]) -> dict[str, Any]:
    questions: dict[int, list[int]] = defaultdict(list)
    for number in numbers:
        questions[rows[number].item].append(number)
    raw = [min(those, key=lambda n: losses[n]) for those in questions.values()]
    normalised = [min(those, key=lambda n: losses[n] / rows[n].bytes) for those in questions.values()]
    found: dict[str, Any] = {"questions": len(questions)}
    for name, best in (("accuracy", raw), ("accuracy_normalised", normalised)):
        share = sum(rows[number].right for number in best) / len(best)
        error = math.sqrt(share * (1 - share) / (len(best) - 1)) if len(best) > 1 else None
        found |= {name: share, f"{name}_stderr": error}
    return found


def table(found: Mapping[str, Any]) -> str:
    """The same for people."""
    lines = []
    if found["text"]:
        text = found["text"]
        counts = f"{text['tokens']:,} tokens of {text['documents']:,} documents"
        lines += [
            f"perplexity         {text['perplexity']:.4f}  ({counts})",
            f"loss per token     {text['loss']:.6f}",
            f"bits per byte      {text['bits_per_byte']:.6f}",
        ]
    if found["choices"]:
        choices = found["choices"]
        lines.append(f"questions          {choices['questions']:,}")
        for name, words in (("accuracy", "accuracy"), ("accuracy_normalised", "... normalised")):
            error = choices[f"{name}_stderr"]
            spread = "" if error is None else f" +- {100 * error:.2f} % (standard error)"
            lines.append(f"{words:<18} {100 * choices[name]:.2f} %{spread}")
    return "\n".join(lines)

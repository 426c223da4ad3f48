"""From files to rows of tokens, once, where the job is submitted; every rank reads the same rows in the same order.

A row is a piece of text that goes through the model once. The file of rows is named by the digest of its content and
written aside, so that it is whole or not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.checkpoint.layout import sync_dir, write_durably
from jobs.data.ends import named_beside
from jobs.data.spelling import Plain
from jobs.data.tokenizer import END_OF_TEXT_ID, read_tokenizer, vocabulary
from jobs.hf.folder import CONFIG
from jobs.inference.questions import Question, read_prompts, read_questions, read_texts
from jobs.spec import InferenceSpec, WeightsSpec
from jobs.weights import data_of, samples_of, tokenizer_of
from strategies.codec import from_json, to_json
from strategies.errors import ConfigError, PhalanxError, StorageError
from strategies.specs import ModelSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TOLD = 10  # choices, the others are counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One piece of text.

    Attributes:
        tokens: Its tokens, at most one more than the model's sequence (none is predicted from the last).
        begin: The first token that counts; those before it are context.
        item: Number of the document, the question or the prompt.
        choice: Which choice of a question it is; -1 for a text or a prompt.
        bytes: Length of what counts, in UTF-8; of a document, 0 in all rows but its first.
        right: It is the right choice.
        key: What fixes the draws of a generation, beside the seed and the position.
    """

    tokens: tuple[int, ...]
    begin: int
    item: int
    choice: int = -1
    bytes: int = 0
    right: bool = False
    key: str = ""


class Encoder:
    """A tokenizer as training reads text with it, and the token that begins a document.

    Text is text: what spells a special token is not that token, neither in a document nor in a question or a prompt.

    Args:
        path: A ``tokenizer.json``.
        start: The token that begins a document; None for none.

    Raises:
        StorageError: It cannot be read.
    """

    def __init__(self, path: Path, start: int | None) -> None:
        self.start = [] if start is None else [start]
        try:
            self.tokenizer: Tokenizer = read_tokenizer(path)
            self._plain = Plain(self.tokenizer)
        except ConfigError as error:
            raise StorageError(f"The tokenizer {path} cannot be read.", why=error.what) from error

    def document(self, text: str) -> tuple[list[int], int]:
        """Tokens of a whole document, and how many bytes of its text all but the first of them stand for.

        Nothing is predicted of what comes first; where no token begins a document, that is text. A character that the
        first two tokens share is one that is predicted.
        """
        found = self.tokenizer.encode(text, add_special_tokens=False)
        given = 0 if self.start or len(found) < 2 else min(found.offsets[0][1], found.offsets[1][0])
        return self.start + self._plain.spelled(list(found.ids)), len(text[given:].encode())

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text, as it stands within a document."""
        return self._plain.encode(text)


def flaws(spec: InferenceSpec, weights: WeightsSpec | None, vocab: int, *, stop: bool) -> dict[str, PhalanxError]:
    """All that is wrong with what is asked, by the key of the section ``job``. Nothing of the weights is read.

    Args:
        spec: What is asked.
        weights: The weights, beside which the tokenizer is looked for; None where they are not known.
        vocab: Tokens of the model; 0 if that is not known.
        stop: Whether prompts are wanted, not texts and questions.
    """
    looks: dict[str, Callable[[], object]] = {}
    if weights is not None or spec.tokenizer:
        looks["tokenizer"] = lambda: _check_tokenizer(_place_of(spec, weights), vocab)
    if stop and spec.prompts:
        looks["prompts"] = lambda: read_prompts(spec.prompts)
    if not stop and spec.text:
        looks["text"] = lambda: read_texts(spec.text)
    if not stop and spec.choices:
        looks["choices"] = lambda: read_questions(spec.choices, spec.shots)
    found: dict[str, PhalanxError] = {}
    for key, look in looks.items():
        try:
            look()
        except PhalanxError as error:
            found[key] = error
    return found


def told(found: Mapping[str, PhalanxError]) -> list[str]:
    """Flaws for people, each under its key."""
    lines = []
    for key, error in found.items():
        parts = [error.what, error.why and f"({error.why})", error.hint]
        lines.append(f"job.{key}: {' '.join(part for part in parts if part)}".replace("\n", "\n    "))
    return lines


def require(spec: InferenceSpec, weights: WeightsSpec, model: ModelSpec, *, stop: bool) -> None:
    """Refuse what is asked with all that is wrong with it, before anything is computed.

    Raises:
        ConfigError: A file has bad lines, or the tokenizer does not fit the model; or several things are wrong.
        StorageError: A file cannot be read.
    """
    found = flaws(spec, weights, model.vocab, stop=stop)
    if len(found) == 1:
        raise next(iter(found.values()))
    if found:
        lines = "\n".join(f"  - {line}" for line in told(found))
        raise ConfigError(f"What is asked has {len(found)} problems:\n{lines}", hint="Nothing was written.")


def prepare(spec: InferenceSpec, weights: WeightsSpec, model: ModelSpec, cache: Path, *, stop: bool) -> InferenceSpec:
    """Make the rows of a job.

    Args:
        spec: What is asked.
        weights: The weights, beside which the tokenizer is looked for.
        model: The model.
        cache: Folder of prepared data, on the file system that the ranks see.
        stop: Whether prompts are wanted, not texts and questions.

    Returns:
        ``spec`` with all from ``tokenizer`` on filled.

    Raises:
        ConfigError: A file has bad lines, or the tokenizer does not fit the model; all of it is told. Or a choice is
            longer than the model's sequence, or there is nothing to predict.
        StorageError: A file cannot be read or written.
    """
    require(spec, weights, model, stop=stop)
    path = _place_of(spec, weights)
    start, end, packing = _ends_of(weights, model)
    encode = Encoder(path, start)
    if end is None and (name := named_beside(path)) is not None:
        end = encode.tokenizer.token_to_id(name)
    found = list(_prompt_rows(spec, encode, model) if stop else _scored_rows(spec, encode, model))
    if not found:
        raise ConfigError("There is nothing to predict.", why="no text has more than one token")
    data = "".join(json.dumps(to_json(row), separators=(",", ":")) + "\n" for row in found).encode()
    digest = hashlib.sha256(data).hexdigest()
    file = cache.absolute() / f"rows-{digest[:32]}.jsonl"
    _keep(file, data)
    spec = replace(spec, tokenizer=str(path), start=start, end=end, packing=packing)
    return replace(spec, rows=str(file), digest=digest, count=len(found))


def read_rows(spec: InferenceSpec) -> list[Row]:
    """The rows that :func:`prepare` made.

    Raises:
        StorageError: They are gone or damaged.
    """
    hint = "Check that the folder is shared by all nodes, or submit again: the rows are prepared anew."
    try:
        data = Path(spec.rows).read_bytes()
    except OSError as error:
        raise StorageError(f"Cannot read the rows {spec.rows}.", why=str(error), hint=hint) from error
    if hashlib.sha256(data).hexdigest() != spec.digest:
        raise StorageError(f"The rows {spec.rows} are damaged.", why="their digest is another", hint=hint)
    return [from_json(Row, json.loads(line)) for line in data.splitlines()]


def _scored_rows(spec: InferenceSpec, encode: Encoder, model: ModelSpec) -> Iterator[Row]:
    for item, text in enumerate(read_texts(spec.text) if spec.text else []):
        yield from _windows(*encode.document(text), item, model.seq)
    questions = read_questions(spec.choices, spec.shots) if spec.choices else []
    examples = "".join(question.solved() for question in questions[: spec.shots])
    whole = [
        row
        for item, question in enumerate(questions[spec.shots :])
        for row in _choices(examples, question, item, encode)
    ]
    yield from _cut(whole, spec, model.seq)


def _windows(tokens: list[int], size: int, item: int, seq: int) -> Iterator[Row]:
    """A document in pieces of ``seq`` predictions; every token but the first is predicted exactly once."""
    for first in range(0, len(tokens) - 1, seq):
        piece = tuple(tokens[first : first + seq + 1])
        yield Row(tokens=piece, begin=1, item=item, bytes=size if first == 0 else 0)


def _choices(examples: str, question: Question, item: int, encode: Encoder) -> Iterator[Row]:
    context = examples + question.prompt()
    before = len(encode.start) + len(encode(context))
    for index, choice in enumerate(question.choices):
        whole = encode.start + encode(f"{context} {choice}")
        begin = max(1, min(before, len(whole) - 1))  # a choice that merges into its context has at least a token
        right = index == question.answer
        size = len(f" {choice}".encode())
        yield Row(tokens=tuple(whole), begin=begin, item=item, choice=index, bytes=size, right=right)


def _cut(rows: list[Row], spec: InferenceSpec, seq: int) -> Iterator[Row]:
    """Choices with what stands before them; what is too long loses its beginning.

    Raises:
        ConfigError: A choice alone is too long: it would be judged by a part of it, which stands behind nothing.
    """
    long = [row for row in rows if len(row.tokens) - row.begin > seq]
    if long:
        lines = [
            f"  - choice {row.choice + 1} of question {row.item + spec.shots + 1}: {len(row.tokens) - row.begin} tokens"
            for row in long[:_TOLD]
        ] + ([f"  - and {len(long) - _TOLD} more"] if len(long) > _TOLD else [])
        what = f"{spec.choices} has {len(long)} choices that are longer than the {seq} tokens of the model's sequence:"
        raise ConfigError("\n".join([what, *lines]), hint="Shorten them, or leave their questions out.")
    for row in rows:
        cut = max(0, len(row.tokens) - seq - 1)
        yield replace(row, tokens=row.tokens[cut:], begin=row.begin - cut)


def _prompt_rows(spec: InferenceSpec, encode: Encoder, model: ModelSpec) -> Iterator[Row]:
    prompts = ([spec.prompt] if spec.prompt else []) + (read_prompts(spec.prompts) if spec.prompts else [])
    for item, prompt in enumerate(prompts):
        tokens = encode.start + encode(prompt)
        if not tokens:
            raise ConfigError(f"Prompt {item + 1} has no tokens, and the tokenizer no token that begins a text.")
        yield Row(tokens=tuple(tokens), begin=len(tokens), item=item, key=prompt)


def _place_of(spec: InferenceSpec, weights: WeightsSpec | None) -> Path:
    """The tokenizer that is named, or the one beside the weights.

    Raises:
        ConfigError: There is none.
    """
    if spec.tokenizer:
        return Path(spec.tokenizer)
    assert weights is not None, "nobody named a tokenizer"
    path = tokenizer_of(weights)
    if path is None:
        raise ConfigError(f"There is no tokenizer beside {weights.path}.", hint="Name one: job.tokenizer=FILE.")
    return path


def _check_tokenizer(path: Path, vocab: int) -> None:
    """Check that a tokenizer can be read, and that each of its numbers is one of ``vocab`` tokens; 0: any is.

    Raises:
        ConfigError: The model has too few tokens.
        StorageError: It cannot be read.
    """
    size = vocabulary(Encoder(path, None).tokenizer)
    if vocab and size > vocab:
        raise ConfigError(
            f"The tokenizer {path} needs a vocabulary of {size} tokens, the model has only {vocab}.",
            hint="job.tokenizer=FILE names the one that belongs to the model.",
        )


def _ends_of(weights: WeightsSpec, model: ModelSpec) -> tuple[int | None, int | None, bool]:
    """The tokens that begin and end a document, and whether documents were apart where the weights were trained.

    In a run one token is both, as it stands between documents; but where these are apart, none sees the token before
    its first. A folder's config.json may name them; else the files of the tokenizer may name the end.
    """
    if weights.kind == "checkpoint":
        samples = samples_of(weights)
        packing = bool(samples.get("packing", False))
        end = int(samples.get("end_id", data_of(weights).get("end_id", END_OF_TEXT_ID)))
        return None if packing else end, end, packing
    config: Any = json.loads((Path(weights.path) / CONFIG).read_text())
    first, last = (config.get(name) for name in ("bos_token_id", "eos_token_id"))
    last = last[0] if isinstance(last, list) and last else last  # of several the first is that of documents
    begins, ends = (one if isinstance(one, int) and 0 <= one < model.vocab else None for one in (first, last))
    return begins, ends, False


def _keep(file: Path, data: bytes) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_bytes() != data:
            write_durably(aside, data)
            os.replace(aside, file)
            sync_dir(file.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise StorageError(f"Cannot write the rows {file}.", why=error.strerror or str(error)) from error

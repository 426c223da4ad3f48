"""Local files of an evaluation or a generation: texts, questions, prompts. Every bad line at once. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from strategies.errors import ConfigError, StorageError, did_you_mean

T = TypeVar("T")
_TOLD = 10  # bad lines, the others are counted
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question with its choices.

    Attributes:
        question: What is asked.
        choices: The possible answers, at least two.
        answer: Index of the right one.
    """

    question: str
    choices: tuple[str, ...]
    answer: int

    def prompt(self) -> str:
        """What stands before a choice."""
        return f"Question: {self.question}\nAnswer:"

    def solved(self) -> str:
        """The question with its answer, as an example for another."""
        return f"{self.prompt()} {self.choices[self.answer]}\n\n"


def read_texts(place: str) -> list[str]:
    """The documents of a text file, of a jsonl file (key ``text``), or of all such files in a folder.

    Raises:
        ConfigError: A line is no document, or there is no text.
        StorageError: A file cannot be read.
    """
    path = Path(place)
    files = sorted(one for one in path.rglob("*") if one.suffix in TEXT_SUFFIXES) if path.is_dir() else [path]
    documents: list[str] = []
    for file in files:
        if file.suffix == ".jsonl":
            documents += _lines(file, lambda value: _text(value, "text"))
        else:
            documents.append(_read(file))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ConfigError(f"There is no text in {place}.", hint=f"Files with {', '.join(TEXT_SUFFIXES)} are read.")
    return documents


def read_questions(place: str, shots: int) -> list[Question]:
    """The questions of a jsonl file with the keys ``question``, ``choices`` and ``answer`` (an index, or the choice).

    Raises:
        ConfigError: Lines that are no questions, or too few of them for ``shots`` examples.
        StorageError: The file cannot be read.
    """
    questions = _lines(Path(place), _question)
    if len(questions) <= shots:
        raise ConfigError(
            f"{place} has {len(questions)} questions, job.shots={shots} takes so many as examples and leaves none.",
            hint=f"job.shots={max(0, len(questions) - 1)} or less.",
        )
    return questions


def read_prompts(place: str) -> list[str]:
    """The prompts of a jsonl file (key ``prompt``), or the lines of a text file.

    Raises:
        ConfigError: A line is no prompt, or there is none.
        StorageError: The file cannot be read.
    """
    path = Path(place)
    if path.suffix == ".jsonl":
        prompts = _lines(path, lambda value: _text(value, "prompt"))
    else:
        prompts = [line for _, line in _numbered(path)]
    if not prompts:
        raise ConfigError(f"There is no prompt in {place}.", hint="One per line, or jsonl with the key 'prompt'.")
    return prompts


def _question(value: Mapping[str, Any]) -> Question:
    unknown = [key for key in value if key not in ("question", "choices", "answer", "id")]
    if unknown:
        raise ValueError(f"unknown key '{unknown[0]}'. {did_you_mean(unknown[0], ('question', 'choices', 'answer'))}")
    text, choices, answer = _text(value, "question"), value.get("choices"), value.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise ValueError("'choices' must be a list of at least two texts")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"'answer' must be one of the choices or 0..{len(choices) - 1}, found {answer!r}")
    return Question(question=text, choices=tuple(choices), answer=answer)


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise ValueError(f"'{key}' is missing" if text is None else f"'{key}' must be a text, found {text!r}")
    return text


def _lines(path: Path, decode: Callable[[Mapping[str, Any]], T]) -> list[T]:
    """Every line of a jsonl file, or all that is wrong with them."""
    values, problems = [], []
    for number, line in _numbered(path):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not a mapping")
            values.append(decode(value))
        except ValueError as error:
            problems.append(f"  - line {number}: {error}")
    if problems:
        more = [f"  - and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
        raise ConfigError("\n".join([f"{path} has {len(problems)} bad lines:", *problems[:_TOLD], *more]))
    return values


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    # Not splitlines(): a string of JSON may hold characters that end a line elsewhere (U+0085, U+2028).
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            yield number, line


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            f"Cannot read {path}.", why=str(error), hint="Give an existing file of UTF-8 text."
        ) from error

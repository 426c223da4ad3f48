"""Which token of a tokenizer ends a document: the one that is asked for, or that the files beside it name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
USUAL = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")
MAP = "special_tokens_map.json"
_BY_NAME = ("tokenizer_config.json", MAP)
_BY_NUMBER = ("generation_config.json", "config.json")
_SHOWN = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """The token that ends a document.

    Attributes:
        name: How it is written.
        id: Its number.
        why: Who says so, for people.
    """

    name: str
    id: int
    why: str


def find_end(tokenizer: Tokenizer, path: Path, asked: str = "", before: int | None = None) -> End:
    """The token that ends a document. It is made a special one where it is none yet, so that no text is that token.

    Args:
        tokenizer: The tokenizer, as :func:`jobs.data.tokenizer.read_tokenizer` reads it.
        path: Its file; those beside it may name the token.
        asked: What a person has named; "" for nothing.
        before: The number of the token that has ended documents until now; None for nothing.

    Raises:
        ConfigError: There is no such token, or nobody knows which it is.
    """
    if asked:
        if asked not in _added(tokenizer):
            raise ConfigError(f"data.end_token: {asked!r} is no special token of {path}. {_known(tokenizer, asked)}")
        found = _end(tokenizer, asked, "data.end_token names it")
    elif before is not None and (name := tokenizer.id_to_token(before)) is not None:
        found = _end(tokenizer, name, "it has ended them until now")
    else:
        likely = _beside(tokenizer, path) or usual(tokenizer)
        if likely is None:
            raise ConfigError(
                f"data.tokenizer: {path} has no token that ends a document (one of {', '.join(USUAL)}), and no "
                f"{_BY_NAME[0]} beside it names one. data.end_token=TOKEN names it. {_known(tokenizer)}"
            )
        found = likely
    if found.id == unknown_id(tokenizer):
        raise ConfigError(
            f"data.tokenizer: {found.name!r} of {path} cannot end documents: text that the tokenizer does not know "
            f"becomes it. data.end_token=TOKEN names another. {_known(tokenizer)}"
        )
    if not special_tokens(tokenizer).get(found.name):
        tokenizer.add_special_tokens([found.name])
    return found


def named_beside(path: Path) -> str | None:
    """The name that the files beside a tokenizer give to its end; None if they give none.

    Raises:
        ConfigError: One of them cannot be read.
    """
    for name in _BY_NAME:
        value = _read(path.parent / name).get("eos_token")
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str) and value:
            return value
    return None


def usual(tokenizer: Tokenizer) -> End | None:
    """The end by the names that are usual, where nothing else is known; special tokens count before others."""
    known = special_tokens(tokenizer)
    names = [name for name in USUAL if known.get(name)]
    names += [name for name in USUAL if tokenizer.token_to_id(name) is not None]
    return _end(tokenizer, names[0], "its name is a usual one") if names else None


def special_tokens(tokenizer: Tokenizer) -> dict[str, bool]:
    """Whether each token that was added to a vocabulary is a special one, by name."""
    return {token.content: bool(token.special) for token in tokenizer.get_added_tokens_decoder().values()}


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The token that stands for text that a vocabulary cannot spell; None where it spells any, or leaves it out."""
    state = json.loads(tokenizer.to_str())
    model, steps = state["model"], json.dumps(state["pre_tokenizer"])
    if model["type"] == "BPE" and '"ByteLevel"' in steps:
        return None  # every byte is a token, whatever the file calls unknown
    if model["type"] == "Unigram":
        found: int | None = model.get("unk_id")
        return found
    name = model.get("unk_token")
    return tokenizer.token_to_id(name) if name else None


def _added(tokenizer: Tokenizer) -> set[str]:
    return set(special_tokens(tokenizer))


def _end(tokenizer: Tokenizer, name: str, why: str) -> End:
    number = tokenizer.token_to_id(name)
    assert number is not None
    return End(name=name, id=number, why=why)


def _beside(tokenizer: Tokenizer, path: Path) -> End | None:
    """What the files beside the tokenizer say; numbers only count where they are those of special tokens."""
    if name := named_beside(path):
        if tokenizer.token_to_id(name) is None:
            raise ConfigError(
                f"data.tokenizer: the files beside {path} name {name!r} as the end of a text, and it has no such "
                f"token. data.end_token=TOKEN names another. {_known(tokenizer)}"
            )
        return _end(tokenizer, name, "the files beside the tokenizer name it")
    for file in _BY_NUMBER:
        number = _read(path.parent / file).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and number >= 0:
            name = tokenizer.id_to_token(number)
            if name is not None and special_tokens(tokenizer).get(name):
                return _end(tokenizer, name, f"{file} beside the tokenizer says so")
    return None


def _known(tokenizer: Tokenizer, asked: str = "") -> str:
    """The special tokens, for people, the nearest first."""
    names = sorted(_added(tokenizer))
    if not names:
        return "It has no special tokens"
    near = did_you_mean(asked, names).partition("Known: ")[0] if asked else ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{near}Its special tokens: {', '.join(names[:_SHOWN])}{more}"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    return found if isinstance(found, dict) else {}

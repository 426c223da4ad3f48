"""What becomes of the data of a run that is resumed: what of them is kept, and what it means if they are others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jobs.spec import DataSpec, SourceSpec
from launcher.data_checks import unprepared

END = "the documents of the run end in another token, which data.end_token can name"
TOKENIZER = "another tokenizer makes other tokens of the same text"
OTHER = "other text would be other samples under the same numbers"
_ANEW = "what was made anew is not what the run began with"


def kept_end(old: DataSpec, new: DataSpec) -> int | None:
    """The token that ends documents if data have to be made anew: that of the run, unless a person names one.

    What the files beside a tokenizer say may have changed since. None leaves it to them.
    """
    return old.end_id if old.vocab and old.tokenizer == new.tokenizer != "" and not new.end_token else None


def other_data(old: DataSpec, new: DataSpec) -> DataSpec:
    """What is asked for instead of data that are prepared and there, in a form that shows whether it may be.

    All that may change is where a text lies, and how the end of its documents is named. So nothing is ever prepared for
    this: either the tokens are those of the run, or they are refused.

    Raises:
        ConfigError: There is no such end.
        StorageError: The text or the store cannot be read.
    """
    from jobs.data.build import same_tokens

    found = replace(new, store=old.store, digest=old.digest, vocab=old.vocab, end_id=_end_id(old, new))
    if new.path == old.path and unprepared(new).sources == unprepared(old).sources:
        found = replace(found, sources=old.sources)
    if replace(found, path=old.path) == old and not same_tokens(new, Path(old.store)):
        return replace(found, digest=f"other text in {new.path}")
    return found


def _end_id(old: DataSpec, new: DataSpec) -> int:
    if not new.end_token or new.end_token == old.end_token or new.tokenizer != old.tokenizer:
        return old.end_id
    from jobs.data.ends import find_end
    from jobs.data.store import TOKENIZER as FILE
    from jobs.data.tokenizer import read_tokenizer

    path = Path(old.store, FILE)
    return find_end(read_tokenizer(path), path, new.end_token).id


def same_elsewhere(old: DataSpec, new: DataSpec) -> bool:
    """Whether the tokens of all sources are the same, wherever they and their text lie."""
    return _bare(old.sources) == _bare(new.sources) and all(one.digest for one in new.sources)


def cause(old: DataSpec, new: DataSpec) -> str:
    """Why the tokens of prepared data are others: the end of documents, the tokenizer, or the text."""
    if new.tokenizer != old.tokenizer:
        return TOKENIZER
    if new.end_id != old.end_id:
        return END
    if not old.tokenizer or not all(one.digest for one in new.sources):
        return OTHER
    if Path(new.store).name != Path(old.store).name:  # the folder is named by what is in the file
        return f"{_ANEW}: the tokenizer's file has changed, or this version reads it otherwise"
    return f"{_ANEW}: the text has changed, or this version reads it otherwise"


def _bare(sources: Sequence[SourceSpec]) -> list[SourceSpec]:
    return [replace(one, store="", path="") for one in sources]

"""The words of a command line: what each says, which cannot be understood, and what those may have been meant to say.

Pure: the grammar is Hydra's, and :mod:`launcher.config` has it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.schema import GROUPS
from launcher.typed import Problem
from strategies.errors import ConfigError, did_you_mean

SEARCHPATH = "hydra.searchpath"
READINGS = 2  # what a word that cannot be understood may have meant, beside nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """One override, parsed.

    Attributes:
        text: What was typed.
        key: Group or dotted key.
        value: Plain value; None for a deletion.
        group: It picks a file of a group.
        delete: It removes the key, so that the value is derived or the schema's default.
    """

    text: str
    key: str
    value: Any = None
    group: bool = False
    delete: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Wrong:
    """A word that cannot be understood.

    Attributes:
        problem: Why.
        meant: What it may have been meant to be, the nearest first; may be empty.
    """

    problem: Problem
    meant: tuple[Given, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """A command line.

    Attributes:
        given: Every word that can be understood.
        wrong: Every other.
        folders: Folders in which files are looked for, the user's own first.
    """

    given: tuple[Given, ...]
    wrong: tuple[Wrong, ...]
    folders: tuple[Path, ...]

    def readings(self, *, model_known: bool) -> list[tuple[Given, ...]]:
        """What the whole may be meant to be, beside what is left without the words that are wrong.

        Args:
            model_known: What the model says of itself could be read; else it may be any.
        """
        meant = [one.meant for one in self.wrong]
        if not model_known:
            known = choices_in("model", self.folders)
            meant.append(tuple(Given(text="", key="model", value=name, group=True) for name in (known[0], known[-1])))
        found = []
        for number in range(READINGS):
            more = tuple(one[number] for one in meant if len(one) > number)
            found += [(*self.given, *more)] if more else []
        return found


def choices_in(group: str, folders: Iterable[Path]) -> list[str]:
    """Names that ``<group>=`` accepts."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def unknown(one: Given, leaves: Mapping[str, Any]) -> Wrong | None:
    """What is wrong with a word whose key there is not; None if there is."""
    if one.group or one.key in leaves or one.key == SEARCHPATH:
        return None
    sections = {leaf.split(".")[0] for leaf in leaves} | set(GROUPS)
    head, _, tail = one.key.partition(".")
    if one.key in sections:
        return None  # a whole section, `train={steps: 3}`: the decoder looks inside
    if one.key == "hydra" or one.key.startswith(("hydra.", "hydra/")):
        problem = Problem(key=one.text, message="phalanx takes no Hydra settings", hint=f"Known: {SEARCHPATH}.")
        return Wrong(problem=problem)
    if tail and head in sections:
        while (deeper := f"{head}.{tail.partition('.')[0]}") in leaves and "." in tail:
            head, tail = deeper, tail.partition(".")[2]
        known = [leaf.removeprefix(f"{head}.") for leaf in leaves if leaf.startswith(f"{head}.")]
        problem = Problem(key=one.text, message=f"unknown key '{tail}' in '{head}'", hint=did_you_mean(tail, known))
        near = difflib.get_close_matches(tail, known, n=READINGS, cutoff=0.5)
        meant = (dataclasses.replace(one, key=f"{head}.{name}") for name in near)
        return Wrong(problem=problem, meant=tuple(meant))
    elsewhere = [leaf for leaf in leaves if leaf.rpartition(".")[2] == one.key.rpartition(".")[2]]
    hint = f"Did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(head, sections)
    meant = (dataclasses.replace(one, key=leaf) for leaf in elsewhere[:READINGS])
    return Wrong(problem=Problem(key=one.text, message=f"unknown key '{one.key}'", hint=hint), meant=tuple(meant))


def own_folders(given: Iterable[Given]) -> list[Path]:
    """Folders of the user's own files (``hydra.searchpath=[DIR]``)."""
    own: list[Path] = []
    for one in given:
        if one.key == SEARCHPATH:
            names = one.value if isinstance(one.value, list) else [one.value]
            own += [Path(str(name).removeprefix("file://")).absolute() for name in names]
    return own


def wrong_choice(one: Given, folders: Sequence[Path]) -> Wrong | None:
    """What is wrong with a word that picks a file which there is not; None if there is."""
    if not one.group:
        return None
    known = choices_in(one.key, folders)
    if one.delete or one.value is None:
        if one.key == "experiment":
            return None
        return Wrong(
            problem=Problem(key=one.text, message=f"a run needs a {one.key}", hint=f"Known: {', '.join(known)}.")
        )
    name = str(one.value)
    if name in known:
        return None
    hint = did_you_mean(name, known)
    near = difflib.get_close_matches(name, known, n=READINGS, cutoff=0.0)
    meant = tuple(dataclasses.replace(one, value=choice) for choice in near)
    return Wrong(problem=Problem(key=one.text, message=f"there is no {one.key} '{name}'", hint=hint), meant=meant)


def fault_words(raw: str) -> list[str]:
    """``[a@x=1,y=2,b@z=3]``, the list whose inner quotes a shell has eaten, as ``[a@x=1,y=2] [b@z=3]``."""
    words: list[str] = []
    for word in raw.strip().strip("[]").split(","):
        if "@" in word or not words:
            words.append(word.strip())
        else:
            words[-1] += f",{word.strip()}"
    return [word.strip("\"'") for word in words if word]


def syntax_error(text: str, error: Exception) -> ConfigError:
    """What is wrong with a word that is not in the grammar."""
    if "=" not in text:
        return ConfigError(f"'{text}' is not an override: it has no '='; write key=value")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(f"cannot be parsed ({reason}); quote a value with special characters: 'key=\"value\"'")


def located(problem: Problem, words: Mapping[str, str], file_of: Callable[[str], str]) -> Problem:
    """The problem with the word that caused it, or else with the file of its key."""
    parts = problem.key.partition("[")[0].split(".")  # an entry of a list was typed with the whole list
    typed = [words[key] for end in range(len(parts), 0, -1) if (key := ".".join(parts[:end])) in words]
    where = f"command line: {typed[0]}" if typed else file_of(problem.key)
    return dataclasses.replace(problem, message=f"{problem.message} ({where})")

"""From what a person typed to a typed configuration: Hydra picks the files of ``conf/``, this module checks the rest.

Hydra composes the groups (``model=llama_tiny``); single values (``train.steps=10``) are parsed with Hydra's grammar and
laid over the result, so that a fresh run and a resumed one (stored configuration plus new overrides) go the same way.
All problems are collected, each with the file or the word on the command line that caused it. The only Hydra import.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from launcher import pretrained
from launcher.contradictions import contradictions
from launcher.findings import common, everything, lines_of
from launcher.readings import Values, readings, typed
from launcher.schema import GROUPS, Config
from launcher.typed import Problem, is_text, leaf_types
from launcher.words import (
    SEARCHPATH,
    Given,
    Words,
    Wrong,
    choices_in,
    fault_words,
    located,
    own_folders,
    syntax_error,
    unknown,
    wrong_choice,
)
from strategies.codec import to_json
from strategies.errors import ConfigError, StorageError


def conf_dir() -> Path:
    """The folder of configuration files that belongs to this installation.

    Raises:
        ConfigError: It is missing.
    """
    folder = Path(__file__).resolve().parent.parent / "conf"
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"The configuration folder {folder} is missing.", hint="Install phalanx again.")
    return folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A configuration that may have something wrong with it.

    Attributes:
        readings: What it may be meant to be; one configuration where nothing is wrong with it.
        problems: All that is wrong with the words, the values, and the weights that they name.
    """

    readings: tuple[Config, ...]
    problems: tuple[Problem, ...] = ()


def compose(overrides: Sequence[str]) -> Config:
    """Compose the configuration that these overrides describe.

    Args:
        overrides: Words in Hydra's grammar, for example ``model=gpt_tiny strategy.tp=2 ++train.lr=1e-3 ~train.min_lr``.

    Raises:
        ConfigError: Anything is wrong with it; all problems at once.
    """
    return sound(draft(overrides))


def draft(overrides: Sequence[str]) -> Draft:
    """The same, with whatever is wrong beside it.

    Raises:
        ConfigError: Files that do not compose, beside which nothing else can be judged.
    """
    words = _understand(overrides)

    def values(given: Sequence[Given]) -> Values:
        return _values(_compose_groups(given, words.folders)[0], given, fresh=True)

    def file_of(key: str) -> str:
        return _file_of(key, _compose_groups(words.given, words.folders)[1], words.folders)

    return _judge(words, values, file_of, fresh=True)


def recompose(stored: Path, overrides: Sequence[str]) -> Config:
    """Lay new overrides over the stored configuration of a run.

    A group override replaces the whole group; everything else stays as it was stored, whatever ``conf/`` says today.

    Args:
        stored: The run's ``config.yaml``.
        overrides: New words in Hydra's grammar.

    Raises:
        ConfigError: Anything is wrong with it; all problems at once.
        StorageError: The stored configuration is missing or damaged.
    """
    return sound(redraft(stored, overrides))


def redraft(stored: Path, overrides: Sequence[str]) -> Draft:
    """The same, with whatever is wrong beside it.

    Raises:
        ConfigError: Files that do not compose, or an experiment is chosen.
        StorageError: The stored configuration is missing or damaged.
    """
    words = _understand(overrides)
    if any(one.group and one.key == "experiment" for one in words.given):
        raise ConfigError(
            "An experiment cannot be changed on resume: it is a whole run.", hint="phalanx submit experiment=..."
        )

    def values(given: Sequence[Given]) -> Values:
        tree = _load(stored)
        picked = [one for one in given if one.group]
        if picked:
            fresh, _ = _compose_groups(given, words.folders)
            for one in picked:
                tree[one.key] = fresh[one.key]
        return _values(tree, given, fresh=False)

    return _judge(words, values, lambda key: str(stored), fresh=False)


def _load(stored: Path) -> DictConfig:
    try:
        tree = OmegaConf.load(stored)
    except (OSError, yaml.YAMLError) as error:
        why, hint = " ".join(str(error).split()), "Bring the file back from a copy, then resume again."
        raise StorageError(f"Cannot read the stored configuration {stored}.", why=why, hint=hint) from error
    if not isinstance(tree, DictConfig):
        raise StorageError(f"{stored} is not a configuration.", hint="Bring the file back from a copy.")
    return tree


def to_yaml(config: Config) -> str:
    """The configuration as YAML; :func:`recompose` reads it."""
    return str(yaml.safe_dump(to_json(config), sort_keys=False, allow_unicode=True))


def choices_of(group: str) -> list[str]:
    """Names that ``<group>=`` accepts."""
    return choices_in(group, [conf_dir()])


# ---- parsing ----------------------------------------------------------------------------------------------------


def _understand(overrides: Sequence[str]) -> Words:
    """Every word, parsed, what is wrong with those that cannot be understood, and the folders of files."""
    given: list[Given] = []
    wrong: list[Wrong] = []
    parser, leaves = OverridesParser.create(), leaf_types(Config)
    for text in overrides:
        try:
            one = _parse(parser, text, leaves)
        except ConfigError as error:
            wrong.append(Wrong(problem=Problem(key=text, message=error.what, hint=error.hint)))
            continue
        bad = unknown(one, leaves)
        given += [] if bad else [one]
        wrong += [bad] if bad else []
    own = own_folders(given)
    folders = (*(folder for folder in own if folder.is_dir()), conf_dir())
    missing = [Problem(key=SEARCHPATH, message=f"{one} is not a folder") for one in own if not one.is_dir()]
    wrong += [Wrong(problem=one) for one in missing]
    if missing:  # what could be chosen is not known then
        known = tuple(one for one in given if wrong_choice(one, folders) is None)
        return Words(given=known, wrong=tuple(wrong), folders=folders)
    choices = {one.text: bad for one in given if (bad := wrong_choice(one, folders))}
    known = tuple(one for one in given if one.text not in choices)
    return Words(given=known, wrong=(*wrong, *choices.values()), folders=folders)


def _parse(parser: OverridesParser, text: str, leaves: dict[str, Any]) -> Given:
    key, equals, raw = text.lstrip("+~").partition("=")
    literal = bool(equals) and is_text(leaves.get(key)) and not text.startswith("~")
    try:
        parsed = parser.parse_override(text)
    except HydraException as error:
        if literal:
            return Given(text=text, key=key, value=raw)
        if key == "faults":
            return Given(text=text, key=key, value=fault_words(raw))
        raise syntax_error(text, error) from error
    if parsed.package is not None:
        raise ConfigError("a package ('@') cannot be chosen here")
    value = parsed.value() if parsed.value_type is not None else None
    if isinstance(value, Sweep):
        if literal:
            return Given(text=text, key=key, value=raw)
        raise ConfigError("is a sweep; one run takes one value", hint=f"A list is written {key}=[{raw}].")
    if literal and value is not None and not isinstance(value, str):
        value = raw
    return Given(
        text=text, key=key, value=value, group=key in GROUPS and not _is_section(parsed), delete=parsed.is_delete()
    )


def _is_section(parsed: Override) -> bool:
    """``model={layers: 2}`` changes values of the group; ``model=name`` picks a file."""
    return not parsed.is_delete() and isinstance(parsed.value(), dict)


# ---- groups -----------------------------------------------------------------------------------------------------


def _compose_groups(given: Sequence[Given], folders: Sequence[Path]) -> tuple[DictConfig, dict[str, str]]:
    """Let Hydra compose the chosen files; returns the tree and the choice of every group."""
    words = [f"{one.key}={'null' if one.value is None else one.value}" for one in given if one.group]
    if folders[:-1]:
        words.append(f"{SEARCHPATH}=[{','.join(f'file://{folder}' for folder in folders[:-1])}]")
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3", job_name="phalanx"):
            tree = hydra_compose("config", words, return_hydra_config=True)
    except MissingConfigException as error:
        options = ", ".join(error.options or [])
        raise ConfigError(
            str(error).splitlines()[0] or "A configuration file is missing.",
            hint=f"Known: {options}." if options else "",
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError("A configuration file is not valid YAML.", why=" ".join(str(error).split())) from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = str(error) or str(error.__cause__ or error.__context__ or "")
        raise ConfigError("The configuration cannot be composed.", why=" ".join(cause.split())) from error
    choices = {str(group): str(choice) for group, choice in tree.hydra.runtime.choices.items() if choice is not None}
    with open_dict(tree):
        del tree["hydra"]
        if choices.get("experiment") and any(one.group and one.key == "strategy" for one in given):
            # Who picks a strategy for a named run wants that one, not the run's own plan laid over it.
            named = (folder / "strategy" / f"{choices['strategy']}.yaml" for folder in folders)
            tree["strategy"] = OmegaConf.load(next(path for path in named if path.is_file()))
    return tree, choices


# ---- values -----------------------------------------------------------------------------------------------------


def _values(tree: DictConfig, given: Sequence[Given], *, fresh: bool) -> Values:
    """Plain values: those of the files with what was typed laid over them."""
    OmegaConf.set_struct(tree, False)
    problems: list[Problem] = []
    try:
        before = OmegaConf.to_container(tree, resolve=False)
        _apply(tree, given)
        typed_keys = {one.key for one in given}
        if fresh or {"model.from_hf", "job.weights"} & typed_keys:  # a stored configuration has the sizes already
            values, problems = pretrained.model_section(tree["job"], tree["model"])
            for key, value in values.items():
                tree["model"][key] = value  # as a whole: nothing is left of experts that were chosen before
            _apply(tree, [one for one in given if one.key.startswith("model.") and one.key != "model.from_hf"])
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    plain, before = cast("dict[str, Any]", plain), cast("dict[str, Any]", before)
    return Values(plain=plain, before=before, problems=tuple(problems))


def _judge(
    words: Words, values: Callable[[Sequence[Given]], Values], file_of: Callable[[str], str], *, fresh: bool
) -> Draft:
    """Everything that is wrong with the words, the values, and what the values amount to."""
    wrong = [one.problem for one in words.wrong]
    try:
        first = values(words.given)
    except ConfigError as error:
        if not wrong:
            raise
        raise everything([*map(str, wrong), *lines_of(error)]) from error
    config, of_values = typed(first)
    found = [config] if config is not None and not first.problems else readings(first)
    for given in words.readings(model_known=not first.problems):
        with contextlib.suppress(ConfigError):  # it cannot have been meant
            found += readings(values(given))
    problems = [*first.problems, *of_values, *common(found, contradictions)]
    if fresh:
        problems += common(found, lambda one: pretrained.checked(one)[1])
        found = [pretrained.checked(one)[0] for one in found]
    said = {one.key: one.text for one in words.given if not one.group and one.key != SEARCHPATH}
    told = [located(one, said, file_of) for one in problems]
    return Draft(readings=tuple(found), problems=(*wrong, *told))


def sound(drafted: Draft) -> Config:
    """The configuration, if nothing is wrong with it; raises ConfigError with all that is."""
    _raise(drafted.problems)
    return drafted.readings[0]


def _apply(tree: DictConfig, given: Iterable[Given]) -> None:
    """Lay single values over the tree, in the order in which they were typed."""
    for one in given:
        if one.group or one.key == SEARCHPATH:
            continue
        if one.delete:
            _delete(tree, one.key)
        else:
            OmegaConf.update(tree, one.key, one.value, merge=True, force_add=True)


def _delete(tree: DictConfig, key: str) -> None:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(tree, parent) if parent else tree
    if node is not None and name in node:
        del node[name]


def _file_of(key: str, choices: dict[str, str], folders: Sequence[Path]) -> str:
    """The file that a key's value comes from."""
    files = []
    if choices.get("experiment"):
        files += [folder / "experiment" / f"{choices['experiment']}.yaml" for folder in folders]
    head = key.partition(".")[0]
    for path in files:
        if path.is_file() and OmegaConf.select(OmegaConf.load(path), key) is not None:
            return str(path)
    if head in choices and head != "experiment":
        own = [folder / head / f"{choices[head]}.yaml" for folder in folders]
        return str(next((path for path in own if path.is_file()), own[-1]))
    return str(folders[-1] / "config.yaml")


def _raise(problems: Sequence[Problem]) -> None:
    if not problems:
        return
    if len(problems) == 1:
        one = problems[0]
        raise ConfigError(f"{one.key}: {one.message}.", hint=one.hint)
    lines = [f"  - {one}" for one in problems]
    told = tuple(map(str, problems))
    raise ConfigError(f"The configuration has {len(problems)} problems:\n" + "\n".join(lines), problems=told)

"""From what a person typed to a typed configuration: Hydra picks the files of ``conf/``, this module checks the rest.

Hydra composes the groups (``model=llama_tiny``); single values (``train.steps=10``) are parsed with Hydra's grammar and
laid over the result, so that a fresh run and a resumed one (stored configuration plus new overrides) go the same way.
All problems are collected, each with the file or the word on the command line that caused it. The only Hydra import.
"""

from __future__ import annotations

import dataclasses
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
from launcher.schema import GROUPS, HINTS, MAXIMUM, MINIMUM, Config
from launcher.typed import Bounds, Problem, decode, is_text, leaf_types
from strategies.codec import to_json
from strategies.errors import ConfigError, StorageError, did_you_mean

SEARCHPATH = "hydra.searchpath"


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
        config: None if not every value has a meaning.
        problems: All that is wrong with the values, and with the weights that they name.
        model_known: The model is the one that was asked for: what it says of itself could be read.
    """

    config: Config | None
    problems: tuple[Problem, ...] = ()
    model_known: bool = True


def compose(overrides: Sequence[str]) -> Config:
    """Compose the configuration that these overrides describe.

    Args:
        overrides: Words in Hydra's grammar, for example ``model=gpt_tiny strategy.tp=2 ++train.lr=1e-3 ~train.min_lr``.

    Raises:
        ConfigError: Anything is wrong with it; all problems at once.
    """
    return sound(draft(overrides))


def draft(overrides: Sequence[str]) -> Draft:
    """The same, with whatever is wrong with the values beside it.

    Raises:
        ConfigError: Words that cannot be understood, or files that do not compose; all problems at once.
    """
    given, folders = _understand(overrides)
    tree, choices = _compose_groups(given)
    return _finish(tree, given, lambda key: _file_of(key, choices, folders), fresh=True)


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
    given, _ = _understand(overrides)
    try:
        tree = OmegaConf.load(stored)
    except (OSError, yaml.YAMLError) as error:
        why, hint = " ".join(str(error).split()), "Bring the file back from a copy, then resume again."
        raise StorageError(f"Cannot read the stored configuration {stored}.", why=why, hint=hint) from error
    picked = [one for one in given if one.group]
    if not isinstance(tree, DictConfig):
        raise StorageError(f"{stored} is not a configuration.", hint="Bring the file back from a copy.")
    if any(one.key == "experiment" for one in picked):
        raise ConfigError(
            "An experiment cannot be changed on resume: it is a whole run.", hint="phalanx submit experiment=..."
        )
    if picked:
        fresh, _ = _compose_groups(given)
        for one in picked:
            tree[one.key] = fresh[one.key]
    return sound(_finish(tree, given, lambda key: str(stored), fresh=False))


def to_yaml(config: Config) -> str:
    """The configuration as YAML; :func:`recompose` reads it."""
    return str(yaml.safe_dump(to_json(config), sort_keys=False, allow_unicode=True))


def choices_of(group: str, folders: Iterable[Path] | None = None) -> list[str]:
    """Names that ``<group>=`` accepts."""
    where = folders if folders is not None else [conf_dir()]
    return sorted({path.stem for folder in where for path in (folder / group).glob("*.yaml")})


# ---- parsing ----------------------------------------------------------------------------------------------------


def _understand(overrides: Sequence[str]) -> tuple[list[Given], list[Path]]:
    """Every word, parsed, and the folders in which files are looked for; or all that is wrong with the words."""
    given, problems = _parse(overrides)
    folders = _folders(given)
    _raise([*problems, *_wrong_choices(given, folders)])
    return given, folders


def _parse(overrides: Sequence[str]) -> tuple[list[Given], list[Problem]]:
    parser = OverridesParser.create()
    leaves = leaf_types(Config)
    given: list[Given] = []
    problems: list[Problem] = []
    for text in overrides:
        try:
            one = _parse_one(parser, text, leaves)
        except ConfigError as error:
            problems.append(Problem(key=text, message=error.what, hint=error.hint))
            continue
        problem = _unknown(one, leaves)
        if problem is None:
            given.append(one)
        else:
            problems.append(problem)
    return given, problems


def _parse_one(parser: OverridesParser, text: str, leaves: dict[str, Any]) -> Given:
    key, equals, raw = text.lstrip("+~").partition("=")
    literal = bool(equals) and is_text(leaves.get(key)) and not text.startswith("~")
    try:
        parsed = parser.parse_override(text)
    except HydraException as error:
        if literal:
            return Given(text=text, key=key, value=raw)
        if key == "faults":
            return Given(text=text, key=key, value=_fault_words(raw))
        raise ConfigError(*_explain_syntax(text, error)) from error
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


def _fault_words(raw: str) -> list[str]:
    """``[a@x=1,y=2,b@z=3]``, the list whose inner quotes a shell has eaten, as ``[a@x=1,y=2] [b@z=3]``."""
    words: list[str] = []
    for word in raw.strip().strip("[]").split(","):
        if "@" in word or not words:
            words.append(word.strip())
        else:
            words[-1] += f",{word.strip()}"
    return [word.strip("\"'") for word in words if word]


def _explain_syntax(text: str, error: HydraException) -> tuple[str]:
    if "=" not in text:
        return (f"'{text}' is not an override: it has no '='; write key=value",)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (f"cannot be parsed ({reason}); quote a value with special characters: 'key=\"value\"'",)


def _unknown(one: Given, leaves: dict[str, Any]) -> Problem | None:
    if one.group or one.key in leaves or one.key == SEARCHPATH:
        return None
    sections = {leaf.split(".")[0] for leaf in leaves} | set(GROUPS)
    head, _, tail = one.key.partition(".")
    if one.key in sections:
        return None  # a whole section, `train={steps: 3}`: the decoder looks inside
    if one.key == "hydra" or one.key.startswith(("hydra.", "hydra/")):
        return Problem(key=one.text, message="phalanx takes no Hydra settings", hint=f"Known: {SEARCHPATH}.")
    if tail and head in sections:
        while (deeper := f"{head}.{tail.partition('.')[0]}") in leaves and "." in tail:
            head, tail = deeper, tail.partition(".")[2]
        known = [leaf.removeprefix(f"{head}.") for leaf in leaves if leaf.startswith(f"{head}.")]
        return Problem(key=one.text, message=f"unknown key '{tail}' in '{head}'", hint=did_you_mean(tail, known))
    elsewhere = [leaf for leaf in leaves if leaf.rpartition(".")[2] == one.key.rpartition(".")[2]]
    hint = f"Did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(head, sections)
    return Problem(key=one.text, message=f"unknown key '{one.key}'", hint=hint)


# ---- groups -----------------------------------------------------------------------------------------------------


def _folders(given: list[Given]) -> list[Path]:
    """Folders with configuration files, the user's own (``hydra.searchpath=[DIR]``) first."""
    own: list[Path] = []
    for one in given:
        if one.key == SEARCHPATH:
            names = one.value if isinstance(one.value, list) else [one.value]
            own += [Path(str(name).removeprefix("file://")).absolute() for name in names]
    missing = [Problem(key=SEARCHPATH, message=f"{folder} is not a folder") for folder in own if not folder.is_dir()]
    _raise(missing)
    return [*own, conf_dir()]


def _wrong_choices(given: list[Given], folders: list[Path]) -> list[Problem]:
    problems = []
    for one in given:
        if not one.group:
            continue
        known = choices_of(one.key, folders)
        optional = one.key == "experiment"
        if one.delete or one.value is None:
            if not optional:
                problems.append(
                    Problem(key=one.text, message=f"a run needs a {one.key}", hint=f"Known: {', '.join(known)}.")
                )
        elif str(one.value) not in known:
            problems.append(
                Problem(
                    key=one.text,
                    message=f"there is no {one.key} '{one.value}'",
                    hint=did_you_mean(str(one.value), known),
                )
            )
    return problems


def _compose_groups(given: list[Given]) -> tuple[DictConfig, dict[str, str]]:
    """Let Hydra compose the chosen files; returns the tree and the choice of every group."""
    words = [f"{one.key}={'null' if one.value is None else one.value}" for one in given if one.group]
    folders = _folders(given)[:-1]
    if folders:
        words.append(f"{SEARCHPATH}=[{','.join(f'file://{folder}' for folder in folders)}]")
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
            named = (folder / "strategy" / f"{choices['strategy']}.yaml" for folder in (*folders, conf_dir()))
            tree["strategy"] = OmegaConf.load(next(path for path in named if path.is_file()))
    return tree, choices


# ---- values -----------------------------------------------------------------------------------------------------


def _finish(tree: DictConfig, given: list[Given], file_of: Callable[[str], str], *, fresh: bool) -> Draft:
    words = {one.key: one.text for one in given if not one.group and one.key != SEARCHPATH}
    OmegaConf.set_struct(tree, False)
    problems: list[Problem] = []
    try:
        _apply(tree, given)
        if fresh or {"model.from_hf", "job.weights"} & set(words):  # a stored configuration has the sizes already
            values, problems = pretrained.model_section(tree["job"], tree["model"])
            for key, value in values.items():
                tree["model"][key] = value  # as a whole: nothing is left of experts that were chosen before
            _apply(tree, [one for one in given if one.key.startswith("model.") and one.key != "model.from_hf"])
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    known = not problems
    config, wrong = decode(Config, plain, Bounds(least=MINIMUM, most=MAXIMUM, hints=HINTS))
    problems += wrong or contradictions(config)
    if fresh and known and config is not None:
        config, of_weights = pretrained.checked(config)
        problems += of_weights
    located = tuple(_located(problem, words, file_of) for problem in problems)
    return Draft(config=cast("Config | None", config), problems=located, model_known=known)


def sound(drafted: Draft) -> Config:
    """The configuration, if nothing is wrong with it; raises ConfigError with all that is."""
    _raise(drafted.problems)
    assert drafted.config is not None, "nothing is wrong with it"
    return drafted.config


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


def _located(problem: Problem, words: dict[str, str], file_of: Callable[[str], str]) -> Problem:
    """The problem with the word or the file that caused it."""
    parts = problem.key.partition("[")[0].split(".")  # an entry of a list was typed with the whole list
    typed = [words[key] for end in range(len(parts), 0, -1) if (key := ".".join(parts[:end])) in words]
    where = f"command line: {typed[0]}" if typed else file_of(problem.key)
    return dataclasses.replace(problem, message=f"{problem.message} ({where})")


def _file_of(key: str, choices: dict[str, str], folders: list[Path]) -> str:
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
    raise ConfigError(f"The configuration has {len(problems)} problems:\n" + "\n".join(lines))

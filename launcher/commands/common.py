"""What several verbs share: the arguments RUN and OVERRIDES with their completion, ``--dir``, ``--json``."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from launcher.ending_signals import heard
from launcher.schema import GROUPS
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launcher.store import RunStore

DEFAULT_DIR = "runs"
F = TypeVar("F", bound=Callable[..., Any])


def say(text: str) -> None:
    """Prose for a person: to stderr, so that stdout carries only what was asked for."""
    click.echo(text, err=True)


def print_json(document: dict[str, Any]) -> None:
    """A document for a program."""
    click.echo(json.dumps(document, indent=2))


def json_option(function: F) -> F:
    """Adds ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, prose on stderr.")(
        function
    )


@contextmanager
def interruptible() -> Iterator[None]:
    """Signals end a command as Ctrl-C does: what was started is ended, and what is half made is removed first."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def dir_option(function: F) -> F:
    """Adds ``--dir``."""
    return click.option(
        "--dir",
        "-C",
        "folder",
        metavar="DIR",
        help=f"Parent folder of run directories (default: {DEFAULT_DIR}); run.dir=DIR works too.",
    )(function)


def overrides_argument(function: F) -> F:
    """Adds OVERRIDES: all remaining words, untouched."""
    return click.argument(
        "overrides", metavar="[OVERRIDES]...", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_override
    )(function)


def run_argument(function: F) -> F:
    """Adds [RUN] and overrides in one argument; :func:`split` takes them apart."""
    return click.argument(
        "words", metavar="[RUN] [run.dir=DIR]", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_run
    )(function)


def split(words: Sequence[str], folder: str | None, *, overrides: bool = False) -> tuple[str | None, Path, list[str]]:
    """RUN, the parent folder of runs, and the remaining overrides.

    Raises:
        ConfigError: There is more than one RUN, or an override where none is taken.
    """
    refs = [word for word in words if "=" not in word and not word.startswith("~")]
    rest = [word for word in words if word not in refs and not word.startswith("run.dir=")]
    given = [word.partition("=")[2].strip("'\"") for word in words if word.startswith("run.dir=")]
    if len(refs) > 1:
        hint = "Give its name, a unique prefix of it, or 'latest' (phalanx status)."
        raise ConfigError(f"One RUN is expected, found {len(refs)}: {' '.join(refs)}.", hint=hint)
    if rest and not overrides:
        hint = "Leave them out; phalanx resume RUN KEY=VALUE changes a run."
        raise ConfigError(f"This verb takes no overrides but run.dir=DIR, found: {' '.join(rest)}.", hint=hint)
    return (refs[0] if refs else None), Path(folder or (given[-1] if given else DEFAULT_DIR)), rest


def find(ref: str | None, parent: Path) -> RunStore:
    """The run that a person means: a name, a unique prefix, ``latest``, or the path of a run directory.

    Raises:
        ConfigError: No RUN was given.
        NotFound: There is no such run.
    """
    from launcher.store import RunStore

    if not ref:
        raise ConfigError("Which run?", hint="Give its name, a unique prefix of it, or 'latest' (phalanx status).")
    if "/" in ref:
        return RunStore.open(Path(ref).absolute())
    return RunStore.find(parent.absolute(), ref)


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of runs."""
    from launcher.store import RunStore

    parent = Path(ctx.params.get("folder") or DEFAULT_DIR)
    return [name for name in [*RunStore.names(parent), "latest"] if name.startswith(incomplete)]


def complete_override(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Groups with their choices, and keys. Reads folder names only: no Hydra."""
    from launcher.schema import Config
    from launcher.typed import leaf_types

    key, equals, start = incomplete.lstrip("+").partition("=")
    if equals and key in GROUPS:
        folder = Path(__file__).resolve().parents[2] / "conf" / key
        return [f"{key}={path.stem}" for path in sorted(folder.glob("*.yaml")) if path.stem.startswith(start)]
    if equals:
        return []
    names = [*(f"{group}=" for group in GROUPS), *(f"{leaf}=" for leaf in leaf_types(Config))]
    return [name for name in names if name.startswith(key)]

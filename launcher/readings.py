"""What a configuration with mistakes in it may have been meant to be, so that the rest of it can be judged. Pure.

A value that means nothing hides nothing else: other values stand in for it, and what is then found wrong under each of
them does not depend on it. What goes away with one of them does, and is not told before the value is mended.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.schema import HINTS, MAXIMUM, MINIMUM, Config
from launcher.typed import Bounds, Problem, decode

_BOUNDS = Bounds(least=MINIMUM, most=MAXIMUM, hints=HINTS)
_VARIANTS = 3  # the value of the file, the nearest legal one, and another legal one
_ROUNDS = 3  # a whole section may take the place of a value, and have mistakes of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """A configuration as plain values.

    Attributes:
        plain: With everything that was typed.
        before: What the files alone say.
        problems: What is wrong with the model that it names.
    """

    plain: Mapping[str, Any]
    before: Mapping[str, Any]
    problems: tuple[Problem, ...] = ()


def typed(values: Values) -> tuple[Config | None, list[Problem]]:
    """The configuration, or everything that is wrong with its values."""
    return decode(Config, values.plain, _BOUNDS)


def readings(values: Values) -> list[Config]:
    """Configurations that it may be meant to be, each of them once; one where nothing is wrong with the values."""
    found: list[Config] = []
    for variant in range(_VARIANTS):
        config = _mended(values, variant)
        if config is not None and config not in found:
            found.append(config)
    return found


def _mended(values: Values, variant: int) -> Config | None:
    plain: Any = values.plain
    for _ in range(_ROUNDS):
        config, wrong = decode(Config, plain, _BOUNDS)
        if not wrong:
            return typing.cast(Config, config)
        for one in wrong:
            instead = one.instead[variant - 1 :] if variant else one.instead
            plain = _with(plain, values.before, one.key.split("."), instead, file=not variant)
    return None


def _with(plain: Any, before: Any, keys: Sequence[str], instead: Sequence[Any], *, file: bool) -> Any:
    """The values with another one under ``keys``: that of the file or the first of ``instead``, or none."""
    if not isinstance(plain, Mapping):
        return before
    name, rest = keys[0], keys[1:]
    there = before.get(name) if isinstance(before, Mapping) else None
    changed = dict(plain)
    differs = isinstance(before, Mapping) and name in before and before[name] != plain.get(name)
    if rest and name in plain:
        changed[name] = _with(plain[name], there, rest, instead, file=file)
    elif differs and (file or not instead):
        changed[name] = there
    elif instead:
        changed[name] = instead[0]
    else:
        changed.pop(name, None)
    return changed

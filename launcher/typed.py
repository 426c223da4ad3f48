"""Plain values into dataclasses, with every problem at once. Pure; the strict one-error codec is strategies.codec."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strategies.codec import from_json
from strategies.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong with a configuration.

    Attributes:
        key: Dotted key, for example ``strategy.tp``.
        message: What is wrong with it.
        hint: What would be right; may be empty.
    """

    key: str
    message: str
    hint: str = ""


def decode(
    cls: type[Any], data: Any, bounds: tuple[Mapping[str, float], Mapping[str, float]]
) -> tuple[Any, list[Problem]]:
    """Build ``cls`` from nested mappings.

    Args:
        cls: A dataclass type whose fields are dataclasses or plain values.
        data: Nested mappings of plain values.
        bounds: Smallest and largest legal values by dotted key.

    Returns:
        The value and no problems, or ``None`` and all problems in the order of the fields.
    """
    problems: list[Problem] = []
    value = _dataclass(cls, data, "", problems)
    if not problems:
        problems = [*_below_or_above(value, "", *bounds)]
    return (None if problems else value), problems


def field_types(cls: type[Any]) -> dict[str, Any]:
    """Resolved type of every field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def leaf_types(cls: type[Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type of every plain value below a dataclass."""
    leaves: dict[str, Any] = {}
    for name, kind in field_types(cls).items():
        if dataclasses.is_dataclass(kind):
            leaves |= leaf_types(typing.cast(type[Any], kind), f"{prefix}{name}.")
        else:
            leaves[prefix + name] = kind
    return leaves


def admits_none(kind: Any) -> bool:
    """Whether ``None`` is a value of the type."""
    return typing.get_origin(kind) in (typing.Union, types.UnionType) and type(None) in typing.get_args(kind)


def is_text(kind: Any) -> bool:
    """Whether the type is ``str``, possibly optional."""
    return kind is str or (admits_none(kind) and str in typing.get_args(kind))


def _dataclass(cls: type[Any], data: Any, prefix: str, problems: list[Problem]) -> Any:
    if not isinstance(data, Mapping):
        problems.append(Problem(key=prefix.rstrip(".") or cls.__name__, message=f"expected a section, found {data!r}"))
        return None
    kinds = field_types(cls)
    for key in data:
        if key not in kinds:
            problems.append(Problem(key=f"{prefix}{key}", message="unknown key", hint=did_you_mean(str(key), kinds)))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        key, kind = prefix + field.name, kinds[field.name]
        if field.name in data:
            values[field.name] = _value(kind, data[field.name], key, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(Problem(key=key, message="missing"))
    return None if problems else cls(**values)


def _value(kind: Any, data: Any, key: str, problems: list[Problem]) -> Any:
    if dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast(type[Any], kind), data, f"{key}.", problems)
    try:
        return from_json(kind, data, where=key)
    except ConfigError as error:
        message = error.what.split(": ", 1)[-1].rstrip(".")
        options = [option for option in _options(kind) if isinstance(option, str)]
        hint = did_you_mean(str(data), options) if options else ""
        problems.append(Problem(key=key, message="not a known value: " + repr(data) if hint else message, hint=hint))
        return None


def _options(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    if admits_none(kind):
        return tuple(option for arg in typing.get_args(kind) for option in _options(arg))
    return ()


def _below_or_above(
    value: Any, prefix: str, least: Mapping[str, float], most: Mapping[str, float]
) -> typing.Iterator[Problem]:
    for field in dataclasses.fields(value):
        key, item = prefix + field.name, getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            yield from _below_or_above(item, f"{key}.", least, most)
        elif isinstance(item, int | float) and not isinstance(item, bool):
            if not math.isfinite(item):
                yield Problem(key=key, message=f"expected a finite number, found {item!r}")
            elif key in least and not item >= least[key]:
                yield Problem(key=key, message=f"expected at least {least[key]:g}, found {item!r}")
            elif key in most and not item <= most[key]:
                yield Problem(key=key, message=f"expected at most {most[key]:g}, found {item!r}")

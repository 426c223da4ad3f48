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
        instead: Legal values, the nearest first, as far as they are known without looking at other keys.
    """

    key: str
    message: str
    hint: str = ""
    instead: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.key}: {self.message}.{f' {self.hint}' if self.hint else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What values may be, by dotted key.

    Attributes:
        least: Smallest legal values.
        most: Largest legal values.
        hints: What helps with a value that is missing or out of bounds.
    """

    least: Mapping[str, float]
    most: Mapping[str, float]
    hints: Mapping[str, str]


def decode(cls: type[Any], data: Any, bounds: Bounds) -> tuple[Any, list[Problem]]:
    """Build ``cls`` from nested mappings.

    Args:
        cls: A dataclass type whose fields are dataclasses (or None) or plain values.
        data: Nested mappings of plain values.
        bounds: What the values may be.

    Returns:
        The value and no problems, or ``None`` and all problems in the order of the fields.
    """
    problems: list[Problem] = []
    value = _dataclass(cls, data, "", bounds, problems)
    return (None if problems else value), problems


def field_types(cls: type[Any]) -> dict[str, Any]:
    """Resolved type of every field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def leaf_types(cls: type[Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type of every plain value below a dataclass, and of every section that may be left out."""
    leaves: dict[str, Any] = {}
    for name, kind in field_types(cls).items():
        inner = section_type(kind)
        if inner is None or admits_none(kind):
            leaves[prefix + name] = kind
        if inner is not None:
            leaves |= leaf_types(inner, f"{prefix}{name}.")
    return leaves


def section_type(kind: Any) -> type[Any] | None:
    """The dataclass of a section, also of one that may be left out; None for a plain value."""
    for option in typing.get_args(kind) if admits_none(kind) else (kind,):
        if dataclasses.is_dataclass(option):
            return typing.cast(type[Any], option)
    return None


def admits_none(kind: Any) -> bool:
    """Whether ``None`` is a value of the type."""
    return typing.get_origin(kind) in (typing.Union, types.UnionType) and type(None) in typing.get_args(kind)


def is_text(kind: Any) -> bool:
    """Whether the type is ``str``, possibly optional."""
    return kind is str or (admits_none(kind) and str in typing.get_args(kind))


def _dataclass(cls: type[Any], data: Any, prefix: str, bounds: Bounds, problems: list[Problem]) -> Any:
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
            values[field.name] = _value(kind, data[field.name], key, bounds, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(Problem(key=key, message="missing", hint=bounds.hints.get(key, "")))
    return None if problems else cls(**values)


def _value(kind: Any, data: Any, key: str, bounds: Bounds, problems: list[Problem]) -> Any:
    section = section_type(kind)
    if section is not None and (data is not None or not admits_none(kind)):
        return _dataclass(section, data, f"{key}.", bounds, problems)
    try:
        value = from_json(kind, data, where=key)
    except ConfigError as error:
        message = error.what.split(": ", 1)[-1].rstrip(".")
        options = [option for option in _options(kind) if isinstance(option, str)]
        hint = did_you_mean(str(data), options) if options else bounds.hints.get(key, "")
        message = "not a known value: " + repr(data) if options else message
        problems.append(Problem(key=key, message=message, hint=hint, instead=_legal(kind, key, bounds)))
        return None
    problems.extend(_out_of_bounds(value, key, bounds))
    return value


def _options(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    if admits_none(kind):
        return tuple(option for arg in typing.get_args(kind) for option in _options(arg))
    return ()


def _out_of_bounds(value: Any, key: str, bounds: Bounds) -> typing.Iterator[Problem]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if not math.isfinite(value):
        message = f"expected a finite number, found {value!r}"
    elif key in bounds.least and not value >= bounds.least[key]:
        message = f"expected at least {bounds.least[key]:g}, found {value!r}"
    elif key in bounds.most and not value <= bounds.most[key]:
        message = f"expected at most {bounds.most[key]:g}, found {value!r}"
    else:
        return
    yield Problem(
        key=key, message=message, hint=bounds.hints.get(key, ""), instead=_within(type(value), key, bounds, near=value)
    )


def _legal(kind: Any, key: str, bounds: Bounds) -> tuple[Any, ...]:
    """Two legal values of a type, if it is one of which some are known."""
    if options := _options(kind):
        return tuple(dict.fromkeys((options[0], options[-1])))
    for plain in typing.get_args(kind) if admits_none(kind) else (kind,):
        if plain is bool:
            return (False, True)
        if plain in (int, float):
            return _within(plain, key, bounds)
    return ()


def _within(kind: type[float], key: str, bounds: Bounds, near: float = 0.0) -> tuple[float, ...]:
    """Two numbers within the bounds, the first as near as can be."""
    least, most = bounds.least.get(key, 0.0), bounds.most.get(key, math.inf)
    if near > most:
        return tuple(dict.fromkeys((kind(most), kind(max(least, most / 2)))))
    first = least if kind is float or least == int(least) else int(least) + 1
    return tuple(dict.fromkeys((kind(first), kind(min(most, 2 * first or 1)))))

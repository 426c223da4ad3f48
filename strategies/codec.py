"""Frozen dataclasses to JSON and back, strictly: unknown or missing keys and wrong types are errors with a path."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from strategies.errors import ConfigError, did_you_mean

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Turn a dataclass (or a container of them) into plain JSON values; tuples become lists, enums their values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def from_json(cls: type[T], data: Any, *, where: str = "") -> T:
    """Build ``cls`` from what :func:`to_json` produced.

    Args:
        cls: A dataclass type.
        data: Plain JSON values.
        where: Path of ``data`` in its document, for messages.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type.
    """
    return typing.cast(T, _decode(cls, data, where or cls.__name__))


def _decode(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(kind), data, where)
    if origin is typing.Literal:
        return _check(data in typing.get_args(kind), data, where, f"one of {list(typing.get_args(kind))}")
    if origin in (tuple, list):
        return _decode_sequence(origin, typing.get_args(kind), data, where)
    if origin is not None and issubclass(origin, Mapping):
        _check(isinstance(data, Mapping), data, where, "a mapping")
        item = typing.get_args(kind)[1]
        return {key: _decode(item, value, f"{where}.{key}") for key, value in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(data)
        except ValueError:
            return _check(False, data, where, f"one of {[member.value for member in kind]}")
    if kind is float:
        _check(isinstance(data, int | float) and not isinstance(data, bool), data, where, "a number")
        return float(data)
    if kind is int:
        return _check(isinstance(data, int) and not isinstance(data, bool), data, where, "a whole number")
    return _check(isinstance(data, kind), data, where, getattr(kind, "__name__", str(kind)))


def _decode_union(options: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in options:
        return None
    failures = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _decode(option, data, where)
        except ConfigError as error:
            failures.append(error)
    raise failures[-1]


def _decode_sequence(origin: Any, args: tuple[Any, ...], data: Any, where: str) -> Any:
    _check(isinstance(data, list | tuple), data, where, "a list")
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        _check(len(data) == len(args), data, where, f"a list of {len(args)}")
        return tuple(
            _decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(args, data, strict=True))
        )
    return origin(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    _check(isinstance(data, Mapping), data, where, "a mapping")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key '{key}'.", hint=did_you_mean(str(key), fields))
    hints = _hints(kind)
    values = {key: _decode(hints[key], item, f"{where}.{key}") for key, item in data.items()}
    required = (
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}.")
    return kind(**values)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of the fields; Python compiles the annotations anew each time it is asked."""
    return typing.get_type_hints(kind)


def _check(holds: bool, data: Any, where: str, wanted: str) -> Any:
    if not holds:
        raise ConfigError(f"{where}: expected {wanted}, found {data!r}.")
    return data

"""build(cls, data): plain data becomes a frozen, typed object, once, and every error names the dotted key.

Serves YAML, JSON and messages alike. Conversions are few and lossless: int to float, text to Path and Enum, list to
tuple. A number never becomes text (an unquoted 007 would lose its zeros) and text never becomes a number.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fourdvq.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], data: Mapping[str, Any], *, where: str = "") -> T:
    """Build the dataclass `cls` from `data`; `where` is the dotted prefix used in errors.

    Raises ConfigError E_KEY for an unknown key, E_MISSING for a required one, E_TYPE for a value of another type, and
    E_VALUE where the class's own `__post_init__` raises ValueError.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            "E_TYPE", where=where or cls.__name__, found=_show(data), wanted="a mapping of keys to values"
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise _unknown_key(str(key), sorted(fields), where)
    values = {}
    for name, field in fields.items():
        dotted = f"{where}.{name}" if where else name
        if name in data:
            values[name] = _convert(hints[name], data[name], dotted)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError("E_MISSING", where=dotted, found="nothing", wanted=_name(hints[name]))
    try:
        return cls(**values)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("E_VALUE", where=where or cls.__name__, found=str(error)) from None


def to_plain(value: Any) -> Any:
    """The inverse of `build`: dataclasses to mappings, tuples to lists, paths and enums to text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    return value


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces, shortest float form, no NaN: equal values give equal text and so an equal sha256."""
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: Any) -> str:
    """Hex sha256 of the canonical JSON of a typed or plain value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, where)
    if origin is typing.Literal:
        return _convert_literal(hint, value, where)
    if origin is tuple:
        return _convert_tuple(typing.get_args(hint), value, where)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return _convert_mapping(typing.get_args(hint), value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where=where)
    if isinstance(origin, type):  # another generic class, an array of a dtype for example: taken as it is
        return _convert_scalar(origin, value, where)
    return _convert_scalar(hint, value, where)


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _convert_literal(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint)
    for option in options:
        if type(option) is type(value) and option == value:
            return value
    raise ConfigError(
        "E_TYPE",
        where=where,
        found=_show(value),
        wanted="one of " + ", ".join(map(_show, options)),
        fix=_quote_hint(value),
    )


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError("E_TYPE", where=where, found=_show(value), wanted="a list")
    if len(args) == 2 and args[1] is Ellipsis:
        kinds: Sequence[Any] = [args[0]] * len(value)
    elif len(args) != len(value):
        raise ConfigError("E_TYPE", where=where, found=f"{len(value)} values", wanted=f"{len(args)} values")
    else:
        kinds = args
    return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _convert_mapping(args: tuple[Any, ...], value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError("E_TYPE", where=where, found=_show(value), wanted="a mapping")
    if not args:
        return dict(value)
    return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and is_number:
        if not math.isfinite(value):
            raise ConfigError("E_VALUE", where=where, found=_show(value), wanted="a finite number")
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    if isinstance(hint, type) and issubclass(hint, Path) and isinstance(value, str | Path):
        return Path(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _convert_enum(hint, value, where)
    if isinstance(hint, type) and isinstance(value, hint) and hint not in (int, float, str, bool):
        return value
    raise ConfigError(
        "E_TYPE",
        where=where,
        found=f"{_show(value)} ({type(value).__name__})",
        wanted=_name(hint),
        fix=_quote_hint(value) if hint is str else "",
    )


def _convert_enum(hint: type[enum.Enum], value: Any, where: str) -> enum.Enum:
    if isinstance(value, hint):
        return value
    try:
        return hint(value)
    except ValueError:
        raise ConfigError(
            "E_TYPE", where=where, found=_show(value), wanted="one of " + ", ".join(_show(m.value) for m in hint)
        ) from None


def _unknown_key(key: str, known: list[str], where: str) -> ConfigError:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else ""
    return ConfigError(
        "E_KEY",
        where=f"{where}.{key}" if where else key,
        found=repr(key),
        wanted="one of " + ", ".join(known),
        fix=hint,
    )


def _quote_hint(value: Any) -> str:
    return (
        f'quote the text: "{str(value).lower()}" is read as {type(value).__name__} without quotes'
        if isinstance(value, bool | int | float)
        else ""
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")

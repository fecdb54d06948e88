"""A message body taken apart into plain fields, arrays and tensor sets, put together again, and hashed.

Taking apart follows the declared types only, so what a class does not declare cannot be carried; putting together
refuses whatever is missing, extra or of another type. Nested dataclasses appear under dotted names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from fourdvq.config import build, canonical_json
from fourdvq.errors import ConfigError, WireError
from fourdvq.tensors import payload_sha256
from fourdvq.wire.forms import TENSOR_NAME, Form
from fourdvq.wire.narrow import NARROW, narrowed, widened

T = TypeVar("T")

MAX_TENSORS = 4096
_ARRAY_DTYPES = frozenset({"float64", "float32", "int64", "int32", "uint8", "bool"})
_TENSOR_DTYPES = frozenset(
    {torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool}
)


@dataclass
class Parts:
    """A body in pieces: `fields` as JSON-able values, `arrays` and `tensors` by dotted field name."""

    fields: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def all_tensors(self) -> dict[str, torch.Tensor]:
        """Every array and tensor under one flat name, for hashing and counting."""
        flat = {f"{owner}/{name}": t for owner, group in self.tensors.items() for name, t in group.items()}
        return flat | {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in self.arrays.items()}


def take_apart(body: Any) -> Parts:
    """Split a body by its declared types. Raises WireError E_MESSAGE for a value of another type, form or precision."""
    parts = Parts()
    for name, hint, value in _leaves(type(body), body):
        _take_leaf(parts, name, hint, value)
    return parts


def put_together(cls: type[T], parts: Parts) -> T:
    """The inverse of `take_apart`. Raises WireError E_MESSAGE if a part is missing, undeclared or of another type."""
    expected_arrays, expected_tensors, narrow = set(), set(), set()
    for name, hint in leaf_types(cls):
        if _is_array(hint):
            expected_arrays.add(name)
        elif _is_tensors(hint):
            expected_tensors.add(name)
            if _is_narrow(hint):
                narrow.add(name)
    _same_names(cls, "arrays", set(parts.arrays), expected_arrays)
    _same_names(cls, "tensors", set(parts.tensors), expected_tensors)
    data: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            data[name] = {}  # a nested message may have no fields at all
    tensors = {name: widened(group) if name in narrow else group for name, group in parts.tensors.items()}
    for source in (parts.fields, parts.arrays, tensors):
        for name, value in source.items():
            _place(data, name, value)
    try:
        body = build(cls, data)
    except ConfigError as error:
        # Values of a foreign message are not repeated: they could be anything.
        raise WireError(
            "E_MESSAGE", where=f"{cls.__name__}: {error.where}", found="another key or type", wanted=error.wanted
        ) from None
    take_apart(body)
    return body


def put_together_one(classes: Sequence[type[T]], parts: Parts) -> T:
    """The first of `classes` that has exactly these parts. Raises the WireError of the first one if none has."""
    first: WireError | None = None
    for cls in classes:
        try:
            return put_together(cls, parts)
        except WireError as error:
            first = first or error
    raise first or WireError("E_MESSAGE", found="no class", wanted="at least one")


def body_sha256(body: Any) -> str:
    """Hex sha256 over the canonical JSON of the fields and the payload hash of all tensors."""
    parts = take_apart(body)
    digest = hashlib.sha256(canonical_json(parts.fields).encode())
    digest.update(payload_sha256(parts.all_tensors()).encode())
    return digest.hexdigest()


def body_bytes(body: Any) -> int:
    """Size of arrays and tensors in bytes."""
    return sum(t.numel() * t.element_size() for t in take_apart(body).all_tensors().values())


def leaf_types(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and declared type of every field, those of nested dataclasses included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from leaf_types(typing.cast(type, hint), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hint


def _leaves(cls: type, body: Any) -> Iterator[tuple[str, Any, Any]]:
    for name, hint in leaf_types(cls):
        value = body
        for step in name.split("."):
            value = getattr(value, step)
        yield name, hint, value


def _take_leaf(parts: Parts, name: str, hint: Any, value: Any) -> None:
    if _is_array(hint):
        if not isinstance(value, np.ndarray) or value.dtype.name not in _ARRAY_DTYPES:
            raise WireError("E_MESSAGE", where=name, found=type(value).__name__, wanted="an array of numbers")
        parts.arrays[name] = value
    elif _is_tensors(hint):
        tensors = _checked_tensors(name, value)
        parts.tensors[name] = narrowed(tensors, name) if _is_narrow(hint) else tensors
    else:
        _check_plain(name, hint, value)
        _place(parts.fields, name, _plain(value))


def _checked_tensors(name: str, value: Any) -> dict[str, torch.Tensor]:
    if not isinstance(value, Mapping) or len(value) > MAX_TENSORS:
        raise WireError(
            "E_MESSAGE", where=name, found=type(value).__name__, wanted=f"at most {MAX_TENSORS} named tensors"
        )
    for key, tensor in value.items():
        TENSOR_NAME.check(key, f"{name}: a tensor's name")
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _TENSOR_DTYPES:
            raise WireError(
                "E_MESSAGE",
                where=name,
                found=str(getattr(tensor, "dtype", type(tensor).__name__)),
                wanted="a tensor of numbers",
            )
    return dict(value)


def _check_plain(name: str, hint: Any, value: Any) -> None:
    """Check form and finiteness of what goes into JSON, on the way in and on the way out."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        if not isinstance(value, str):
            raise WireError("E_MESSAGE", where=name, found=type(value).__name__, wanted="text")
        for form in args[1:]:
            if isinstance(form, Form):
                form.check(value, name)
    elif origin is typing.Literal:
        if value not in args:
            raise WireError("E_MESSAGE", where=name, found="another word", wanted=" or ".join(map(str, args)))
    elif origin is tuple:
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True)):
            _check_plain(f"{name}[{i}]", kind, item)
    elif origin is not None and isinstance(value, Mapping):
        for key, item in value.items():
            Form("word", r"[A-Za-z][A-Za-z0-9_]{0,39}", 40).check(key, f"{name}: a key")
            _check_plain(name, args[1], item)
    else:
        _check_number(name, hint, value)


def _check_number(name: str, hint: Any, value: Any) -> None:
    allowed = {bool: (bool,), int: (int,), float: (int, float)}.get(hint)
    if allowed is None or not isinstance(value, allowed) or (hint is not bool and isinstance(value, bool)):
        raise WireError(
            "E_MESSAGE", where=name, found=type(value).__name__, wanted=getattr(hint, "__name__", "a declared type")
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise WireError("E_MESSAGE", where=name, found="not a finite number", wanted="a finite number")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return dict(value) if isinstance(value, Mapping) else value


def _is_array(hint: Any) -> bool:
    """True for `np.ndarray`, for an array of a dtype, and for either with a declared form around it."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return hint is np.ndarray or typing.get_origin(hint) is np.ndarray


def _is_tensors(hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    args = typing.get_args(hint)
    return len(args) == 2 and args[1] is torch.Tensor


def _is_narrow(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Annotated and NARROW in typing.get_args(hint)[1:]


def _place(data: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for step in path:
        data = data.setdefault(step, {})
    if isinstance(data.get(last), dict) and isinstance(value, dict):
        data[last].update(value)
    else:
        data[last] = value


def _same_names(cls: type, what: str, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        extra, missing = len(found - wanted), len(wanted - found)
        raise WireError(
            "E_MESSAGE",
            where=f"{cls.__name__}: {what}",
            found=f"{extra} undeclared and {missing} missing",
            wanted=", ".join(sorted(wanted)) or "none",
        )


__all__ = ["Parts", "body_bytes", "body_sha256", "leaf_types", "put_together", "put_together_one", "take_apart"]

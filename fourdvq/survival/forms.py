"""The form of every message of a survival analysis: a frozen dataclass of named numpy arrays and plain values.

A field says its dtype and the names of its axes. Answers are `Sums`: they define `+`. The messages are in `messages`.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from fourdvq.errors import WireError

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
MOMENT_BITS = 48  # fractional bits under masking: the range is small and a standard deviation is a difference
SUM_BITS = 40  # resolution 9e-13, range +-8.4e6


@dataclass(frozen=True)
class Axes:
    """The declared form of an array field: axis names, and fractional bits when it is masked (0: whole numbers)."""

    names: tuple[str, ...]
    bits: int = 0


ONE: typing.Final = Axes(("one",))
T = TypeVar("T", bound="Message")
S = TypeVar("S", bound="Sums")


class Message:
    """A frozen dataclass whose array fields are `Annotated[array type, Axes(...)]`."""

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {"one": 1}
        for name, (dtype, axes) in array_fields(type(self)).items():
            value = getattr(self, name)
            if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != len(axes.names):
                raise _bad(self, name, f"{len(axes.names)} axes of {dtype}")
            for axis, size in zip(axes.names, value.shape, strict=True):
                if sizes.setdefault(axis, size) != size:
                    raise _bad(self, name, f"axis {axis} of one size in the whole message")

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The array fields by name, in declared order."""
        return {name: getattr(self, name) for name in array_fields(type(self))}

    def scalars(self) -> dict[str, Any]:
        """The other fields by name: numbers, words, tuples of words."""
        names = array_fields(type(self))
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in names}  # type: ignore[arg-type]

    @classmethod
    def from_parts(cls, arrays: Mapping[str, npt.NDArray[Any]], scalars: Mapping[str, Any] | None = None) -> Self:
        """The inverse of `arrays` and `scalars`; raises WireError E_MESSAGE for other fields than the declared ones."""
        given = {**arrays, **(scalars or {})}
        wanted = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if set(given) != wanted:
            raise WireError("E_MESSAGE", where=cls.__name__, found="other fields", wanted=", ".join(sorted(wanted)))
        return cls(**given)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays; booleans count one bit."""
        return sum(-(-a.size // 8) if a.dtype == bool else a.nbytes for a in self.arrays().values())


class Sums(Message):
    """An additive answer."""

    def __add__(self, other: Self) -> Self:
        if type(other) is not type(self) or self.scalars() != other.scalars():
            return NotImplemented
        mine, theirs = self.arrays(), other.arrays()
        for name, value in mine.items():
            if value.shape != theirs[name].shape:
                raise _bad(other, name, "the same shape at every site")
        return dataclasses.replace(self, **{name: mine[name] + theirs[name] for name in mine})  # type: ignore[type-var]


_FIELDS: dict[str, dict[str, tuple[np.dtype[Any], Axes]]] = {}  # type hints are slow to resolve: once per class


def array_fields(cls: type[Message]) -> dict[str, tuple[np.dtype[Any], Axes]]:
    """Name -> (dtype, axes) of the array fields of a message class."""
    if cls.__qualname__ not in _FIELDS:
        _FIELDS[cls.__qualname__] = _read_fields(cls)
    return _FIELDS[cls.__qualname__]


def _read_fields(cls: type[Message]) -> dict[str, tuple[np.dtype[Any], Axes]]:
    found = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        array, *forms = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        for axes in (form for form in forms if isinstance(form, Axes)):
            found[name] = (np.dtype(typing.get_args(typing.get_args(array)[1])[0]), axes)
    return found


def combine(answers: Iterable[S]) -> S:
    """The sum of the sites' answers to one request, in the order of site; raises WireError if there is none."""
    items = list(answers)
    if not items:
        raise WireError("E_MESSAGE", found="no answer", wanted="one answer per site")
    return functools.reduce(lambda a, b: a + b, items)


def _bad(message: Message, name: str, wanted: str) -> WireError:
    return WireError("E_MESSAGE", where=f"{type(message).__name__}.{name}", found="another form", wanted=wanted)

"""A typed message as plain bytes and numbers, for another process of ours; nothing of it reaches a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fourdvq.wire.body import Parts, put_together, take_apart

T = TypeVar("T")


@dataclass(frozen=True)
class Parcel:
    """Fields as JSON values, arrays as they are, each tensor set as the bytes of a safetensors file."""

    fields: dict[str, Any]
    arrays: dict[str, np.ndarray]
    tensors: dict[str, bytes]


def to_parcel(body: Any) -> Parcel:
    """Take a message apart. Raises WireError as `take_apart` does."""
    parts = take_apart(body)
    tensors = {
        owner: save_tensors({n: t.detach().cpu().contiguous() for n, t in group.items()})
        for owner, group in parts.tensors.items()
    }
    return Parcel(parts.fields, parts.arrays, tensors)


def from_parcel(cls: type[T], parcel: Parcel) -> T:
    """Put it together again, with every check that a message from outside gets."""
    tensors = {owner: load_tensors(data) for owner, data in parcel.tensors.items()}
    return put_together(cls, Parts(parcel.fields, parcel.arrays, tensors))

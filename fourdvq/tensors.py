"""Named tensors: their hash and the check that two sets have one form. Models, training and aggregation use it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def payload_sha256(tensors: Weights) -> str:
    """Hex sha256 over the tensors sorted by name: name, dtype, shape, little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{list(tensor.shape)}\0".encode())
        digest.update(_little_endian_bytes(tensor))
    return digest.hexdigest()


def form_difference(
    found: Weights, wanted: Weights, *, dtype: torch.dtype | None = None
) -> tuple[str, str, str] | None:
    """The first difference in names, shapes or dtypes as (tensor name, found, wanted), or None if there is none.

    `dtype`, where given, is what every tensor of `found` must have instead of the dtype in `wanted`.
    """
    for name in wanted:
        if name not in found:
            return name, "missing", _form(wanted[name], dtype)
    for name in found:
        if name not in wanted:
            return name, "an extra tensor", "no such tensor"
        shown, expected = _form(found[name], None), _form(wanted[name], dtype)
        if shown != expected:
            return name, shown, expected
    return None


def first_nonfinite(tensors: Weights) -> str | None:
    """Name of the first tensor that holds NaN or infinity, or None."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def _form(tensor: Tensor, dtype: torch.dtype | None) -> str:
    return f"{str(dtype or tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _little_endian_bytes(tensor: Tensor) -> bytes:
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    array = tensor.numpy()
    if sys.byteorder == "big":
        array = array.byteswap()
    return array.tobytes()

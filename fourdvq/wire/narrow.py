"""A model on its way to the sites: float32 at both ends, in 16 bits in between wherever that loses nothing.

The coordinator rounds its model once a round and keeps the remainder (`fourdvq.training.update.split_for_wire`); from
then on every task that carries it needs half the bytes, and all hashes are those of the float32 values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fourdvq.errors import WireError

_HALVES = (torch.bfloat16, torch.float16)


class Narrow:
    """Marks a field of named tensors, as in `Annotated[Mapping[str, Tensor], NARROW]`."""


NARROW = Narrow()


def narrowed(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Every float32 tensor in the first 16-bit dtype that holds all its values bit for bit; the others as they are.

    Raises WireError E_MESSAGE for tensors that are 16 bits wide to begin with: they would come back as float32.
    """
    if any(tensor.dtype in _HALVES for tensor in tensors.values()):
        raise WireError("E_MESSAGE", where=where, found="16-bit tensors", wanted="float32, which is packed here")
    return {name: _narrow(tensor) for name, tensor in tensors.items()}


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `narrowed`."""
    return {name: tensor.float() if tensor.dtype in _HALVES else tensor for name, tensor in tensors.items()}


def _narrow(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    for dtype in _HALVES:
        packed = tensor.to(dtype)
        if torch.equal(packed.float().view(torch.int32), bits):
            return packed
    return tensor

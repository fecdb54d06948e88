"""An update: how far the weights moved in a round, its size, its clipping and its form on the wire."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fourdvq.errors import ConfigError, ModelError
from fourdvq.tensors import Weights, form_difference, payload_sha256

WIRE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def delta(before: Weights, after: Weights) -> dict[str, Tensor]:
    """after - before, tensor by tensor. ModelError E_WEIGHTS if their forms differ."""
    _same_form(after, before)
    return {name: after[name] - before[name] for name in before}


def apply(weights: Weights, change: Weights) -> dict[str, Tensor]:
    """weights + change, in the weights' dtypes; `change` may come in a 16-bit dtype."""
    _same_form(change, weights, any_dtype=True)
    return {name: (tensor.double() + change[name].double()).to(tensor.dtype) for name, tensor in weights.items()}


def global_norm(tensors: Weights) -> float:
    """Euclidean norm over all tensors together, in float64."""
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def relative_norm(change: Weights, weights: Weights) -> float:
    """Norm of the change over the norm of the weights; infinite where the weights are all 0."""
    size = global_norm(weights)
    return global_norm(change) / size if size > 0 else math.inf


def clip_relative(change: Weights, weights: Weights, limit: float) -> dict[str, Tensor]:
    """`change`, scaled down as a whole where its relative norm exceeds `limit`. ConfigError unless limit > 0."""
    if not limit > 0:
        raise ConfigError("E_VALUE", where="max_rel_update", found=str(limit), wanted="above 0")
    size, allowed = global_norm(change), limit * global_norm(weights)
    if size <= allowed:
        return dict(change)
    return {name: (tensor.double() * (allowed / size)).to(tensor.dtype) for name, tensor in change.items()}


def to_wire(weights: Weights, dtype: str) -> dict[str, Tensor]:
    """Every tensor in the wire's dtype (a key of WIRE_DTYPES); ModelError E_NONFINITE if that overflows."""
    if dtype not in WIRE_DTYPES:
        raise ConfigError("E_VALUE", where="wire_dtype", found=repr(dtype), wanted="one of " + ", ".join(WIRE_DTYPES))
    packed = {name: tensor.to(WIRE_DTYPES[dtype]) for name, tensor in weights.items()}
    for name, tensor in packed.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError("E_NONFINITE", where=name, found=f"NaN or infinity as {dtype}")
    return packed


def split_for_wire(
    weights: Weights, dtype: str, *, whole: tuple[str, ...] = ("codebook.",)
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Float32 weights as what travels and what is kept back: `sent` rounded to the wire's dtype, and the `rest`.

    Both are float32. sent + rest is the weights again, bit for bit (`join_from_wire`), so a coordinator that sends 16
    bits and adds each round's change to the joined weights loses nothing over the rounds, however small the changes
    are. `rest` has only the tensors from which something was kept back. Names that begin with one of `whole` travel as
    they are: 16-bit codes would be other codes; so does all that is not float32. Raises ModelError E_NONFINITE on
    overflow.
    """
    sent, rest = {}, {}
    for name, tensor in weights.items():
        if name.startswith(whole) or tensor.dtype != torch.float32:
            sent[name] = tensor
            continue
        sent[name] = to_wire({name: tensor}, dtype)[name].float()
        # Exact: rounding to fewer bits leaves a difference that float32 holds.
        kept = tensor - sent[name]
        if bool(kept.any()):
            rest[name] = kept
    return sent, rest


def join_from_wire(sent: Weights, rest: Weights) -> dict[str, Tensor]:
    """The inverse of `split_for_wire`."""
    _same_form(rest, {name: sent[name] for name in rest if name in sent})
    return {name: tensor + rest[name] if name in rest else tensor for name, tensor in sent.items()}


def _same_form(found: Weights, wanted: Weights, *, any_dtype: bool = False) -> None:
    if any_dtype:
        found = {name: tensor.float() for name, tensor in found.items()}
        wanted = {name: tensor.float() for name, tensor in wanted.items()}
    difference = form_difference(found, wanted)
    if difference:
        name, has, wants = difference
        raise ModelError("E_WEIGHTS", where=name, found=has, wanted=wants)


__all__ = [
    "WIRE_DTYPES",
    "apply",
    "clip_relative",
    "delta",
    "global_norm",
    "join_from_wire",
    "payload_sha256",
    "relative_norm",
    "split_for_wire",
    "to_wire",
]

"""Masked sums as messages: which arrays of an answer travel, and the list of keys that all sites of an analysis saw.

`fourdvq.survival.masking` makes and removes the masks; here its 64-bit numbers become named tensors and come back,
checked against the form of the unmasked answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from fourdvq.errors import WireError
from fourdvq.survival.masking import MaskedSums
from fourdvq.survival.messages import Sums, array_fields
from fourdvq.wire.messages import MaskedReply

KEY_BYTES = 32


def masked_reply(masked: MaskedSums) -> MaskedReply:
    """The message of one site's masked sums."""
    hidden = {name: torch.from_numpy(np.ascontiguousarray(a.view(np.int64))) for name, a in masked.arrays.items()}
    return MaskedReply(counter=masked.counter, parties=masked.parties, hidden=hidden)


def masked_sums(reply: MaskedReply, kind: type[Sums]) -> MaskedSums:
    """The inverse of `masked_reply` for an answer of class `kind`.

    Raises WireError E_MESSAGE for other arrays than those of the class, another dtype, or axes that do not fit.
    """
    wanted = array_fields(kind)
    if set(reply.hidden) != set(wanted) or any(t.dtype != torch.int64 for t in reply.hidden.values()):
        raise WireError("E_MESSAGE", where=kind.__name__, found="other arrays", wanted="int64 " + ", ".join(wanted))
    arrays = {name: np.ascontiguousarray(reply.hidden[name].numpy()) for name in wanted}
    # An answer of zeros in these shapes must be a possible one: axes of one name have one size.
    kind.from_parts({name: np.zeros(a.shape, dtype=wanted[name][0]) for name, a in arrays.items()})
    return MaskedSums(kind, reply.counter, reply.parties, {n: a.view(np.uint64) for n, a in arrays.items()})


def peers_sha256(sites: Sequence[str], public_keys: np.ndarray) -> str:
    """Hex sha256 of the list of names and keys (S, 32) uint8. It is the same at every site that was told the truth.

    Raises WireError E_MESSAGE unless there are at least two sites, in order of name, each once with a key of its own.
    """
    keys = np.asarray(public_keys)
    right = keys.dtype == np.uint8 and keys.shape == (len(sites), KEY_BYTES) and len(sites) > 1
    if not right or list(sites) != sorted(set(sites)) or len({bytes(key) for key in keys}) != len(sites):
        raise WireError("E_MESSAGE", where="peers", found="another list", wanted="two or more sites by name, with keys")
    lines = [f"{name} {bytes(key).hex()}" for name, key in zip(sites, keys, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

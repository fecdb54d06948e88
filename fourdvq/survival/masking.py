"""Masked sums: the coordinator sees the total and nothing of a site's part.

A value becomes a whole number with 40 fractional bits (moments: 48), modulo 2^64. Every pair of sites shares a secret
(X25519); from it comes, for each message and array, a stream that the site with the lower name adds and the other one
subtracts. In the total all streams cancel exactly. A stream is never used twice; a value out of range is refused, never
wrapped. All sites of the run are needed in every round. With two sites the total still tells each of them the other's
part, so totals are never sent to sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fourdvq.errors import Refused, WireError
from fourdvq.survival.messages import Sums, array_fields

U64 = npt.NDArray[np.uint64]
LARGEST = 2.0**63  # a total must stay below it after scaling: each site keeps to its share
OUT_OF_RANGE = "centre and scale the covariate with public constants, as age: (age - 70) / 10"


@dataclass(frozen=True)
class MaskedSums:
    """One site's answer under masks: arrays modulo 2^64 by field name, and the class they belong to.

    `parties`: sites in the run; the masks cancel in the sum of all of them and in no other.
    """

    kind: type[Sums]
    counter: int
    parties: int
    arrays: Mapping[str, U64]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.nbytes for a in self.arrays.values())


class Masker:
    """A site's masks for one run. `peers`: name -> raw public key (32 bytes) of every other site of the run."""

    def __init__(self, name: str, private: X25519PrivateKey, peers: Mapping[str, bytes], *, run: str) -> None:
        if name in peers or not peers:
            raise WireError(
                "E_MESSAGE", where="peers", found="this site, or nobody", wanted="the other sites of the run"
            )
        self.name, self.run = name, run
        self.counter = 0
        self._secrets = {
            peer: private.exchange(X25519PublicKey.from_public_bytes(key)) for peer, key in sorted(peers.items())
        }

    @property
    def parties(self) -> int:
        """Sites of the run, this one included."""
        return 1 + len(self._secrets)

    def mask(self, sums: Sums) -> MaskedSums:
        """The answer with all masks added; each call uses the next counter, so no stream is used twice.

        Raises Refused E_COX_RULE `fixed_point_range` before anything is encoded.
        """
        plain = encode(sums, sites=self.parties)
        counter, self.counter = self.counter, self.counter + 1
        hidden = {name: self._hide(name, array, counter) for name, array in plain.items()}
        return MaskedSums(type(sums), counter, self.parties, hidden)

    def _hide(self, name: str, values: U64, counter: int) -> U64:
        hidden = values.copy()
        for peer, secret in self._secrets.items():
            info = f"{self.run}|{counter}|{name}".encode()
            stream = _stream(secret, info, values.size).reshape(values.shape)
            hidden = hidden + stream if self.name < peer else hidden - stream
        return hidden


def encode(sums: Sums, *, sites: int) -> dict[str, U64]:
    """Fixed-point arrays modulo 2^64, of one of `sites` parts. Raises Refused E_COX_RULE `fixed_point_range`."""
    encoded = {}
    for name, (_, axes) in array_fields(type(sums)).items():
        scaled = np.asarray(getattr(sums, name), dtype=np.float64) * 2.0**axes.bits
        if not (np.abs(scaled) < LARGEST / sites).all():
            raise Refused("E_COX_RULE", where="fixed_point_range", fix=OUT_OF_RANGE)
        whole = np.rint(scaled).astype(np.int64) if axes.bits else getattr(sums, name).astype(np.int64)
        encoded[name] = whole.view(np.uint64)
    return encoded


def decode(kind: type[Sums], arrays: Mapping[str, U64]) -> Sums:
    """The sums behind a total in which all masks have cancelled."""
    values: dict[str, npt.NDArray[Any]] = {}
    for name, (dtype, axes) in array_fields(kind).items():
        whole = arrays[name].view(np.int64)
        values[name] = whole.astype(dtype) if not axes.bits else whole.astype(np.float64) * 2.0**-axes.bits
    return kind(**values)


def unmask_total(answers: Sequence[MaskedSums]) -> Sums:
    """The sum of all sites' answers; raises WireError if one is missing or they do not belong to one request."""
    first = answers[0]
    if len(answers) != first.parties:
        raise WireError(
            "E_MESSAGE", where=first.kind.__name__, found="an answer is missing", wanted="one from each site"
        )
    for other in answers:
        same = other.kind is first.kind and other.counter == first.counter
        if not same or any(other.arrays[k].shape != a.shape for k, a in first.arrays.items()):
            raise WireError("E_MESSAGE", where=first.kind.__name__, found="answers to different requests", wanted="one")
    total = {name: np.zeros_like(a) for name, a in first.arrays.items()}
    for answer in answers:
        total = {name: a + answer.arrays[name] for name, a in total.items()}
    return decode(first.kind, total)


def new_keys(names: Sequence[str]) -> dict[str, tuple[X25519PrivateKey, bytes]]:
    """Fresh key pairs by site name: private, and the 32 raw bytes of the public one."""
    pairs = {}
    for name in names:
        private = X25519PrivateKey.generate()
        pairs[name] = (private, private.public_key().public_bytes_raw())
    return pairs


def _stream(secret: bytes, info: bytes, size: int) -> U64:
    """`size` uniform numbers from (secret, info): HKDF gives a key used once, ChaCha20 its key stream."""
    key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(secret)
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * size)), dtype="<u8").astype(np.uint64)

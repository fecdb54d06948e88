"""Randomness with an address: one experiment seed, and from it an independent stream for every purpose."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_GLOBAL_GENERATOR = threading.RLock()


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for a purpose, such as ("sampler", "leuven"); stable over machines and versions."""
    text = "\0".join(["fourdvq-seed-1", str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for a purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Within it torch's global CPU generator has the purpose's seed; afterwards it is as before.

    For layers whose initialisation takes no generator. Nothing else may rely on the global generator. One thread at a
    time: sites of one process train in threads, and would draw from each other's stream.
    """
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, *purpose))
        yield

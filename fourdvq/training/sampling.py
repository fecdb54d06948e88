"""Which scan comes next: every scan once an epoch, in an order that a checkpoint can continue."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class ScanSource(Protocol):
    """The training scans of one site."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """x01 of scan `index`, (1, D, H, W) float32 in [0, 1]."""

    def patient_of(self, index: int) -> str:
        """Pseudonym of the scan's patient."""


class EpochSampler:
    """Draws without replacement within an epoch; the order of an epoch comes from `generator` at its start."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0

    def next(self, n_scans: int) -> int:
        """The index of the next scan out of `n_scans`; another number of scans than before begins a new epoch."""
        if self.position >= len(self.order) or len(self.order) != n_scans:
            self.order = torch.randperm(n_scans, generator=self.generator)
            self.position = 0
        index = int(self.order[self.position])
        self.position += 1
        return index

"""The codebook: K code vectors, the search for the nearest one, and the sums from which codes are learnt.

Always float32: 16-bit distances pick wrong codes. Memory O(chunk K), never O(N K) as with one-hot assignments.
N vectors, K codes, c channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourdvq.models.fsq import fsq_grid, fsq_indices, fsq_levels

Quantiser = Literal["ema", "loss", "fsq"]

CHUNK = 16_384  # vectors per distance block: 16 MiB at K = 256


class Codebook(nn.Module):
    """Codes (K, c) with their running counts (K,) and sums (K, c); `is_seeded` says whether they mean anything yet.

    `ema`: codes follow counts and sums (`fourdvq.federation.codebook`), no gradient. `loss`: codes are a parameter.
    `fsq`: codes are the fixed grid. Counts and sums are in vectors per scan.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    is_seeded: Tensor

    def __init__(self, n_codes: int, code_dim: int, quantiser: Quantiser = "ema"):
        super().__init__()
        self.quantiser = quantiser
        self.levels = fsq_levels(n_codes, code_dim) if quantiser == "fsq" else None
        codes = fsq_grid(self.levels) if self.levels else torch.randn(n_codes, code_dim)
        if quantiser == "loss":
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
        self.register_buffer("counts", torch.zeros(n_codes, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(n_codes, code_dim, dtype=torch.float64))
        # A buffer, so it travels with the weights: a site that loads the global codebook must not seed it again.
        self.register_buffer("is_seeded", torch.tensor(quantiser == "fsq"))

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index (N,) int64 of the code nearest to each vector (N, c)."""
        if self.levels:
            return fsq_indices(vectors, self.levels)
        return nearest_codes(vectors, self.codes.detach())

    def embed(self, indices: Tensor) -> Tensor:
        """Codes (..., c) of indices (...)."""
        return F.embedding(indices, self.codes)

    @torch.no_grad()
    def seed_from(self, vectors: Tensor, generator: torch.Generator) -> None:
        """Take K of the vectors (N, c) as codes, drawn by `generator` (CPU), with replacement only if N < K.

        Source: code. Only where one site trains alone: in a federation these would be patients' latents.
        """
        n_codes, n = len(self.codes), len(vectors)
        pick = torch.randperm(n, generator=generator)[:n_codes]
        if n < n_codes:
            pick = torch.cat([pick, torch.randint(n, (n_codes - n,), generator=generator)])
        self.codes.copy_(vectors.detach().float()[pick.to(vectors.device)])
        self.counts.fill_(n / n_codes)
        self.sums.copy_(self.codes.double() * self.counts[:, None])
        self.is_seeded.fill_(True)


def nearest_codes(vectors: Tensor, codes: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Index (N,) int64 of the nearest code for vectors (N, c) and codes (K, c); the lowest index among equals.

    Minimises |e|^2 / 2 - x.e, which differs from half the squared distance by a term without e.
    """
    vectors, codes = vectors.float(), codes.float()
    half_norms = 0.5 * codes.square().sum(dim=1)
    transposed = codes.t().contiguous()
    found = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), chunk):
        block = vectors[start : start + chunk]
        found[start : start + chunk] = torch.addmm(half_norms, block, transposed, alpha=-1.0).argmin(dim=1)
    return found


def assignment_sums(vectors: Tensor, indices: Tensor, n_codes: int) -> tuple[Tensor, Tensor]:
    """Counts (K,) and vector sums (K, c) per code, float64, for vectors (N, c) with their indices (N,)."""
    counts = torch.bincount(indices, minlength=n_codes).double()
    sums = torch.zeros(n_codes, vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for start in range(0, len(vectors), CHUNK):
        sums.index_add_(0, indices[start : start + CHUNK], vectors[start : start + CHUNK].double())
    return counts, sums

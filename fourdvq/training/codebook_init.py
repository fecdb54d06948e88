"""A site's share of the first codebook: seeded k-means over its own encoder outputs; only heavy centroids leave.

Every site uses the same untrained encoder, so the centroids of all sites lie in one space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourdvq.errors import CohortError
from fourdvq.federation.codebook import CodebookStats, kmeans_centres
from fourdvq.models.codebook import assignment_sums, nearest_codes
from fourdvq.models.vqgan import VQGAN3d
from fourdvq.training.sampling import ScanSource
from fourdvq.training.seeds import generator

MIN_VECTORS = 100  # a centroid of fewer vectors says too much about one scan
FIT_VECTORS = 32_768  # on so many vectors, drawn evenly over scans, are the centroids fitted
MAX_SCANS = 64  # an untrained encoder's outputs differ little from scan to scan


def kmeans_stats(
    model: VQGAN3d, scans: ScanSource, *, n_codes: int, seed: int, min_vectors: int = MIN_VECTORS
) -> CodebookStats:
    """Centroids as counts (K,) and vector sums (K, c) per scan; rows of fewer than `min_vectors` vectors are 0.

    `min_vectors` is held against the whole count over the scans, before the division by their number, which puts the
    counts on the scale of `CodebookState`. Raises CohortError E_FEW without scans.
    """
    if not len(scans):
        raise CohortError("E_FEW", where="scans for the codebook", found="none", wanted="at least one")
    random = generator(seed, "codebook_init")
    chosen = torch.randperm(len(scans), generator=random)[:MAX_SCANS].tolist()
    each = max(1, FIT_VECTORS // len(chosen))
    sample = torch.cat([_some(_latents(model, scans[i]), each, random) for i in chosen])
    centres = kmeans_centres(
        sample, torch.ones(len(sample), dtype=sample.dtype, device=sample.device), n_codes=n_codes, generator=random
    )
    code_dim = sample.shape[1]
    counts = torch.zeros(n_codes, dtype=torch.float64)
    sums = torch.zeros(n_codes, code_dim, dtype=torch.float64)
    for i in chosen:
        vectors = _latents(model, scans[i])
        some_counts, some_sums = assignment_sums(vectors, nearest_codes(vectors, centres), n_codes)
        counts += some_counts.cpu()
        sums += some_sums.cpu()
    kept = counts >= min_vectors
    return CodebookStats(
        torch.where(kept, counts, 0.0) / len(chosen), torch.where(kept[:, None], sums, 0.0) / len(chosen)
    )


@torch.no_grad()
def _latents(model: VQGAN3d, x01: Tensor) -> Tensor:
    """(1, D, H, W) in [0, 1] -> encoder outputs (N, c) float32."""
    device = next(model.parameters()).device
    z = model.encode(x01.to(device).unsqueeze(0) - 0.5).float()
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def _some(vectors: Tensor, n: int, random: torch.Generator) -> Tensor:
    pick = torch.randperm(len(vectors), generator=random)[:n]
    return vectors[pick.to(vectors.device)]

"""Finite scalar quantisation: a fixed grid of codes, so that there is nothing to learn, to collapse or to merge.

Departs from the paper. The encoder's output passes through tanh, each channel is rounded to its levels in [-1, 1],
and quantising a code gives the code itself. Source of the idea: Mentzer et al. 2023, arXiv 2309.15505.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourdvq.errors import ConfigError

# Levels per channel, three channels for each size of the codebook.
FSQ_LEVELS: dict[int, tuple[int, int, int]] = {
    32: (4, 4, 2),
    64: (4, 4, 4),
    128: (8, 4, 4),
    256: (8, 8, 4),
    512: (8, 8, 8),
    1024: (16, 8, 8),
    4096: (16, 16, 16),
}


def fsq_levels(n_codes: int, code_dim: int) -> tuple[int, int, int]:
    """The levels for K codes; ConfigError E_VALUE if there is no such grid or `code_dim` is not its channel number."""
    if n_codes not in FSQ_LEVELS:
        wanted = "one of " + ", ".join(map(str, FSQ_LEVELS))
        raise ConfigError("E_VALUE", where="model.n_codes with quantiser fsq", found=str(n_codes), wanted=wanted)
    levels = FSQ_LEVELS[n_codes]
    if code_dim != len(levels):
        raise ConfigError(
            "E_VALUE",
            where="model.code_dim with quantiser fsq",
            found=str(code_dim),
            wanted=f"{len(levels)}: {n_codes} codes are a grid of {levels}",
            fix=f"set model.code_dim={len(levels)}",
        )
    return levels


def fsq_grid(levels: tuple[int, ...]) -> Tensor:
    """All codes (K, channels) float32 in [-1, 1]; code k has the digits of k in the mixed base `levels`."""
    axes = [torch.linspace(-1.0, 1.0, n) for n in levels]
    return torch.cartesian_prod(*axes).contiguous()


def fsq_indices(vectors: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Nearest grid code of each vector (N, channels) -> (N,) int64; what lies outside [-1, 1] is clamped."""
    steps = torch.tensor([n - 1 for n in levels], device=vectors.device, dtype=torch.float32)
    digits = torch.round((vectors.float().clamp(-1.0, 1.0) + 1.0) * 0.5 * steps).long()
    index = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    for channel, n in enumerate(levels):
        index = index * n + digits[:, channel]
    return index

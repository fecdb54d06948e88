"""How well a keypoint's surroundings fit at every displacement of a cube. In torch, on any device, a few at a time.

C_i(d) = alpha / |P| * sum over p in P and channels k of (F_k(x_i + p) - M_k(x_i + d + p))^2, written as sum F^2 +
sum M^2 - 2 sum F M. Source of the cost: Heinrich et al. 2015; as one matrix product per keypoint: this project.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Search:
    """The displacements {-reach..reach}^3 x step, and a patch of offsets -radius..radius in steps of `step`; voxels."""

    reach: int
    step: int
    radius: int

    @property
    def side(self) -> int:
        """Displacements along one axis."""
        return 2 * self.reach + 1

    @property
    def taps(self) -> int:
        """Samples of the patch along one axis."""
        return 2 * self.radius // self.step + 1


def with_energy(features: Tensor) -> Tensor:
    """Features (C, D, H, W) as rows (D H W, C + 1), the last column the sum of squares: what patches are cut from."""
    rows = features.flatten(1).T
    return torch.cat([rows, rows.square().sum(dim=1, keepdim=True)], dim=1).contiguous()


def displacement_cost(
    fixed: Tensor, moving: Tensor, shape: tuple[int, int, int], points: Tensor, search: Search, alpha: float
) -> Tensor:
    """Costs (N, side, side, side) float32 of points (N, 3), voxel indices z, y, x; `fixed`, `moving` from with_energy.

    The nearest voxel is read, beyond the border the border's.
    """
    side = search.side
    costs = torch.empty((len(points), side, side, side), dtype=torch.float32, device=points.device)
    chunk = 1 if points.device.type == "cpu" else 32  # one keypoint's work fits a processor's cache
    for start in range(0, len(points), chunk):
        costs[start : start + chunk] = _costs(fixed, moving, shape, points[start : start + chunk], search)
    return costs.mul_(alpha / search.taps**3)


def _costs(fixed: Tensor, moving: Tensor, shape: tuple[int, int, int], points: Tensor, search: Search) -> Tensor:
    n, taps, side = len(points), search.taps, search.side
    around, channels = side + taps - 1, fixed.shape[1]
    patch = _cut(fixed, shape, points, -search.radius, search.step, taps)  # (n, taps, taps, taps, C + 1)
    region = _cut(moving, shape, points, -search.radius - search.reach * search.step, search.step, around)
    # Along x the taps lie one after the other in memory, so a window of them is a row of a matrix.
    windows = region.as_strided(
        (n, around, around, side, taps * channels),
        (around**3 * channels, around**2 * channels, around * channels, channels, 1),
    ).reshape(n, around * around * side, taps * channels)
    weights = patch * -2.0
    weights[..., -1] = 1.0
    products = weights.view(n, taps * taps, taps * channels) @ windows.transpose(1, 2)
    products = products.view(n, taps, taps, around, around, side)
    total = patch[..., -1].sum(dim=(1, 2, 3)).view(n, 1, 1, 1).repeat(1, side, side, side)
    for z in range(taps):
        for y in range(taps):
            total += products[:, z, y, z : z + side, y : y + side]
    return total


def _cut(rows: Tensor, shape: tuple[int, int, int], points: Tensor, first: int, step: int, count: int) -> Tensor:
    """The cube (n, count, count, count, C) of samples at points + first + step * (0..count-1) along each axis."""
    offsets = first + step * torch.arange(count, device=points.device)
    z, y, x = ((points[:, a, None] + offsets).clamp_(0, shape[a] - 1) for a in range(3))
    index = (z[:, :, None, None] * shape[1] + y[:, None, :, None]) * shape[2] + x[:, None, None, :]
    return rows.index_select(0, index.flatten()).view(*index.shape, rows.shape[1])

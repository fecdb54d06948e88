"""Displacement fields as tensors: looking up, warping, composing and refining the grid. In torch, on any device.

A field is u (3, D, H, W), components z, y, x in voxels of its own isotropic grid: x goes to x + u(x).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def voxel_centres(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Positions (3, D, H, W) of all voxels, in voxels."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def looked_up(values: Tensor, at: Tensor) -> Tensor:
    """Values (C, ...) of (C, D, H, W) at positions (3, ...), linearly; beyond the border the border's."""
    shape = values.shape[1:]
    last = torch.tensor([max(n - 1, 1) for n in shape], dtype=at.dtype, device=at.device)
    unit = at.flatten(1).T / last * 2.0 - 1.0
    grid = unit.flip(-1).view(1, 1, 1, -1, 3)  # grid_sample wants x, y, z
    found = F.grid_sample(values[None], grid, mode="bilinear", padding_mode="border", align_corners=True)
    return found.view(len(values), *at.shape[1:])


def warped_image(image: Tensor, field: Tensor) -> Tensor:
    """Image (D, H, W) at x + u(x)."""
    shape = (image.shape[0], image.shape[1], image.shape[2])
    return looked_up(image[None], voxel_centres(shape, image.device) + field)[0]


def composed(first: Tensor, then: Tensor) -> Tensor:
    """The field of x -> first before it, then after it: u(x) = first(x) + then(x + first(x))."""
    shape = (first.shape[1], first.shape[2], first.shape[3])
    return first + looked_up(then, voxel_centres(shape, first.device) + first)


def interpolation_matrix(count: int, nodes: Tensor) -> Tensor:
    """(count, len(nodes)) weights that carry values at increasing `nodes` to voxels 0..count-1, linearly."""
    at = torch.arange(count, dtype=torch.float32, device=nodes.device)
    right = torch.searchsorted(nodes, at, right=True).clamp_(1, len(nodes) - 1)
    low, high = nodes[right - 1], nodes[right]
    share = ((at - low) / (high - low)).clamp_(0.0, 1.0)
    weights = torch.zeros((count, len(nodes)), dtype=torch.float32, device=nodes.device)
    weights.scatter_(1, right[:, None] - 1, (1.0 - share)[:, None])
    weights.scatter_(1, right[:, None], share[:, None])
    return weights


def separably(values: Tensor, matrices: list[Tensor]) -> Tensor:
    """Values (C, d, h, w) with a matrix (n_out, n_in) applied along each of the three axes."""
    mz, my, mx = matrices
    values = values @ mx.T
    values = (values.transpose(2, 3) @ my.T).transpose(2, 3)
    return torch.einsum("zd,cdhw->czhw", mz, values)

"""A smooth field through displacements at scattered points: the thin-plate spline, in mm. In torch, on any device.

s(x) = sum of w_i U(|x - x_i|) + an affine map, U(r) = r^2 log r. Source: Bookstein 1989; Duchon 1977.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 2048


@dataclass(frozen=True)
class Spline:
    """A fitted spline: `points` (N, 3) less `centre` (3,), `weights` (N, C), `affine` (4, C) for (1, x); float64."""

    points: Tensor
    weights: Tensor
    affine: Tensor
    centre: Tensor

    def __call__(self, at: Tensor) -> Tensor:
        """Values (M, C), float32, at points (M, 3); a block of points at a time."""
        points, weights = self.points.float(), self.weights.float()
        at = (at.double() - self.centre).float()
        flat = at.double() @ self.affine[1:] + self.affine[0]
        curved = [_kernel(block, points) @ weights for block in at.split(_ROWS)]
        return (flat + torch.cat(curved)).float()


def fit_spline(points: Tensor, values: Tensor, *, ridge: float) -> Spline:
    """The spline near values (N, C) at points (N, 3); `ridge` 0 goes through them, more makes it stiffer.

    It minimises the sum of squared residuals / ridge plus the bending energy, as scipy's RBFInterpolator does with
    `smoothing=ridge`.
    """
    centre = points.double().mean(dim=0)
    x, y = points.double() - centre, values.double()
    n = len(x)
    ones = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
    system = torch.zeros((n + 4, n + 4), dtype=torch.float64, device=x.device)
    system[:n, :n] = _kernel(x, x)
    system[:n, :n].diagonal().add_(ridge)
    system[:n, n:] = ones
    system[n:, :n] = ones.T
    right = torch.cat([y, torch.zeros((4, y.shape[1]), dtype=torch.float64, device=y.device)])
    solved = torch.linalg.solve(system, right)
    return Spline(points=x, weights=solved[:n], affine=solved[n:], centre=centre)


def _kernel(at: Tensor, points: Tensor) -> Tensor:
    """U of all distances, (M, N)."""
    squared = torch.addmm(at.square().sum(dim=1, keepdim=True) + points.square().sum(dim=1), at, points.T, alpha=-2.0)
    squared.clamp_min_(1e-12)
    return squared.log().mul_(squared).mul_(0.5)

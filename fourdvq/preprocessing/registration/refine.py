"""The last tenths of a millimetre: a coarse, smooth correction by gradient descent on the MIND distance.

The correction is a cubic B-spline with few nodes, and uneven corrections cost: it sharpens what the keypoints found and
has no room to follow single voxels. Distances saturate: where new fibrosis stands, no displacement makes the scans
alike, and such a place must not pull, or the map would squeeze the disease out of the lung (measured on phantoms by
tests/benchmarks/prep_registration.py). Source of the idea:
Siebert et al. 2021 (convex optimisation, then descent on the same features); of the saturation: Geman and McClure 1987;
nodes, penalty and form: this project.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fourdvq.preprocessing.registration.warp import looked_up, separably

_DECAY = (0.9, 0.99)  # of the running mean of the gradient and of its square (Adam)
_SMALLEST = 1e-4  # gradient of a node that counts as none: where nothing is left to gain, rounding must not drive it


@dataclass(frozen=True)
class Refinement:
    """Distance of the nodes and of the voxels that are looked at, steps of the descent, and the price of unevenness."""

    node: int = 6  # voxels
    # Not a whole number of voxels: reading between voxels evens out noise, so if all samples lay equally far from their
    # voxel, noise alone would draw the correction to half a voxel.
    stride: float = 2.7
    margin: int = 2  # voxels around the mask that are looked at too: its edge is the clearest structure there is
    steps: int = 40
    rate: float = 0.1  # voxels a step
    stiffness: float = 0.5  # squared feature distance per squared stretch
    changed: float = 0.01  # squared feature distance that pays half: a place that has rather changed than moved


def correction(fixed: Tensor, moving: Tensor, mask: Tensor, how: Refinement) -> Tensor:
    """The smooth field (3, D, H, W) in voxels that brings features (C, D, H, W) together in and around the mask."""
    shape, device = mask.shape, fixed.device
    nodes = [torch.arange(-1, (n - 1) // how.node + 3, device=device) * how.node for n in shape]
    samples = [torch.arange(how.stride / 2, n - 1, how.stride, dtype=torch.float32, device=device) for n in shape]
    dense = [spline_matrix(torch.arange(n, device=device), k, how.node) for n, k in zip(shape, nodes, strict=True)]
    sparse = [spline_matrix(a, k, how.node) for a, k in zip(samples, nodes, strict=True)]
    places = torch.stack(torch.meshgrid(*samples, indexing="ij")).flatten(1)
    near = F.max_pool3d(mask[None, None].float(), 2 * how.margin + 1, stride=1, padding=how.margin)[0, 0] > 0
    looked_at = near[tuple(places.round().long())].nonzero()[:, 0]
    places = places[:, looked_at]
    wanted = looked_up(fixed, places)
    weights = torch.zeros((3, *(len(n) for n in nodes)), dtype=torch.float32, device=device)
    mean, spread = torch.zeros_like(weights), torch.zeros_like(weights)
    for step in range(1, how.steps + 1):
        gradient = _gradient(weights, sparse, looked_at, places, wanted, moving, how)
        mean.lerp_(gradient, 1 - _DECAY[0])
        spread.lerp_(gradient.square(), 1 - _DECAY[1])
        size = (spread / (1 - _DECAY[1] ** step)).sqrt_().add_(_SMALLEST)
        weights.addcdiv_(mean / (1 - _DECAY[0] ** step), size, value=-how.rate)
    return separably(weights, dense)


def _gradient(
    weights: Tensor,
    sparse: list[Tensor],
    looked_at: Tensor,
    places: Tensor,
    wanted: Tensor,
    moving: Tensor,
    how: Refinement,
) -> Tensor:
    with torch.enable_grad():
        weights = weights.detach().requires_grad_(True)
        at = places + separably(weights, sparse).flatten(1)[:, looked_at]
        apart = (looked_up(moving, at) - wanted).square().mean(dim=0)
        distance = (how.changed * apart / (how.changed + apart)).mean()
        uneven = sum(weights.diff(dim=axis).square().mean() for axis in (1, 2, 3)) / how.node**2
        (gradient,) = torch.autograd.grad(distance + how.stiffness * uneven, weights)
    return gradient * weights[0].numel()  # a node sees its own share of the mean


def spline_matrix(at: Tensor, nodes: Tensor, spacing: int) -> Tensor:
    """(len(at), len(nodes)) values of the cubic B-splines on equidistant `nodes` at the places `at`."""
    t = ((at[:, None] - nodes[None, :]).float() / spacing).abs()
    inner, outer = 2 / 3 - t**2 + t**3 / 2, (2 - t) ** 3 / 6
    return torch.where(t < 1, inner, torch.where(t < 2, outer, 0.0))

"""Keypoints: places in the lung that can be told from their surroundings along every axis. In torch, on any device.

Source: Foerstner and Guelch 1987 for the measure of distinctiveness; its use for lungs: Heinrich et al. 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fourdvq.errors import RegistrationError
from fourdvq.preprocessing.registration.mind import filtered, gaussian_taps, padded_by_border

FEWEST = 100  # with fewer, a smooth field of the whole lung is guesswork
_WANTED = 400
_DERIVATIVE = (1 / 12, -8 / 12, 0.0, 8 / 12, -1 / 12)
_LEAST_DISTINCT = 1e-8  # (HU per voxel) squared


def distinctiveness(image: Tensor, sigma: float) -> Tensor:
    """1 / trace(S^-1), (D, H, W), of the structure tensor S averaged with a Gaussian of `sigma`; 0 where flat."""
    gradient = [_derivative(image, axis) for axis in (0, 1, 2)]
    taps = gaussian_taps(sigma)
    a, b, c = (filtered(g * g, taps).double() for g in gradient)
    f, e, d = (filtered(gradient[i] * gradient[j], taps).double() for i, j in ((0, 1), (0, 2), (1, 2)))
    bc, ac, ab = b * c - d * d, a * c - e * e, a * b - f * f
    determinant = a * bc - f * (f * c - d * e) + e * (f * d - b * e)
    trace = bc + ac + ab  # of the adjugate
    return torch.where(trace > 0, determinant / trace.clamp_min(1e-30), 0.0).clamp_min_(0.0).float()


def keypoints(image: Tensor, mask: Tensor, *, sigma: float, window: int, most: int) -> Tensor:
    """Voxel indices (N, 3) of local maxima of distinctiveness in the eroded mask, in the order of the voxels.

    A maximum is the greatest value of a cube with half-width `window`; the cube shrinks while fewer than 400 are found
    (a small lung, a coarse grid) and grows while there are more than `most`, so that they stay spread out.
    Raises RegistrationError E_REG if fewer than 100 are left.
    """
    distinct = torch.where(~_dilated(~mask.bool(), 1), distinctiveness(image, sigma), 0.0)
    found = _maxima(distinct, window)
    while len(found) < _WANTED and window > 1:
        window -= 1
        found = _maxima(distinct, window)
    while len(found) > most and window < max(image.shape):
        window += 1
        found = _maxima(distinct, window)
    require_enough(len(found), "keypoints in the lung")
    return found[:most]  # equal values may still be more


def require_enough(count: int, what: str) -> None:
    """Raise RegistrationError E_REG for fewer places than a field of the whole lung needs."""
    if count < FEWEST:
        raise RegistrationError("E_REG", where="the keypoints", found=f"{count} {what}", wanted=f"at least {FEWEST}")


def _maxima(distinct: Tensor, window: int) -> Tensor:
    greatest = distinct
    for axis in range(3):
        greatest = _running_maximum(greatest, window, axis)
    return ((distinct == greatest) & (distinct >= _LEAST_DISTINCT)).nonzero()


def _derivative(image: Tensor, axis: int) -> Tensor:
    padded = padded_by_border(image, 2, axis)
    total = torch.zeros_like(image)
    for offset, tap in enumerate(_DERIVATIVE):
        if tap:
            total.add_(padded.narrow(axis, offset, image.shape[axis]), alpha=tap)
    return total


def _running_maximum(values: Tensor, half: int, axis: int) -> Tensor:
    """Greatest of 2 half + 1 neighbours along an axis."""
    kernel, padding = [1, 1, 1], [0, 0, 0]
    kernel[axis], padding[axis] = 2 * half + 1, half
    return F.max_pool3d(values[None, None], kernel, stride=1, padding=padding)[0, 0]


def _dilated(mask: Tensor, half: int) -> Tensor:
    """The mask grown by a cube; beyond the image counts as outside the lung, so the image's rim is eroded too."""
    grown = F.pad(mask.float(), [half] * 6, value=1.0)
    for axis in range(3):
        grown = _running_maximum(grown, half, axis)
    return grown[half:-half, half:-half, half:-half] > 0.5

"""How far a reconstructed or generated volume is from the real one: MSE, PSNR, SSIM on [0, 1], absolute error in HU.

Volumes are (D, H, W) or (B, 1, D, H, W) in [0, 1], the data range is 1 and does not depend on the scan. `mask`, of the
same shape or (D, H, W), chooses voxels, such as lung. Computed in float32 or better, returned as float.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fourdvq.errors import ModelError

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03


def mse(a: Tensor, b: Tensor, mask: Tensor | None = None, data_range: float = 1.0) -> float:
    """Mean squared voxel difference over `data_range` squared."""
    return _masked_mean(_difference(a, b).square(), mask) / data_range**2


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None, data_range: float = 1.0) -> float:
    """10 log10(range^2 / MSE) in dB; infinite for equal volumes."""
    error = mse(a, b, mask, data_range)
    return math.inf if error == 0 else -10.0 * math.log10(error)


def mae_hu(
    a: Tensor, b: Tensor, mask: Tensor | None = None, window_hu: tuple[float, float] = (-1000.0, 400.0)
) -> float:
    """Mean absolute difference in HU of two volumes in [0, 1] that were scaled by `window_hu`."""
    low, high = window_hu
    return _masked_mean(_difference(a, b).abs(), mask) * (high - low)


def ssim(a: Tensor, b: Tensor, mask: Tensor | None = None, data_range: float = 1.0) -> float:
    """Structural similarity with a Gaussian 11^3 window of sigma 1.5 (Wang et al. 2004; K1 = 0.01, K2 = 0.03).

    Without a mask: mean over the windows that lie inside the volume, as MONAI has it. With a mask: mean of the map of
    `ssim_map` over its voxels, because lung reaches the border. The latter too where an axis is shorter than a window.
    """
    _check(a, b)
    if mask is None and min(a.shape[-3:]) >= SSIM_WINDOW:
        return float(_ssim_windows(_batch(a), _batch(b), data_range).double().mean())
    return _masked_mean(ssim_map(a, b, data_range).double(), mask)


def ssim_map(a: Tensor, b: Tensor, data_range: float = 1.0) -> Tensor:
    """SSIM at every voxel, (B, 1, D, H, W) float32; the border is padded by repeating its voxels."""
    _check(a, b)
    pad = (SSIM_WINDOW // 2,) * 6
    padded = [F.pad(_batch(v), pad, mode="replicate") for v in (a, b)]
    return _ssim_windows(padded[0], padded[1], data_range)


def _ssim_windows(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    # One pass over all five moments as a batch; the window is separable, so three thin convolutions do for a cube.
    moments = _blur(torch.cat([a, b, a * a, b * b, a * b]))
    mean_a, mean_b, square_a, square_b, product = moments.chunk(5)
    variance_a, variance_b = square_a - mean_a * mean_a, square_b - mean_b * mean_b
    covariance = product - mean_a * mean_b
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return structure * (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean over windows inside (B, 1, D, H, W): each axis shrinks by the window less 1."""
    offsets = torch.arange(SSIM_WINDOW, device=x.device, dtype=torch.float64) - SSIM_WINDOW // 2
    kernel = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    kernel = (kernel / kernel.sum()).float()
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = SSIM_WINDOW
        x = F.conv3d(x, kernel.view(shape))
    return x


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b as (B, 1, D, H, W) float64."""
    _check(a, b)
    return (_batch(a) - _batch(b)).double()


def _masked_mean(values: Tensor, mask: Tensor | None) -> float:
    """Mean of (B, 1, D, H, W), over the voxels where a mask of that shape or of (D, H, W) is above 0."""
    if mask is None:
        return float(values.mean())
    chosen = mask.to(values.device) > 0
    if chosen.shape not in (values.shape, values.shape[-3:]):
        found, wanted = str(tuple(mask.shape)), f"{tuple(values.shape[-3:])} or {tuple(values.shape)}"
        raise ModelError("E_VALUE", where="mask", found=found, wanted=wanted)
    if not bool(chosen.any()):
        raise ModelError("E_VALUE", where="mask", found="no voxel", wanted="at least one voxel")
    return float(values[chosen.expand_as(values)].mean())


def _batch(volume: Tensor) -> Tensor:
    return volume.float().reshape(-1, 1, *volume.shape[-3:])


def _check(a: Tensor, b: Tensor) -> None:
    fits = a.shape == b.shape and (a.ndim == 3 or (a.ndim == 5 and a.shape[1] == 1))
    if not fits:
        found = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ModelError(
            "E_VALUE", where="volumes", found=found, wanted="two of one shape (D, H, W) or (B, 1, D, H, W)"
        )

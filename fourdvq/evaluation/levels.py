"""How close two volumes are, as the evaluation counts it: MSE, PSNR and SSIM on [0, 1], absolute error in HU."""

from __future__ import annotations

from torch import Tensor

from fourdvq.metrics import mae_hu, mse, psnr, ssim

PSNR_CEILING = 100.0  # dB, of equal volumes: an infinite value has no mean


def level_metrics(
    volume: Tensor, target: Tensor, mask: Tensor | None, window_hu: tuple[float, float]
) -> dict[str, float]:
    """mse, psnr, ssim and mae_hu of two volumes (D, H, W) in [0, 1], inside `mask` (None: everywhere)."""
    return {
        "mse": mse(volume, target, mask),
        "psnr": min(PSNR_CEILING, psnr(volume, target, mask)),
        "ssim": ssim(volume, target, mask),
        "mae_hu": mae_hu(volume, target, mask, window_hu),
    }

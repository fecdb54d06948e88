"""Stage 1 quality: real scans through encoder, codebook and decoder. One value per scan, sums over scans.

The comparison of the paper's table 3: whole volume, MSE on [0, 1]; the lung where masks are at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fourdvq.evaluation.levels import level_metrics
from fourdvq.evaluation.summary import RowSums, combine, sums_of
from fourdvq.models.vqgan import VQGAN3d

ROW = "reconstruction"


class Scans(Protocol):
    """Scans (1, D, H, W) in [0, 1] by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Tensor: ...


@torch.inference_mode()
def score_reconstruction(
    model: VQGAN3d,
    scans: Scans,
    *,
    lung_of: Callable[[int], Tensor] | None = None,
    window_hu: tuple[float, float] = (-1000.0, 400.0),
) -> list[RowSums]:
    """Sums over scans of MSE, PSNR, SSIM and absolute error in HU; `lung_of(i)` (D, H, W) adds the lung region."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums: list[RowSums] = []
    try:
        for i in range(len(scans)):
            scan = scans[i]
            volume = (model(scan[None].to(device) - 0.5).recon[0, 0].float() + 0.5).clamp(0, 1).cpu()
            regions = {"whole": None} if lung_of is None else {"whole": None, "lung": lung_of(i)}
            for region, mask in regions.items():
                sums += _scan_sums(volume, scan[0].cpu().float(), mask, region, window_hu)
    finally:
        model.train(was_training)
    return combine(sums)


def _scan_sums(
    volume: Tensor, scan: Tensor, mask: Tensor | None, region: str, window_hu: tuple[float, float]
) -> list[RowSums]:
    values = level_metrics(volume, scan, mask, window_hu)
    return [sums_of(ROW, f"reconstruction/{name}/{region}", [value]) for name, value in values.items()]

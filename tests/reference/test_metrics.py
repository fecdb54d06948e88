"""Metrics against MONAI, NumPy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fourdvq.errors import ModelError
from fourdvq.metrics import mae_hu, mse, psnr, ssim, ssim_map

SHAPE = (14, 20, 17)


def pair(noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, 4, 5, 4, generator=generator)
    a = F.interpolate(coarse, size=SHAPE, mode="trilinear", align_corners=True)
    return a, (a + noise * torch.randn(a.shape, generator=generator)).clamp(0, 1)


def lung() -> torch.Tensor:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:9, 4:15, 3:] = True
    return mask


def ssim_by_definition(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Wang et al. 2004, with the full 11^3 window, in float64, on windows inside (1, 1, D, H, W)."""
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    cube = line[:, None, None] * line[:, None] * line
    cube = (cube / cube.sum())[None, None]
    x, y = a.double(), b.double()
    mx, my = F.conv3d(x, cube), F.conv3d(y, cube)
    vx, vy, vxy = (F.conv3d(p, cube) - q for p, q in ((x * x, mx * mx), (y * y, my * my), (x * y, mx * my)))
    return (2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))


def test_ssim_equals_monai_on_the_windows_inside_the_volume():
    from monai.metrics import SSIMMetric

    a, b = pair()
    theirs = SSIMMetric(spatial_dims=3, data_range=1.0, kernel_type="gaussian", win_size=11, kernel_sigma=1.5)(a, b)
    assert ssim(a, b) == pytest.approx(float(theirs), abs=1e-5)
    assert ssim(a, b) == pytest.approx(float(ssim_by_definition(a, b).mean()), abs=2e-6)


def test_masked_ssim_averages_the_map_on_a_replicated_border():
    a, b = pair()
    wanted = ssim_by_definition(*(F.pad(v, (5,) * 6, mode="replicate") for v in (a, b)))
    torch.testing.assert_close(ssim_map(a, b).double(), wanted, rtol=0, atol=5e-5)
    assert ssim(a[0, 0], b[0, 0], lung()) == pytest.approx(float(wanted[0, 0][lung()].mean()), abs=2e-6)


def test_equal_volumes_have_ssim_1_and_infinite_psnr():
    a, _ = pair()
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-6)
    assert psnr(a, a) == math.inf


def test_errors_equal_numpy_in_float64_with_and_without_a_mask():
    a, b = pair()
    x, y = a[0, 0].double().numpy(), b[0, 0].double().numpy()
    inside = lung().numpy()
    assert mse(a, b) == pytest.approx(np.mean((x - y) ** 2), rel=1e-6)
    assert mse(a[0, 0], b[0, 0], lung()) == pytest.approx(np.mean((x - y)[inside] ** 2), rel=1e-6)
    assert mae_hu(a, b, lung(), window_hu=(-1000, 400)) == pytest.approx(1400 * np.mean(abs(x - y)[inside]), rel=1e-6)
    assert psnr(a, b) == pytest.approx(-10 * math.log10(np.mean((x - y) ** 2)), rel=1e-6)


def test_a_constant_error_of_a_tenth_is_20_db_and_140_hu():
    a = torch.full(SHAPE, 0.5)
    assert psnr(a, a + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert mae_hu(a, a + 0.1) == pytest.approx(140.0, abs=1e-3)


def test_scaling_volumes_and_range_together_changes_no_metric():
    a, b = pair()
    for metric in (mse, psnr, ssim):
        assert metric(2 * a, 2 * b, data_range=2.0) == pytest.approx(metric(a, b), rel=1e-4)


def test_ssim_of_a_volume_thinner_than_the_window_is_defined():
    a, b = (v[:, :, :6] for v in pair())
    assert 0.0 < ssim(a, b) < 1.0


def test_a_mask_of_the_batched_shape_is_accepted_for_a_batch():
    a, b = (v.repeat(2, 1, 1, 1, 1) for v in pair())
    mask = lung().expand(2, 1, *SHAPE)
    assert mse(a, b, mask) == pytest.approx(mse(a, b, lung()), rel=1e-9)


@pytest.mark.parametrize("case", ["shape", "empty mask", "mask shape", "broadcastable"])
def test_volumes_and_masks_that_do_not_fit_are_refused(case):
    a, b = (v[0, 0] for v in pair())
    masks = {"empty mask": torch.zeros(SHAPE), "mask shape": torch.ones(2, 2, 2)}
    other = {"shape": b[1:], "broadcastable": b[:1]}.get(case, b)
    with pytest.raises(ModelError, match="E_VALUE"):
        mse(a, other, masks.get(case))

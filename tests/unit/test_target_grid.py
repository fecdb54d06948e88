"""The target grid covers the lungs, or the whole scan, and never a face."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fourdvq.data.volume import Volume
from fourdvq.preprocessing.profile import FovSpec, GridSpec, Profile, ProfileName
from fourdvq.preprocessing.target import on_target_grid
from synthetic_lungs import chest

PROFILE = Profile(ProfileName("test"), grid=GridSpec(32, 24, 24))
FACE_HU = 2000


def scan_with_a_head() -> tuple[Volume, np.ndarray, float]:
    """A chest that goes on upwards for 150 mm; from 60 mm above the lungs on it has a value of its own."""
    scan, mask = chest((60, 48, 48))
    more = round(150 / scan.spacing[0])
    hu = np.pad(scan.hu, ((0, more), (0, 0), (0, 0)), mode="edge")
    lung = np.pad(mask.hu > 0, ((0, more), (0, 0), (0, 0)))
    apex_mm = (np.flatnonzero(lung.any(axis=(1, 2)))[-1] + 1) * scan.spacing[0]
    hu[round((apex_mm + 60) / scan.spacing[0]) :] = FACE_HU
    return replace(scan, hu=hu), lung, apex_mm


@pytest.mark.parametrize(
    ("fov", "above_mm"), [(FovSpec("full"), 60.0), (FovSpec(margin_mm=100.0), 60.0), (FovSpec(), 10.0)]
)
def test_no_face_reaches_the_grid_whatever_the_field_of_view(fov, above_mm):
    scan, lung, apex_mm = scan_with_a_head()
    target = on_target_grid(scan, lung, replace(PROFILE, fov=fov))
    top_mm = target.grid.origin[2] + (target.grid.size[0] - 0.5) * target.grid.spacing[0]
    assert top_mm - (scan.origin[2] - scan.spacing[0] / 2) - apex_mm == pytest.approx(above_mm)
    assert target.hu.max() < FACE_HU / 4  # smoothing carries a little of the next voxel across


def test_a_full_field_that_ends_at_the_neck_is_kept_whole():
    scan, mask = chest((60, 48, 48))
    target = on_target_grid(scan, mask.hu > 0, replace(PROFILE, fov=FovSpec("full")))
    whole_mm = [n * s for n, s in zip(scan.hu.shape, scan.spacing, strict=True)]
    assert [n * s for n, s in zip(target.hu.shape, target.grid.spacing, strict=True)] == pytest.approx(whole_mm)

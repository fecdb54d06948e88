"""The target grid that a baseline defines, and what reaches it: one resample from a scan's own voxels, HU stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from fourdvq.data.volume import HU_MAX, HU_MIN, Volume, to_image
from fourdvq.preprocessing.grid import Grid, antialiased, below_the_face, full_box, grid_of_size, lung_box, resample
from fourdvq.preprocessing.pictures import PairView
from fourdvq.preprocessing.profile import Profile
from fourdvq.preprocessing.registration import Registration, jacobian_determinant


@dataclass(frozen=True)
class Target:
    """The grid of a patient, with the baseline's HU int16 and lung mask bool on it, (D, H, W)."""

    grid: Grid
    hu: np.ndarray
    mask: np.ndarray


def on_target_grid(volume: Volume, lung: np.ndarray, profile: Profile) -> Target:
    """The grid that a baseline and its lung mask (bool, on its own grid) define, and the baseline on it."""
    margin = profile.fov.margin_mm
    box = lung_box(lung, volume.spacing, margin) if profile.fov.mode == "lung_bbox" else full_box(volume)
    grid = grid_of_size(volume, below_the_face(box, lung, volume.spacing), profile.grid.size)
    nearest = profile.resample.interpolation == "nearest"
    hu = _as_hu(resample(_source_image(volume, grid, profile), grid, nearest=nearest))
    place = Volume(lung, volume.spacing, volume.origin, volume.direction)
    return Target(grid, hu, resample(to_image(place), grid, nearest=True, outside=0.0) > 0)


def follow_up_on_grid(volume: Volume, found: Registration, target: Target, profile: Profile) -> PairView:
    """A follow-up on the baseline's grid: for the eye before and after registration, and the final HU int16."""
    image = _source_image(volume, target.grid, profile)
    nearest = profile.resample.interpolation == "nearest"
    aligned = resample(image, target.grid, found.transform, nearest=nearest)
    final = _as_hu(with_background(aligned, target.hu, target.mask, profile))
    before = resample(image, target.grid, found.start)
    return PairView(before, aligned, final, **_field_maps(found, target.grid))


def with_background(aligned: np.ndarray, baseline: np.ndarray, mask: np.ndarray, profile: Profile) -> np.ndarray:
    """The follow-up inside the baseline mask, the baseline outside it; with a soft edge if the profile says so."""
    if profile.outside_lung.source == "own":
        return aligned
    if profile.outside_lung.feather_voxels == 0:
        return np.where(mask, aligned, baseline)
    weight = ndimage.gaussian_filter(mask.astype(np.float32), profile.outside_lung.feather_voxels)
    mixed: np.ndarray = weight * aligned + (1 - weight) * baseline
    return mixed


def _source_image(volume: Volume, grid: Grid, profile: Profile) -> sitk.Image:
    """The scan as float32, smoothed if its voxels are finer than the grid's."""
    image = to_image(volume)
    return antialiased(image, grid.spacing) if profile.resample.antialias else sitk.Cast(image, sitk.sitkFloat32)


def _as_hu(values: np.ndarray) -> np.ndarray:
    hu: np.ndarray = np.clip(np.rint(values), HU_MIN, HU_MAX).astype(np.int16)
    return hu


def _field_maps(found: Registration, grid: Grid) -> dict[str, np.ndarray]:
    """|u| in mm and log J on the target grid, for the picture."""
    if found.field is None:
        return {}
    u = resample(found.field, grid, outside=0.0)
    det = sitk.GetImageFromArray(np.log(np.maximum(jacobian_determinant(found.field), 1e-3)).astype(np.float32))
    det.SetSpacing(found.field.GetSpacing())
    det.SetOrigin(found.field.GetOrigin())
    det.SetDirection(found.field.GetDirection())
    return {"length_mm": np.linalg.norm(u, axis=-1), "log_j": resample(det, grid, outside=0.0)}

"""Alignment by mask centroids, then by an affine map that is kept only if it helps.

Convention everywhere: T maps baseline (fixed) points to follow-up (moving) points, in LPS mm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from fourdvq.data.volume import Volume, to_image
from fourdvq.errors import RegistrationError
from fourdvq.preprocessing.grid import Grid, antialiased, empty_image, grid_of_spacing, lung_box, resample
from fourdvq.preprocessing.profile import RegistrationSpec

MASK_DILATION_MM = 7.0
MOVING_MARGIN_MM = 30.0  # beyond the fixed margin: how far a first guess may be off before it leaves the image
SHRINK = (4, 2)
SMOOTHING_MM = {4: 2.0, 2: 1.0, 1: 0.0}
SMALLEST_AXIS = 12  # voxels: a level with fewer has nothing left to align
SEED = 20_240_117


@dataclass(frozen=True)
class WorkingPair:
    """Both scans clamped and at the working spacing, each around its own lungs.

    The moving scan is brought down too, because the optimiser reads all of it again and again; the final resample of
    the preparation starts from the original voxels.
    """

    grid: Grid
    fixed: np.ndarray  # HU float32 (D, H, W) on the grid
    fixed_mask: np.ndarray  # bool (D, H, W)
    fixed_share: np.ndarray  # float32 (D, H, W), share of lung in a voxel
    moving: sitk.Image  # HU float32
    moving_mask: sitk.Image  # float32, share of lung in a voxel


@dataclass(frozen=True)
class Overlap:
    """How well a transform aligns a pair: Dice of the masks, correlation of HU inside the fixed mask."""

    dice: float
    ncc: float


def working_pair(
    fixed: Volume, fixed_mask: np.ndarray, moving: Volume, moving_mask: np.ndarray, spec: RegistrationSpec
) -> WorkingPair:
    """Put the pair on isotropic grids: around the fixed lungs, and wider around the moving ones."""
    grid = grid_of_spacing(fixed, lung_box(fixed_mask, fixed.spacing, spec.margin_mm), spec.spacing_mm)
    wide = lung_box(moving_mask, moving.spacing, spec.margin_mm + MOVING_MARGIN_MM)
    moving_grid = grid_of_spacing(moving, wide, spec.spacing_mm)
    fixed_share = _lung_share(fixed, fixed_mask, grid)
    return WorkingPair(
        grid=grid,
        fixed=_clamped(fixed, grid, spec),
        fixed_mask=fixed_share >= 0.5,
        fixed_share=fixed_share,
        moving=_on_grid(_clamped(moving, moving_grid, spec), moving_grid),
        moving_mask=_on_grid(_lung_share(moving, moving_mask, moving_grid), moving_grid),
    )


def centroid_shift(pair: WorkingPair) -> sitk.AffineTransform:
    """The translation that puts the fixed lungs' centre on the moving lungs' centre; its centre is the fixed one."""
    at = _on_grid(pair.fixed_mask.astype(np.uint8), pair.grid)
    fixed = np.array(_centroid(at))
    moving = np.array(_centroid(pair.moving_mask))
    transform = sitk.AffineTransform(3)
    transform.SetCenter(fixed.tolist())
    transform.SetTranslation((moving - fixed).tolist())
    return transform


def affine(pair: WorkingPair, start: sitk.AffineTransform, spec: RegistrationSpec) -> sitk.AffineTransform:
    """The affine map with the best correlation in and around the fixed lungs, from `start`; deterministic.

    Raises RegistrationError E_REG if the optimiser loses the overlap.
    """
    near = ndimage.distance_transform_edt(~pair.fixed_mask, sampling=pair.grid.spacing) <= MASK_DILATION_MM
    shrink = [f for f in SHRINK if min(pair.grid.size) // f >= SMALLEST_AXIS] or [1]
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # sums over threads differ in the last bit, and the optimiser would amplify that
    method.SetMetricAsCorrelation()
    method.SetMetricFixedMask(_on_grid(near.astype(np.uint8), pair.grid))
    if spec.affine_sample_share < 1.0:
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(spec.affine_sample_share, SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, spec.affine_iterations)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel([SMOOTHING_MM[f] for f in shrink])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    transform = sitk.AffineTransform(start)
    method.SetInitialTransform(transform, inPlace=True)
    try:
        with itk_on_one_thread():  # filters inside the method look at the global number
            method.Execute(_on_grid(pair.fixed, pair.grid), pair.moving)
    except RuntimeError:
        raise RegistrationError("E_REG", where="the affine step", found="no overlap left") from None
    return transform


@contextlib.contextmanager
def itk_on_one_thread() -> Iterator[None]:
    """Results of one thread, whatever the process is set to."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def overlap(pair: WorkingPair, transform: sitk.Transform) -> Overlap:
    """Dice and correlation of the pair under a transform, on the working grid."""
    moved = warped(pair, transform)
    return Overlap(dice(pair.fixed_mask, warped_mask(pair, transform)), ncc(pair.fixed, moved, pair.fixed_mask))


def warped(pair: WorkingPair, transform: sitk.Transform) -> np.ndarray:
    """The moving scan on the working grid under a transform, HU float32 (D, H, W)."""
    return resample(pair.moving, pair.grid, transform, outside=float(sitk.GetArrayViewFromImage(pair.moving).min()))


def warped_share(pair: WorkingPair, transform: sitk.Transform) -> np.ndarray:
    """The share of lung in each voxel of the moving scan on the working grid under a transform, float32 (D, H, W)."""
    return resample(pair.moving_mask, pair.grid, transform, outside=0.0)


def warped_mask(pair: WorkingPair, transform: sitk.Transform) -> np.ndarray:
    """The moving lungs on the working grid under a transform, bool (D, H, W)."""
    return warped_share(pair, transform) >= 0.5


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two masks; 0 if both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else 0.0


def ncc(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """Correlation of two arrays inside a mask; 0 if either is constant there."""
    x, y = a[mask].astype(np.float64), b[mask].astype(np.float64)
    x -= x.mean()
    y -= y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else 0.0


def _clamped(volume: Volume, grid: Grid, spec: RegistrationSpec) -> np.ndarray:
    """HU float32 on the grid, clamped; outside the scan the lower bound."""
    low, high = spec.clamp_hu
    image = antialiased(to_image(volume), grid.spacing)
    return np.clip(resample(image, grid, outside=low), low, high)


def _lung_share(volume: Volume, mask: np.ndarray, grid: Grid) -> np.ndarray:
    place = Volume(mask, volume.spacing, volume.origin, volume.direction)
    return resample(to_image(place), grid, outside=0.0)


def _on_grid(array: np.ndarray, grid: Grid) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(empty_image(grid))
    return image


def _centroid(mask: sitk.Image) -> tuple[float, ...]:
    """Centre of the voxels above one half, in LPS mm."""
    inside = sitk.GetArrayViewFromImage(mask) > 0.5
    z, y, x = ndimage.center_of_mass(inside)
    point: tuple[float, ...] = mask.TransformContinuousIndexToPhysicalPoint([float(x), float(y), float(z)])
    return point

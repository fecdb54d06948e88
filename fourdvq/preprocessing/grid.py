"""Grids in patient space, of a given size or spacing, around the baseline lungs; and the one resample onto them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from fourdvq.data.volume import Volume

AIR = -1024.0
FACE_ABOVE_MM = 60.0  # from the apex of the lungs upwards: from here on a face may be in view


@dataclass(frozen=True)
class Grid:
    """`size` (D, H, W), `spacing` (z, y, x) in mm, `origin` (x, y, z) of the first centre, `direction` as in ITK."""

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]


@dataclass(frozen=True)
class Box:
    """Edges of a part of a volume along its own axes (z, y, x), in mm from the outer corner of its first voxel."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]


def lung_box(mask: np.ndarray, spacing: tuple[float, float, float], margin_mm: float) -> Box:
    """The bounding box of a mask (D, H, W), widened by a margin on every side."""
    low, high = [], []
    for axis, step in enumerate(spacing):
        inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        low.append(float(inside[0] * step - margin_mm))
        high.append(float((inside[-1] + 1) * step + margin_mm))
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def below_the_face(box: Box, lung: np.ndarray, spacing: tuple[float, float, float]) -> Box:
    """The box without what lies more than FACE_ABOVE_MM above a lung mask (D, H, W) of an LPS-oriented scan.

    A face can be drawn from CT and be recognised: it must not reach what is prepared, whatever the field of view.
    """
    apex_mm = float((np.flatnonzero(lung.any(axis=(1, 2)))[-1] + 1) * spacing[0])
    return Box(box.low, (min(box.high[0], apex_mm + FACE_ABOVE_MM), box.high[1], box.high[2]))


def full_box(volume: Volume) -> Box:
    """The whole of a volume."""
    depth, height, width = (float(n * s) for n, s in zip(volume.hu.shape, volume.spacing, strict=True))
    return Box((0.0, 0.0, 0.0), (depth, height, width))


def grid_of_size(volume: Volume, box: Box, size: tuple[int, int, int]) -> Grid:
    """The grid of `size` (D, H, W) voxels that fills the box exactly; its spacing differs per axis and patient."""
    low, extent = np.array(box.low), np.array(box.high) - np.array(box.low)
    return _grid(volume, low, size, extent / np.array(size))


def grid_of_spacing(volume: Volume, box: Box, spacing_mm: float) -> Grid:
    """The isotropic grid that covers the box, centred on it."""
    low, high = np.array(box.low), np.array(box.high)
    size = np.maximum(1, np.ceil((high - low) / spacing_mm - 1e-6)).astype(int)
    start = (low + high - size * spacing_mm) / 2
    return _grid(volume, start, (int(size[0]), int(size[1]), int(size[2])), np.full(3, spacing_mm))


def empty_image(grid: Grid) -> sitk.Image:
    """An 8-bit image of zeros on the grid: the reference that a resample wants."""
    image = sitk.Image([int(n) for n in reversed(grid.size)], sitk.sitkUInt8)
    image.SetSpacing([float(s) for s in reversed(grid.spacing)])
    image.SetOrigin([float(o) for o in grid.origin])
    image.SetDirection([float(d) for d in grid.direction])
    return image


def antialiased(image: sitk.Image, target_mm: tuple[float, float, float]) -> sitk.Image:
    """The image as float32, smoothed for voxels of `target_mm` (z, y, x): sigma (target/source - 1)/2 source voxels."""
    source = tuple(reversed(image.GetSpacing()))
    sigma = [max(0.0, (t / s - 1.0) / 2.0) for t, s in zip(target_mm, source, strict=True)]
    values = sitk.GetArrayViewFromImage(image).astype(np.float32)
    if max(sigma) > 0:
        ndimage.gaussian_filter(values, sigma, output=values, mode="nearest", truncate=3.0)
    result = sitk.GetImageFromArray(values)
    result.CopyInformation(image)
    return result


def resample(
    image: sitk.Image,
    grid: Grid,
    transform: sitk.Transform | None = None,
    *,
    nearest: bool = False,
    outside: float = AIR,
) -> np.ndarray:
    """Values (D, H, W) of `image` at T(x), for every voxel centre x of the grid; T maps grid points to image points.

    Linear values of any scalar image, masks too, are float32.
    """
    kind = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    scalar = image.GetNumberOfComponentsPerPixel() == 1
    output = sitk.sitkFloat32 if scalar and not nearest else image.GetPixelID()
    moved = sitk.Resample(image, empty_image(grid), transform or sitk.Transform(), kind, outside, output)
    result: np.ndarray = sitk.GetArrayFromImage(moved)
    return result


def _grid(volume: Volume, start_mm: np.ndarray, size: tuple[int, int, int], spacing: np.ndarray) -> Grid:
    # Boxes count from the outer corner of the first voxel, images from its centre.
    first_centre = start_mm + spacing / 2 - np.array(volume.spacing) / 2
    direction = np.array(volume.direction).reshape(3, 3)
    x, y, z = np.array(volume.origin) + direction @ first_centre[::-1]
    step = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    return Grid(size, step, (float(x), float(y), float(z)), volume.direction)

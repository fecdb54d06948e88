"""The lung mask of a scan: given by the site, or found by thresholds.

The threshold method is for scans of air-filled lungs that lie inside the image. It cuts off honeycombing and
consolidation, so whatever it finds goes to review. Its numbers were tuned on the public scan `ct-64`
(docs/reference/data.md). All masks are bool (D, H, W) on the scan's own grid, which is oriented to LPS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from fourdvq.data.volume import Volume, from_image, require_same_grid, to_image
from fourdvq.errors import VolumeError

AIR_HU = -400.0  # half way between aerated lung (-850) and soft tissue (40): there a voxel is half lung
WORKING_MM = 2.0
SMOOTHING_VARIANCE_MM2 = 1.0
MIN_COMPONENT_ML = 200.0
CLOSING_MM = 4.0
LUMEN_HU = (-950.0, -925.0, -900.0, -850.0, -800.0, -750.0, -700.0, -600.0, -500.0)
SEED_HU = -800.0
TRACHEA_MM2 = (60.0, 900.0)  # cross section of one airway
AIRWAY_GROWTH = 1.7  # a section this much larger than the one above has leaked into lung
AIRWAY_WALL_MM = 2.5
MIDLINE_DIP = 0.5  # the sagittal profile of two lungs falls below this share of either side's maximum


@dataclass(frozen=True)
class LungSides:
    """Millilitres on the patient's right and left; `two` says whether there is lung on both sides of a midline."""

    right_ml: float
    left_ml: float
    two: bool

    @property
    def ratio(self) -> float:
        """Left over right; 0 if there is no right lung."""
        return self.left_ml / self.right_ml if self.right_ml else 0.0


def threshold_mask(scan: Volume) -> np.ndarray:
    """Lung mask from the HU of an LPS-oriented scan; empty if no air-filled space of 200 ml lies inside the body."""
    image = sitk.Cast(to_image(scan), sitk.sitkFloat32)
    small = sitk.DiscreteGaussian(_coarser(image), SMOOTHING_VARIANCE_MM2)
    work = from_image(small)
    filled = _filled_body(work.hu)
    air = ndimage.binary_opening((work.hu < AIR_HU) & filled)
    airway = _airway(work, air)
    lung = _large_components(air & ~airway, MIN_COMPONENT_ML / work.voxel_ml)
    if not lung.any():
        return np.zeros(scan.hu.shape, dtype=bool)
    closed = _close(lung, work.spacing, CLOSING_MM) & ~airway
    mask = sitk.GetImageFromArray(closed.astype(np.uint8))
    mask.CopyInformation(small)
    native = sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    result: np.ndarray = sitk.GetArrayViewFromImage(native) > 0
    return result


def provided_mask(scan: Volume, provided: Volume | None) -> np.ndarray:
    """The mask that came with the scan. Raises VolumeError E_MASK if there is none or it lies on another grid."""
    if provided is None:
        wanted = "a file beside the scan that ends in _lung.nii.gz"
        raise VolumeError("E_MASK", where="the scan", found="no mask", wanted=wanted)
    require_same_grid(provided, scan, where="the given mask")
    result: np.ndarray = provided.hu > 0
    return result


def _threshold_only(scan: Volume, provided: Volume | None) -> np.ndarray:  # noqa: ARG001
    """A mask that the site gave is not looked at: methods are never mixed within a federation."""
    return threshold_mask(scan)


METHODS: dict[str, Callable[[Volume, Volume | None], np.ndarray]] = {
    "threshold": _threshold_only,
    "provided": provided_mask,
}


def lung_sides(mask: np.ndarray, spacing: tuple[float, float, float]) -> LungSides:
    """Split a lung mask of an LPS-oriented scan where its sagittal profile dips between two maxima.

    The body's midline would do for a whole chest, but a crop shows a part of the body only; one lung has no dip.
    """
    profile = ndimage.uniform_filter1d(mask.sum(axis=(0, 1)).astype(float), 3)
    columns = np.flatnonzero(profile)
    if columns.size < 3:
        return LungSides(0.0, 0.0, two=False)
    low, high = int(columns[0]), int(columns[-1]) + 1
    third = max(1, (high - low) // 3)
    dip = low + third + int(np.argmin(profile[low + third : high - third]))
    sides = min(profile[low : dip + 1].max(), profile[dip:high].max())
    voxel_ml = float(np.prod(spacing)) / 1000.0
    right, left = float(mask[:, :, :dip].sum()) * voxel_ml, float(mask[:, :, dip:].sum()) * voxel_ml
    two = bool(profile[dip] < MIDLINE_DIP * sides) and min(right, left) >= 0.1 * (right + left)
    return LungSides(right, left, two)


def filled_body(scan: Volume) -> tuple[np.ndarray, np.ndarray]:
    """(HU, body with its air) on a coarse view of the scan, about 4 mm: enough to look at the air around the body."""
    steps = tuple(max(1, round(4.0 / s)) for s in scan.spacing)
    coarse = np.asarray(scan.hu[:: steps[0], :: steps[1], :: steps[2]], dtype=np.float32)
    return coarse, _filled_body(coarse)


def _coarser(image: sitk.Image) -> sitk.Image:
    """The image on voxels of at least WORKING_MM, linearly; unchanged where it is coarser already."""
    spacing = [max(s, WORKING_MM) for s in image.GetSpacing()]
    if spacing == list(image.GetSpacing()):
        return image
    size = [
        max(1, int(np.ceil(n * s / t))) for n, s, t in zip(image.GetSize(), image.GetSpacing(), spacing, strict=True)
    ]
    shift = [(t - s) / 2 for s, t in zip(image.GetSpacing(), spacing, strict=True)]
    direction = np.array(image.GetDirection()).reshape(3, 3)
    origin = np.array(image.GetOrigin()) + direction @ np.array(shift)
    return sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, origin.tolist(), spacing, image.GetDirection(), -1024.0
    )


def _filled_body(hu: np.ndarray) -> np.ndarray:
    """Tissue and the air that each axial slice of it encloses."""
    tissue = ndimage.binary_opening(hu > AIR_HU)
    body = _large_components(tissue, 1, keep=1)
    return np.stack([ndimage.binary_fill_holes(axial) for axial in body])


def _large_components(mask: np.ndarray, min_voxels: float, keep: int = 2) -> np.ndarray:
    labels, n = ndimage.label(mask)
    if n == 0:
        return np.zeros_like(mask)
    sizes = np.bincount(labels.ravel(), minlength=n + 1)
    sizes[0] = 0
    chosen = [label for label in np.argsort(sizes)[::-1][:keep] if sizes[label] >= max(min_voxels, 1)]
    result: np.ndarray = np.isin(labels, chosen)
    return result


def _close(mask: np.ndarray, spacing: tuple[float, float, float], radius_mm: float) -> np.ndarray:
    """Closing by a ball in mm, then 3-D hole filling; by distances, so that a large ball costs no more."""
    pad = [int(np.ceil(radius_mm / s)) + 1 for s in spacing]
    padded = np.pad(mask, [(p, p) for p in pad])
    grown = ndimage.distance_transform_edt(~padded, sampling=spacing) <= radius_mm
    closed = ndimage.distance_transform_edt(grown, sampling=spacing) > radius_mm
    inner = tuple(slice(p, -p) for p in pad)
    result: np.ndarray = ndimage.binary_fill_holes(closed[inner] | mask)
    return result


def _airway(work: Volume, air: np.ndarray) -> np.ndarray:
    """Trachea and main bronchi: a dark section near the midline at the top, followed downwards slice by slice.

    Each section is cut at the loosest lumen threshold that does not let it grow into the lung; where none holds, the
    airway ends. With its wall, so that the mask keeps a clean border.
    """
    pixel_mm2 = work.spacing[1] * work.spacing[2]
    above = _trachea_seed(work, air, pixel_mm2)
    airway = np.zeros(air.shape, dtype=bool)
    if above is None:
        return airway
    z, section = above
    while z >= 0 and section.any():
        airway[z] = section
        z -= 1
        if z >= 0:
            section = _next_section(work.hu[z], section, pixel_mm2)
    walls: np.ndarray = ndimage.distance_transform_edt(~airway, sampling=work.spacing) <= AIRWAY_WALL_MM
    return walls


def _trachea_seed(work: Volume, air: np.ndarray, pixel_mm2: float) -> tuple[int, np.ndarray] | None:
    """The highest slice with one dark, compact section near the body's midline that goes on below it."""
    depth = air.shape[0]
    for z in range(depth - 1, depth // 2, -1):
        labels, n = ndimage.label((work.hu[z] < SEED_HU) & air[z])
        for label in range(1, n + 1):
            section = labels == label
            area = float(section.sum()) * pixel_mm2
            if not TRACHEA_MM2[0] <= area <= TRACHEA_MM2[1] or not _is_compact(section, work.spacing, area):
                continue
            x = float(ndimage.center_of_mass(section)[1])
            columns = np.flatnonzero(air[z:].any(axis=(0, 1)) | (work.hu[z] > AIR_HU).any(axis=0))
            off_centre = abs(x - (columns[0] + columns[-1]) / 2) * work.spacing[2]
            if off_centre < 40.0 and _next_section(work.hu[z - 1], section, pixel_mm2).any():
                return z, section
    return None


def _is_compact(section: np.ndarray, spacing: tuple[float, float, float], area: float) -> bool:
    rows, columns = np.flatnonzero(section.any(axis=1)), np.flatnonzero(section.any(axis=0))
    height = (rows[-1] - rows[0] + 1) * spacing[1]
    width = (columns[-1] - columns[0] + 1) * spacing[2]
    return bool(max(height, width) < 2.5 * min(height, width) and area > 0.45 * height * width)


def _next_section(hu: np.ndarray, section: np.ndarray, pixel_mm2: float) -> np.ndarray:
    limit = max(float(section.sum()) * AIRWAY_GROWTH, 4.0)
    for threshold in reversed(LUMEN_HU):
        labels, _ = ndimage.label(hu < threshold)
        touched = np.unique(labels[section])
        found = np.isin(labels, touched[touched > 0])
        if 0 < found.sum() <= limit and found.sum() * pixel_mm2 <= TRACHEA_MM2[1]:
            result: np.ndarray = found
            return result
    return np.zeros_like(section)

"""Trachea and main bronchi of a chest scan: followed downwards, slice by slice, from a section near the midline."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from fourdvq.data.volume import Volume

LUMEN_HU = (-950.0, -925.0, -900.0, -850.0, -800.0, -750.0, -700.0, -600.0, -500.0)
SEED_HU = -800.0
SECTION_MM2 = (60.0, 900.0)  # cross section of one airway
GROWTH = 1.7  # a section this much larger than the one above has leaked into lung
WALL_MM = 2.5  # or one voxel where that is more: the wall's voxels are part air and would stay in the lung
OFF_MIDLINE_MM = 40.0


def find_airway(work: Volume, air: np.ndarray, *, tissue_hu: float) -> np.ndarray:
    """The airway with its wall, bool (D, H, W): a dark section near the midline at the top and what follows below it.

    `work` is a smoothed LPS scan with voxels of 2 mm or more, `air` the air inside its body; above `tissue_hu` is
    tissue. Each section is cut at the loosest lumen threshold that does not let it grow into the lung; where none
    holds, the airway ends. Empty if there is no such section. The wall belongs to it, so that the mask of the lung
    keeps a clean border.
    """
    pixel_mm2 = work.spacing[1] * work.spacing[2]
    found = _seed(work, air, pixel_mm2, tissue_hu)
    airway = np.zeros(air.shape, dtype=bool)
    if found is None:
        return airway
    z, section = found
    while z >= 0 and section.any():
        airway[z] = section
        z -= 1
        if z >= 0:
            section = _next_section(work.hu[z], section, pixel_mm2)
    in_walls = [s / max(WALL_MM, s) for s in work.spacing]
    with_wall: np.ndarray = ndimage.distance_transform_edt(~airway, sampling=in_walls) <= 1.0
    return with_wall


def _seed(work: Volume, air: np.ndarray, pixel_mm2: float, tissue_hu: float) -> tuple[int, np.ndarray] | None:
    """The highest slice with one dark, compact section near the body's midline that goes on below it."""
    depth = air.shape[0]
    for z in range(depth - 1, depth // 2, -1):
        labels, n = ndimage.label((work.hu[z] < SEED_HU) & air[z])
        for label in range(1, n + 1):
            section = labels == label
            area = float(section.sum()) * pixel_mm2
            if not SECTION_MM2[0] <= area <= SECTION_MM2[1] or not _is_compact(section, work.spacing, area):
                continue
            x = float(ndimage.center_of_mass(section)[1])
            columns = np.flatnonzero(air[z:].any(axis=(0, 1)) | (work.hu[z] > tissue_hu).any(axis=0))
            off_centre = abs(x - (columns[0] + columns[-1]) / 2) * work.spacing[2]
            if off_centre < OFF_MIDLINE_MM and _next_section(work.hu[z - 1], section, pixel_mm2).any():
                return z, section
    return None


def _is_compact(section: np.ndarray, spacing: tuple[float, float, float], area: float) -> bool:
    rows, columns = np.flatnonzero(section.any(axis=1)), np.flatnonzero(section.any(axis=0))
    height = (rows[-1] - rows[0] + 1) * spacing[1]
    width = (columns[-1] - columns[0] + 1) * spacing[2]
    return bool(max(height, width) < 2.5 * min(height, width) and area > 0.45 * height * width)


def _next_section(hu: np.ndarray, section: np.ndarray, pixel_mm2: float) -> np.ndarray:
    limit = max(float(section.sum()) * GROWTH, 4.0)
    for threshold in reversed(LUMEN_HU):
        labels, _ = ndimage.label(hu < threshold)
        touched = np.unique(labels[section])
        found = np.isin(labels, touched[touched > 0])
        if 0 < found.sum() <= limit and found.sum() * pixel_mm2 <= SECTION_MM2[1]:
            result: np.ndarray = found
            return result
    return np.zeros_like(section)

"""Right and left: how much lung lies on each side of the dip in the mask's sagittal profile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

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

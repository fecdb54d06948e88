"""Right and left: how much lung lies on each side of the plane between the lungs.

Seen along that plane the mask's profile dips between two maxima. A patient lies turned or tilted, and a scan may be
stored on a turned grid, so the plane is sought among all that stand within MOST_TURNED of upright.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

MIDLINE_DIP = 0.5  # the profile of two lungs falls below this share of either side's maximum
VIEW_MM = 4.0  # enough for a plane between lungs
MOST_TURNED, STEP = 30, 5  # degrees about the long axis of the body, and about the one from front to back


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


@dataclass(frozen=True)
class _Split:
    """The best cut along one direction: `depth` is the dip over the lower of the two maxima, 0 for a clear gap."""

    right_share: float
    depth: float


def lung_sides(mask: np.ndarray, spacing: tuple[float, float, float]) -> LungSides:
    """Split a lung mask of an LPS-oriented scan, bool (D, H, W), where its profile dips most.

    The body's midline would do for a whole chest, but a crop shows a part of the body only; one lung has no dip.
    """
    steps = [max(1, round(VIEW_MM / s)) for s in spacing]
    at = np.argwhere(mask[:: steps[0], :: steps[1], :: steps[2]])
    if at.size == 0 or np.ptp(at[:, 2]) < 2:
        return LungSides(0.0, 0.0, two=False)
    z, y, x = ((at - at.mean(axis=0)) * [s * n for s, n in zip(spacing, steps, strict=True)]).T
    bin_mm = spacing[2] * steps[2]
    splits = [_split(x + a * z + b * y, bin_mm) for a, b in _TILTS]
    best = min(splits, key=lambda split: round(split.depth, 2))  # the first of equals, and the first is upright
    two = best.depth < MIDLINE_DIP and 0.1 <= best.right_share <= 0.9
    ml = float(mask.sum()) * float(np.prod(spacing)) / 1000.0
    right = ml * (best if two else splits[0]).right_share
    return LungSides(right, ml - right, two)


def _split(across: np.ndarray, bin_mm: float) -> _Split:
    """Where positions across the body, in mm, are rarest, in the middle third of their range."""
    columns = np.floor((across - across.min()) / bin_mm + 0.5).astype(int)
    counts = np.bincount(columns)
    profile = ndimage.uniform_filter1d(np.pad(counts, 1).astype(float), 3)[1:-1]
    third = max(1, counts.size // 3)
    dip = third + int(np.argmin(profile[third : counts.size - third]))
    sides = min(profile[: dip + 1].max(), profile[dip:].max())
    return _Split(float(counts[:dip].sum() / across.size), float(profile[dip] / sides))


def _tilts() -> list[tuple[float, float]]:
    """Slopes of the plane (mm to the right per mm upwards, and per mm backwards), the most upright first."""
    angles = range(-MOST_TURNED, MOST_TURNED + 1, STEP)
    pairs = sorted(((a, b) for a in angles for b in angles), key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))
    return [(float(np.tan(np.deg2rad(a))), float(np.tan(np.deg2rad(b)))) for a, b in pairs]


_TILTS = _tilts()

"""A quick guess of how much lung a series holds, to tell a full breath from a shallow one: every few slices, coarsely.

Only slices that need no decoder are looked at, so that a damaged file cannot take the process down.
"""

from __future__ import annotations

import numpy as np

from fourdvq.data.dicom import SeriesCandidate
from fourdvq.data.parts import direction_of
from fourdvq.data.pixels import is_compressed, raw_image, to_hu
from fourdvq.errors import VolumeError

_SLICES = 24
_PIXELS = 128  # along an image edge
_AIR_HU = -500


def rough_lung_ml(candidate: SeriesCandidate) -> float | None:
    """Millilitres of air inside the body, or None if it cannot be seen without decoding or reading fails."""
    slices = candidate.slices
    if len(slices) < 3 or not candidate.has_geometry or any(s.slope is None or is_compressed(s) for s in slices):
        return None
    normal = direction_of(candidate.first)
    ordered = sorted(slices, key=lambda s: float(np.array(s.position) @ normal))
    chosen = ordered[:: max(1, len(ordered) // _SLICES)]
    step = max(1, candidate.first.rows // _PIXELS)
    try:
        area = sum(_air_inside(to_hu(raw_image(s)[::step, ::step], s)) for s in chosen)
    except (VolumeError, OSError):
        return None
    rows_mm, columns_mm = candidate.first.pixel_spacing or (0.0, 0.0)
    return area * rows_mm * columns_mm * step * step * candidate.coverage_mm / len(chosen) / 1000.0


def _air_inside(hu: np.ndarray) -> int:
    from scipy import ndimage

    labels, _ = ndimage.label(hu < _AIR_HU)
    outside = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return int(((labels > 0) & ~np.isin(labels, outside)).sum())

"""A quick guess of how much lung a series holds, to tell a full breath from a shallow one: a few slices, coarsely."""

from __future__ import annotations

import numpy as np

from fourdvq.data.air import air_pixels
from fourdvq.data.air_apart import AirApart
from fourdvq.data.dicom import SeriesCandidate
from fourdvq.data.parts import direction_of
from fourdvq.data.pixels import is_compressed, needs_foreign_decoder
from fourdvq.errors import VolumeError

_SLICES = 24
_SLICES_TO_DECODE = 10  # decoding an image takes ten times as long as reading it
_PIXELS = 128  # along an image edge
_APART = AirApart()


def rough_lung_ml(candidate: SeriesCandidate) -> float | None:
    """Millilitres of air inside the body, or None if the images cannot be read."""
    slices = candidate.slices
    if len(slices) < 3 or not candidate.has_geometry or any(s.slope is None for s in slices):
        return None
    normal = direction_of(candidate.first)
    ordered = sorted(slices, key=lambda s: float(np.array(s.position) @ normal))
    wanted = _SLICES_TO_DECODE if any(map(is_compressed, slices)) else _SLICES
    chosen = ordered[:: max(1, len(ordered) // wanted)]
    step = max(1, candidate.first.rows // _PIXELS)
    try:
        look = _APART.air_pixels if any(map(needs_foreign_decoder, chosen)) else air_pixels
        area = look(chosen, step)
    except (VolumeError, OSError):
        return None
    if area is None:
        return None
    rows_mm, columns_mm = candidate.first.pixel_spacing or (0.0, 0.0)
    return area * rows_mm * columns_mm * step * step * candidate.coverage_mm / len(chosen) / 1000.0

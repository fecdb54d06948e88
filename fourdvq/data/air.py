"""How much of some axial images is air that the body encloses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fourdvq.data.dicom_file import SliceHeader
from fourdvq.data.pixels import is_compressed, raw_image, slice_hu, to_hu

_AIR_HU = -500


def air_pixels(slices: Sequence[SliceHeader], step: int) -> int:
    """The pixels of air inside the body, of every `step`-th row and column. Raises VolumeError, OSError."""
    return sum(_air_inside(_coarse_hu(s, step)) for s in slices)


def _coarse_hu(s: SliceHeader, step: int) -> np.ndarray:
    if is_compressed(s):
        return slice_hu(s)[::step, ::step]
    return to_hu(raw_image(s)[::step, ::step], s)


def _air_inside(hu: np.ndarray) -> int:
    from scipy import ndimage

    labels, _ = ndimage.label(hu < _AIR_HU)
    outside = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return int(((labels > 0) & ~np.isin(labels, outside)).sum())

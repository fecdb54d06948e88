"""The lung mask that a site gives with the scan."""

from __future__ import annotations

import numpy as np

from fourdvq.data.volume import Volume, require_same_grid
from fourdvq.errors import VolumeError


def provided_mask(scan: Volume, provided: Volume | None) -> np.ndarray:
    """The mask that came with the scan. Raises VolumeError E_MASK if there is none or it lies on another grid."""
    if provided is None:
        wanted = "a file beside the scan that ends in _lung.nii.gz"
        raise VolumeError("E_MASK", where="the scan", found="no mask", wanted=wanted)
    require_same_grid(provided, scan, where="the given mask")
    result: np.ndarray = provided.hu > 0
    return result

"""The lung mask that a site gives with the scan, without what was left in it far from the lungs by mistake.

The grid of a patient is the box around this mask: two voxels on the table would make every voxel of it larger.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from fourdvq.data.volume import Volume, require_same_grid
from fourdvq.errors import VolumeError

# A part of a mask that is smaller than one of these does not widen the box.
STRAY_ML = 20.0
STRAY_SHARE = 0.01  # of the largest part


def provided_mask(scan: Volume, provided: Volume | None) -> np.ndarray:
    """The mask that came with the scan, inside the box around its parts of 20 ml and 1 % of the largest or more.

    Smaller parts inside that box stay: a fibrotic lung leaves such pieces. Raises VolumeError E_MASK if there is no
    mask or it lies on another grid.
    """
    if provided is None:
        wanted = "a file beside the scan that ends in _lung.nii.gz"
        raise VolumeError("E_MASK", where="the scan", found="no mask", wanted=wanted)
    require_same_grid(provided, scan, where="the given mask")
    given = provided.hu > 0
    box = _box(_large_parts(given, scan.voxel_ml))
    result = np.zeros_like(given)
    result[box] = given[box]
    return result


def left_out(provided: Volume | None, mask: np.ndarray) -> bool:
    """Whether `mask`, made of the given one, is smaller than it."""
    return provided is not None and int(np.count_nonzero(provided.hu > 0)) > int(mask.sum())


def _large_parts(mask: np.ndarray, voxel_ml: float) -> np.ndarray:
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    labels = sitk.GetArrayFromImage(sitk.ConnectedComponent(image, True))  # a third of SciPy's time; corners join
    sizes = np.bincount(labels[mask], minlength=1)
    least = max(STRAY_SHARE * sizes.max(), STRAY_ML / voxel_ml)
    result: np.ndarray = (sizes >= min(least, max(sizes.max(), 1)))[labels]  # the largest part stays, however small
    return result


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around a mask; empty for an empty one."""
    lines = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return tuple(slice(line[0], line[-1] + 1) if line.size else slice(0) for line in lines)

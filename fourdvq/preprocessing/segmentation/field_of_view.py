"""Lung that the field of view cuts: at the ends of the image, at its sides, or at the reconstruction circle inside it.

A mask that touches the edge of the field shows it. A method that needs a closed body may lose such lung in some slices
instead. But a lung does not end from one slice to the next: air at the edge of the field that lies right above or
below lung is lung too.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from fourdvq.data.volume import Volume
from fourdvq.preprocessing.segmentation.body import AIR_HU, IN_SLICE, field_edge, padding_of, reaching

VIEW_MM = 2.5
TOUCHING_MM2 = 40.0  # of the mask in one slice at the edge: a few voxels of noise are not a cut
ABOVE_OR_BELOW_MM = 8.0
MISSING_ML = 2.0


def field_cuts(scan: Volume, mask: np.ndarray) -> tuple[str, ...]:
    """Where the field of view cuts the lung: some of bottom, top, front, back, right, left; empty if it does not.

    `scan` is oriented to LPS with padding at -1024 HU, `mask` is its lung, bool (D, H, W). For a cut by the circle,
    front to left are the sides of the image on which it lies. Empty for an empty mask: that scan has no lung at all.
    """
    if not mask.any():
        return ()
    steps = [max(1, round(VIEW_MM / s)) for s in scan.spacing]
    view = tuple(slice(None, None, step) for step in steps)
    mm = [s * n for s, n in zip(scan.spacing, steps, strict=True)]
    hu, lung = scan.hu[view], mask[view]
    padding = padding_of(hu)
    edge = field_edge(padding)
    touching = lung & edge
    touching[touching.sum(axis=(1, 2)) * mm[1] * mm[2] < TOUCHING_MM2] = False
    missing = _missing(hu, lung, padding, edge, reach=max(1, round(ABOVE_OR_BELOW_MM / mm[0])))
    if float(missing.sum()) * float(np.prod(mm)) / 1000.0 < MISSING_ML:
        missing[:] = False
    return tuple(dict.fromkeys([*_faces(mask), *_sides(touching | missing)]))


def _missing(hu: np.ndarray, lung: np.ndarray, padding: np.ndarray, edge: np.ndarray, *, reach: int) -> np.ndarray:
    """Air outside the mask that reaches the edge of the field in its slice, `reach` slices or less from lung."""
    air = ndimage.binary_opening((hu < AIR_HU) & ~padding, IN_SLICE)
    near = ndimage.binary_dilation(lung, np.ones((3, 1, 1), dtype=bool), iterations=reach)
    result: np.ndarray = ndimage.binary_opening(reaching(air, edge) & near & ~lung, IN_SLICE)
    return result


def _faces(mask: np.ndarray) -> list[str]:
    names = (("bottom", "top"), ("front", "back"), ("right", "left"))
    ends = [(names[axis][end], mask.take(-end, axis=axis)) for axis in range(3) for end in (0, 1)]
    return [name for name, face in ends if face.any()]


def _sides(cut: np.ndarray) -> list[str]:
    """The sides of the image on which cut voxels lie: each on the side it is nearest to, seen from the middle."""
    _, y, x = np.nonzero(cut)
    height, width = cut.shape[1:]
    down, across = 2 * y / max(height - 1, 1) - 1, 2 * x / max(width - 1, 1) - 1
    upright = np.abs(down) > np.abs(across)
    found = {
        "front": upright & (down < 0),
        "back": upright & (down >= 0),
        "right": ~upright & (across < 0),
        "left": ~upright & (across >= 0),
    }
    return [name for name, where in found.items() if where.any()]

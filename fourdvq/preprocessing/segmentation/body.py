"""What lies inside the body, slice by slice; also where the field of view cuts the body open.

Masks here are bool (D, H, W) on any grid of an LPS-oriented scan. The field of view ends at the border of a slice or,
inside it, at the reconstruction circle: outside the circle stands padding, clamped to -1024 HU.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from fourdvq.data.volume import HU_MIN, Volume
from fourdvq.preprocessing.profile import SegmentationSpec

AIR_HU = SegmentationSpec.air_hu
IN_SLICE = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]], dtype=bool)  # a voxel and its four neighbours in the slice
_NEIGHBOURS_IN_SLICE = np.pad(IN_SLICE, ((1, 1), (0, 0), (0, 0)))


def filled_body(scan: Volume) -> tuple[np.ndarray, np.ndarray]:
    """(HU, body with its air, lungs that the field opens too) on a coarse view of the scan, about 4 mm."""
    steps = tuple(max(1, round(4.0 / s)) for s in scan.spacing)
    coarse = np.asarray(scan.hu[:: steps[0], :: steps[1], :: steps[2]], dtype=np.float32)
    return coarse, inside_body(coarse, padding_of(coarse), air_hu=AIR_HU)


def inside_body(hu: np.ndarray, padding: np.ndarray, *, air_hu: float) -> np.ndarray:
    """Body with its air, and air between parts of it that the edge of the field lays open (a cut lung)."""
    body = _body(hu, air_hu)
    filled = _filled(body)
    if not (body & field_edge(padding)).any():
        return filled
    open_air = (hu < air_hu) & ~padding & ~filled
    labels, n = ndimage.label(open_air, _NEIGHBOURS_IN_SLICE)
    between = np.bincount(labels[_between(body)], minlength=n + 1)
    lung = between > 0.5 * np.bincount(labels.ravel(), minlength=n + 1)
    lung[0] = False
    result: np.ndarray = filled | lung[labels]
    return result


def padding_of(hu: np.ndarray) -> np.ndarray:
    """Voxels at the lowest value that hang together with a border of their slice."""
    return reaching(hu <= HU_MIN, _border(hu.shape))


def field_edge(padding: np.ndarray) -> np.ndarray:
    """The last voxels of the field of view: at the border of a slice, or within two voxels of the padding."""
    near = ndimage.binary_dilation(padding, IN_SLICE, iterations=2) if padding.any() else padding
    result: np.ndarray = (near | _border(padding.shape)) & ~padding
    return result


def reaching(inside: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """The parts of `inside` that reach `edge` in their slice."""
    labels, n = ndimage.label(inside, _NEIGHBOURS_IN_SLICE)
    reached = np.zeros(n + 1, dtype=bool)
    reached[labels[edge & inside]] = True
    result: np.ndarray = reached[labels]
    return result


def _body(hu: np.ndarray, air_hu: float) -> np.ndarray:
    # The image ends where the body goes on: an opening that sees air beyond the border would lay open what touches it.
    wider = np.pad(hu > air_hu, 1, mode="edge")
    labels, _ = ndimage.label(ndimage.binary_opening(wider)[1:-1, 1:-1, 1:-1])
    sizes = np.bincount(labels.ravel(), minlength=2)
    result: np.ndarray = labels == 1 + np.argmax(sizes[1:])
    return result


def _filled(body: np.ndarray) -> np.ndarray:
    return np.stack([ndimage.binary_fill_holes(axial) for axial in body])


def _between(body: np.ndarray) -> np.ndarray:
    """Where there is body on both sides, front and back or right and left, in the same slice."""
    result = np.zeros_like(body)
    for axis in (1, 2):
        before = np.logical_or.accumulate(body, axis=axis)
        after = np.flip(np.logical_or.accumulate(np.flip(body, axis), axis=axis), axis)
        result |= before & after
    return result


def _border(shape: tuple[int, ...]) -> np.ndarray:
    border = np.zeros(shape, dtype=bool)
    border[:, [0, -1], :] = True
    border[:, :, [0, -1]] = True
    return border

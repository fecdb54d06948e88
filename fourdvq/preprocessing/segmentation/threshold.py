"""Lung mask by thresholds: air inside the body, without the airways.

For scans of air-filled lungs that lie inside the image. It cuts off honeycombing and consolidation, so whatever it
finds goes to review. Its numbers were tuned on the public scan `ct-64` (docs/reference/data.md): between -500 and -320
HU the choice of the threshold hardly matters there.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from fourdvq.data.volume import HU_MIN, Volume, from_image, to_image
from fourdvq.preprocessing.segmentation.airway import find_airway
from fourdvq.preprocessing.segmentation.body import AIR_HU, inside_body, padding_of
from fourdvq.preprocessing.segmentation.sides import lung_sides

WORKING_MM = 2.0
SMOOTHING_VARIANCE_MM2 = 1.0
MIN_COMPONENT_ML = 200.0
CLOSING_MM = 4.0


def threshold_mask(scan: Volume, *, air_hu: float = AIR_HU) -> np.ndarray:
    """Lung mask from the HU of an LPS-oriented scan; empty if no air-filled space of 200 ml lies inside the body.

    `air_hu` separates air from tissue. Work is done on voxels of at least 2 mm, whatever the scan's own are.
    """
    image = to_image(scan)
    small = sitk.DiscreteGaussian(_on_working_grid(image, sitk.sitkLinear, sitk.sitkFloat32), SMOOTHING_VARIANCE_MM2)
    work = from_image(small)
    inside = inside_body(work.hu, _padding(image), air_hu=air_hu)
    air = ndimage.binary_opening((work.hu < air_hu) & inside)
    airway = find_airway(work, air, tissue_hu=air_hu)
    lung = _lungs(air & ~airway, work.spacing)
    if not lung.any():
        return np.zeros(scan.hu.shape, dtype=bool)
    closed = _close(lung, work.spacing, CLOSING_MM) & ~airway
    mask = sitk.GetImageFromArray(closed.astype(np.uint8))
    mask.CopyInformation(small)
    native = sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    result: np.ndarray = sitk.GetArrayViewFromImage(native) > 0
    return result


def _lungs(air: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """The largest air-filled space, and the other lung if that one is a single lung; empty if none has 200 ml.

    What else is large is gas of the stomach or the bowel. It lies under a diaphragm: unlike a lung, it does not reach
    above the middle of the other lung's height.
    """
    labels, n = ndimage.label(air)
    ml = np.bincount(labels.ravel(), minlength=n + 1)[1:] * float(np.prod(spacing)) / 1000.0
    large = [i for i in np.argsort(-ml, kind="stable") if ml[i] >= MIN_COMPONENT_ML]
    if not large:
        return np.zeros_like(air)
    first: np.ndarray = labels == large[0] + 1
    if lung_sides(first, spacing).two:
        return first
    heights = [part[0] for part in ndimage.find_objects(labels)]
    middle = (heights[large[0]].start + heights[large[0]].stop) / 2
    second = next((i + 1 for i in large[1:] if heights[i].stop > middle), 0)
    return first | (labels == second) if second else first


def _padding(image: sitk.Image) -> np.ndarray:
    """Padding on the working grid; from single voxels, because interpolation would blur its edge."""
    return padding_of(sitk.GetArrayViewFromImage(_on_working_grid(image, sitk.sitkNearestNeighbor, sitk.sitkInt16)))


def _on_working_grid(image: sitk.Image, interpolator: int, kind: int) -> sitk.Image:
    """The image on voxels of at least WORKING_MM; the same voxels where they are that large."""
    spacing = [max(s, WORKING_MM) for s in image.GetSpacing()]
    size = [
        max(1, int(np.ceil(n * s / t))) for n, s, t in zip(image.GetSize(), image.GetSpacing(), spacing, strict=True)
    ]
    shift = [(t - s) / 2 for s, t in zip(image.GetSpacing(), spacing, strict=True)]
    direction = np.array(image.GetDirection()).reshape(3, 3)
    origin = (np.array(image.GetOrigin()) + direction @ np.array(shift)).tolist()
    nothing = sitk.Transform()
    return sitk.Resample(image, size, nothing, interpolator, origin, spacing, image.GetDirection(), float(HU_MIN), kind)


def _close(mask: np.ndarray, spacing: tuple[float, float, float], radius_mm: float) -> np.ndarray:
    """Closing by a ball in mm, then 3-D hole filling; by distances, so that a large ball costs no more."""
    pad = [int(np.ceil(radius_mm / s)) + 1 for s in spacing]
    padded = np.pad(mask, [(p, p) for p in pad])
    grown = ndimage.distance_transform_edt(~padded, sampling=spacing) <= radius_mm
    closed = ndimage.distance_transform_edt(grown, sampling=spacing) > radius_mm
    inner = tuple(slice(p, -p) for p in pad)
    result: np.ndarray = ndimage.binary_fill_holes(closed[inner] | mask)
    return result

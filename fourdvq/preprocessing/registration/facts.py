"""What is measured on a displacement field: how long it is, whether it folds, and whether it can be undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from fourdvq.errors import RegistrationError


@dataclass(frozen=True)
class FieldFacts:
    """How a displacement field deforms the lung: lengths in mm, folding in percent of lung voxels."""

    mean_mm: float
    p95_mm: float
    fold_percent: float
    sd_log_j: float


@dataclass(frozen=True)
class Consistency:
    """Length in mm of u(x) + v(x + u(x)) in the lung, v being the field with the roles exchanged; 0 if v undoes u."""

    mean_mm: float
    p95_mm: float


def surface_p95_mm(a: np.ndarray, b: np.ndarray, spacing: Sequence[float]) -> float | None:
    """95th percentile in mm of the distances from each mask's surface to the other's; None if either mask is empty.

    Where a third of a lung's surface is 5 mm off, the overlap loses one point in a hundred and this tells it.
    """
    if not (a.any() and b.any()):
        return None
    edges = [m & ~ndimage.binary_erosion(m) for m in (a, b)]
    to_other = [ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges]
    return float(np.percentile(np.concatenate([to_other[1][edges[0]], to_other[0][edges[1]]]), 95))


def jacobian_determinant(field: sitk.Image) -> np.ndarray:
    """det of d(x + u)/dx, (D, H, W), by central differences."""
    u = _along_axes(field)
    x_mm, y_mm, z_mm = field.GetSpacing()
    # Row by row (x, y, z): 1 + du/dx on the diagonal. Expanded by hand: np.linalg.det needs three times the memory.
    d = [
        [np.gradient(u[..., c], step, axis=axis) for axis, step in ((2, x_mm), (1, y_mm), (0, z_mm))] for c in range(3)
    ]
    for c in range(3):
        d[c][c] += 1.0
    result: np.ndarray = (
        d[0][0] * (d[1][1] * d[2][2] - d[1][2] * d[2][1])
        - d[0][1] * (d[1][0] * d[2][2] - d[1][2] * d[2][0])
        + d[0][2] * (d[1][0] * d[2][1] - d[1][1] * d[2][0])
    )
    return result


def field_facts(field: sitk.Image, mask: np.ndarray) -> FieldFacts:
    """Lengths, folds and unevenness of u inside a mask of the same grid; RegistrationError E_REG if u is not finite."""
    u = sitk.GetArrayViewFromImage(field)
    if not np.isfinite(u).all():
        raise RegistrationError("E_REG", where="the deformable step", found="a field that is not finite")
    length = np.linalg.norm(u[mask], axis=-1)
    det = jacobian_determinant(field)[mask]
    return FieldFacts(
        mean_mm=float(length.mean()),
        p95_mm=float(np.percentile(length, 95)),
        fold_percent=100.0 * float((det <= 0).mean()),
        sd_log_j=float(np.log(np.maximum(det, 1e-3)).std()),
    )


def consistency(forward: sitk.Image, backward: sitk.Image, mask: np.ndarray) -> Consistency:
    """How well `backward` undoes `forward` inside a mask; all three are on one grid."""
    u, v = _along_axes(forward), _along_axes(backward)
    spacing = np.array(forward.GetSpacing()[::-1])
    inside = u[mask][:, ::-1]  # (n, 3) along z, y, x
    at = np.argwhere(mask) + inside / spacing
    back = np.stack([ndimage.map_coordinates(v[..., 2 - c], at.T, order=1, mode="nearest") for c in range(3)], axis=-1)
    length = np.linalg.norm(inside + back, axis=1)
    return Consistency(mean_mm=float(length.mean()), p95_mm=float(np.percentile(length, 95)))


def _along_axes(field: sitk.Image) -> np.ndarray:
    """u (D, H, W, 3) in mm along the grid's own x, y and z axes, which an oblique grid has turned against LPS."""
    axes: np.ndarray = sitk.GetArrayFromImage(field) @ np.array(field.GetDirection()).reshape(3, 3)
    return axes

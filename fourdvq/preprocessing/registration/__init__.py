"""Registration of a follow-up to its baseline: centroids, a guarded affine map, then a named deformable backend.

T(x) = A(x + u(x)) maps baseline points to follow-up points in LPS mm; u lives on the working grid. A new backend is one
function and one line in BACKENDS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from fourdvq.data.volume import Volume
from fourdvq.errors import RegistrationError
from fourdvq.preprocessing.profile import RegistrationSpec
from fourdvq.preprocessing.registration.align import (
    Overlap,
    WorkingPair,
    affine,
    centroid_shift,
    overlap,
    warped,
    working_pair,
)
from fourdvq.preprocessing.registration.demons import demons_field

FieldFinder = Callable[[WorkingPair, np.ndarray, RegistrationSpec], sitk.Image]


@dataclass(frozen=True)
class Backend:
    """What a named backend does after the centroids: an affine step or not, and a displacement field or none."""

    affine: bool
    field: FieldFinder | None = None


BACKENDS: dict[str, Backend] = {
    "demons": Backend(affine=True, field=demons_field),
    "affine": Backend(affine=True),
    "none": Backend(affine=False),
}


@dataclass(frozen=True)
class FieldFacts:
    """How a displacement field deforms the lung: lengths in mm, folding in percent of lung voxels."""

    mean_mm: float
    p95_mm: float
    fold_percent: float
    sd_log_j: float


@dataclass(frozen=True)
class Registration:
    """The transform and what is known about it; `before` is the overlap after the centroid shift alone."""

    transform: sitk.Transform
    start: sitk.Transform  # centroid shift alone
    matrix: tuple[float, ...]  # 12 numbers: the affine part as y = M x + t, row by row
    affine_kept: bool
    field: sitk.Image | None  # u in mm on the working grid
    unaligned: Overlap
    before: Overlap
    after: Overlap
    facts: FieldFacts


def register(
    fixed: Volume, fixed_mask: np.ndarray, moving: Volume, moving_mask: np.ndarray, spec: RegistrationSpec
) -> Registration:
    """Align `moving` with `fixed`; masks are bool (D, H, W) on their scans' grids.

    Raises RegistrationError E_REG if the lungs cannot be brought to overlap or the field is not finite.
    """
    backend = BACKENDS[spec.backend]
    pair = working_pair(fixed, fixed_mask, moving, moving_mask, spec)
    unaligned = overlap(pair, sitk.Transform())
    start = centroid_shift(pair)
    before = overlap(pair, start)
    if before.dice <= 0.1:
        raise RegistrationError("E_REG", where="the centroid step", found=f"Dice {before.dice:.2f}")
    linear, kept = _guarded_affine(pair, start, before, spec) if backend.affine else (start, False)
    field = backend.field(pair, warped(pair, linear), spec) if backend.field else None
    transform = linear if field is None else compose(linear, field)
    return Registration(
        transform=transform,
        start=start,
        matrix=_as_matrix(linear),
        affine_kept=kept,
        field=field,
        unaligned=unaligned,
        before=before,
        after=overlap(pair, transform),
        facts=field_facts(field, pair.fixed_mask) if field is not None else FieldFacts(0.0, 0.0, 0.0, 0.0),
    )


def compose(linear: sitk.Transform, field: sitk.Image) -> sitk.Transform:
    """x -> A(x + u(x)): a composite applies its last member first."""
    # The transform takes the image's buffer away from it, so it gets a copy.
    return sitk.CompositeTransform([linear, sitk.DisplacementFieldTransform(sitk.Image(field))])


def jacobian_determinant(field: sitk.Image) -> np.ndarray:
    """det of d(x + u)/dx, (D, H, W), by central differences."""
    u = sitk.GetArrayViewFromImage(field).astype(np.float64)  # (D, H, W, 3), components x y z
    x_mm, y_mm, z_mm = field.GetSpacing()
    jacobian = np.stack([np.stack(np.gradient(u[..., c], z_mm, y_mm, x_mm)[::-1], axis=-1) for c in range(3)], axis=-2)
    jacobian += np.eye(3)
    result: np.ndarray = np.linalg.det(jacobian)
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


def _guarded_affine(
    pair: WorkingPair, start: sitk.AffineTransform, before: Overlap, spec: RegistrationSpec
) -> tuple[sitk.AffineTransform, bool]:
    """The affine map if both overlap measures rise with it, else the centroid shift."""
    try:
        candidate = affine(pair, start, spec)
    except RegistrationError:
        return start, False
    found = overlap(pair, candidate)
    kept = found.dice > before.dice and found.ncc > before.ncc
    return (candidate if kept else start), kept


def _as_matrix(transform: sitk.AffineTransform) -> tuple[float, ...]:
    matrix = np.array(transform.GetMatrix()).reshape(3, 3)
    centre = np.array(transform.GetCenter())
    offset = np.array(transform.GetTranslation()) + centre - matrix @ centre
    return tuple(float(v) for v in np.column_stack([matrix, offset]).ravel())

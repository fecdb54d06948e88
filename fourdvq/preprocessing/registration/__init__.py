"""Registration of a follow-up to its baseline: centroids, a guarded affine map, then a named deformable backend.

T(x) = A(x + u(x)) maps baseline points to follow-up points in LPS mm; u lives on the working grid. A new backend is one
function and one line in `backends.BACKENDS`, or an entry point of another package.
"""

from __future__ import annotations

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
    warped_mask,
    warped_share,
    working_pair,
)
from fourdvq.preprocessing.registration.backends import (
    BACKENDS,
    AlignedPair,
    Backend,
    FoundField,
    KeypointFacts,
    backend_named,
    backend_names,
)
from fourdvq.preprocessing.registration.facts import (
    Consistency,
    FieldFacts,
    consistency,
    field_facts,
    jacobian_determinant,
    surface_p95_mm,
)

__all__ = [
    "BACKENDS",
    "AlignedPair",
    "Backend",
    "Consistency",
    "FieldFacts",
    "FoundField",
    "KeypointFacts",
    "Overlap",
    "Registration",
    "backend_named",
    "backend_names",
    "compose",
    "field_facts",
    "jacobian_determinant",
    "register",
]


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
    spacing_mm: float  # of the working grid
    surface_p95_mm: float | None  # between the lungs' surfaces after it; None if a lung is empty
    facts: FieldFacts
    mind_before: float  # mean squared MIND-SSC distance in the fixed lung, under `start`
    mind_after: float
    consistency: Consistency | None  # None without a field
    keypoints: KeypointFacts | None  # None for a backend without keypoints
    gave_up: str = ""  # why the backend found nothing; the transform is then the centroid shift alone


def register(
    fixed: Volume,
    fixed_mask: np.ndarray,
    moving: Volume,
    moving_mask: np.ndarray,
    spec: RegistrationSpec,
    *,
    device: str = "cpu",
) -> Registration:
    """Align `moving` with `fixed`; masks are bool (D, H, W) on their scans' grids, `device` is torch's name of one.

    Raises RegistrationError E_REG if the lungs cannot be brought to overlap, a scan is constant, or the backend gives
    up or finds no finite field; ConfigError E_UNSUPPORTED for an unknown backend.
    """
    from fourdvq.preprocessing.registration.mind import mind_distance

    backend = backend_named(spec.backend)
    pair = working_pair(fixed, fixed_mask, moving, moving_mask, spec)
    unaligned = overlap(pair, sitk.Transform())
    start = centroid_shift(pair)
    before = overlap(pair, start)
    if before.dice <= 0.1 and (backend.affine or backend.field):
        raise RegistrationError("E_REG", where="the centroid step", found=f"Dice {before.dice:.2f}")
    mind_before = mind_distance(pair.fixed, warped(pair, start), pair.fixed_mask, device)
    linear, kept = _guarded_affine(pair, start, before, spec) if backend.affine else (start, False)
    found, facts, undone = _deformed(pair, linear, backend, spec, device)
    transform = linear if found is None else compose(linear, found.u)
    return Registration(
        transform=transform,
        start=start,
        matrix=_as_matrix(linear),
        affine_kept=kept,
        field=found.u if found else None,
        unaligned=unaligned,
        before=before,
        after=overlap(pair, transform),
        spacing_mm=spec.spacing_mm,
        surface_p95_mm=surface_p95_mm(pair.fixed_mask, warped_mask(pair, transform), pair.grid.spacing),
        facts=facts,
        mind_before=mind_before,
        mind_after=mind_distance(pair.fixed, warped(pair, transform), pair.fixed_mask, device),
        consistency=undone,
        keypoints=found.keypoints if found else None,
    )


def compose(linear: sitk.Transform, field: sitk.Image) -> sitk.Transform:
    """x -> A(x + u(x)): a composite applies its last member first."""
    # The transform takes the image's buffer away from it, so it gets a copy.
    return sitk.CompositeTransform([linear, sitk.DisplacementFieldTransform(sitk.Image(field))])


def _deformed(
    pair: WorkingPair, linear: sitk.Transform, backend: Backend, spec: RegistrationSpec, device: str
) -> tuple[FoundField | None, FieldFacts, Consistency | None]:
    """The field after the linear map, its facts, and how well the same backend with the roles exchanged undoes it."""
    if backend.field is None:
        return None, FieldFacts(0.0, 0.0, 0.0, 0.0), None
    aligned = AlignedPair(pair.grid, pair.fixed, pair.fixed_share, warped(pair, linear), warped_share(pair, linear))
    found = backend.field(aligned, spec, device)
    facts = field_facts(found.u, pair.fixed_mask)
    back = backend.field(aligned.exchanged(), spec, device)
    return found, facts, consistency(found.u, back.u, pair.fixed_mask)


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

"""The geometry gate of a series: in order along the normal, one slice a place, evenly spaced, straight or sheared.

Nothing here looks at more of the pixels than whether two slices at one place are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fourdvq.data.dicom_file import SliceHeader
from fourdvq.data.limits import shown
from fourdvq.data.parts import direction_of
from fourdvq.data.pixels import slice_hu
from fourdvq.errors import VolumeError

SPACING_TOLERANCE = 0.01  # of the spacing: how far a slice may lie from its place on an even lattice
ROUNDED_MM = 0.065  # and at least so far: positions are written with one decimal or two
SAME_POSITION_MM = 1e-3
MAX_TILT_DEGREES = 0.5
MAX_FILLED_SPACING_MM = 2.0  # a gap in a thin series may be bridged
DRIFT_TOLERANCE_MM = 0.1  # from the straight line of a tilted stack


@dataclass(frozen=True)
class SliceStack:
    """Slices in order along their normal; `positions` in mm along it; `gap` the index a slice is missing before.

    `drift` is how far (x, y, z mm) slices shift sideways per mm along the normal; None if the gantry stood straight.
    """

    slices: tuple[SliceHeader, ...]
    normal: np.ndarray
    positions: np.ndarray
    spacing: float
    gap: int | None = None
    drift: np.ndarray | None = None
    doubled: int = 0  # slices left out because an identical one is there


def build_stack(slices: Sequence[SliceHeader], where: str, *, fill_gap: bool, shear_tilt: bool) -> SliceStack:
    """The stack of a series whose slices all have their geometry.

    Raises VolumeError E_GEOMETRY, E_STACKS (a multi-frame file), E_DUP, E_FOV (under 3 slices), E_SPACING, E_GAP,
    E_MIXED (slices shifted against each other) and E_TILT.
    """
    normal = direction_of(slices[0])
    if not normal.any():
        raise VolumeError("E_GEOMETRY", where=where, found="row and column directions that coincide")
    if slices[0].frame is not None:
        _check_one_stack(slices, normal, where)
    kept = _without_doubles(slices, normal, where)
    positions = np.array([_along(s, normal) for s in kept])
    stack = SliceStack(tuple(kept), normal, positions, 0.0, doubled=len(slices) - len(kept))
    stack = _with_spacing(stack, where, fill_gap=fill_gap)
    return replace(stack, drift=_drift_per_mm(stack, where, shear_tilt=shear_tilt))


def _check_one_stack(frames: Sequence[SliceHeader], normal: np.ndarray, where: str) -> None:
    """An enhanced file may hold several volumes: by name, by direction, or one after the other at the same places."""
    names = {f.stack for f in frames}
    directions = {tuple(round(v, 3) + 0.0 for v in f.orientation or ()) for f in frames}
    places = sorted(_along(f, normal) for f in frames)
    doubled = sum(b - a <= SAME_POSITION_MM for a, b in itertools.pairwise(places))
    if len(names) > 1 or len(directions) > 1 or doubled >= len(frames) // 2 > 0:
        counted = max(len(names), len(directions), 2)
        raise VolumeError("E_STACKS", where=where, found=f"{counted} stacks or more in {len(frames)} frames")


def _without_doubles(slices: Sequence[SliceHeader], normal: np.ndarray, where: str) -> list[SliceHeader]:
    """One image per position; equal pixels at one position are one slice, different pixels are refused."""
    kept: list[SliceHeader] = []
    for s in sorted(slices, key=lambda s: (_along(s, normal), s.path.name)):
        if kept and abs(_along(s, normal) - _along(kept[-1], normal)) <= SAME_POSITION_MM:
            if not np.array_equal(slice_hu(s), slice_hu(kept[-1])):
                raise VolumeError("E_DUP", where=where, found=f"two different images at {_along(s, normal):.2f} mm")
        else:
            kept.append(s)
    return kept


def _with_spacing(stack: SliceStack, where: str, *, fill_gap: bool) -> SliceStack:
    """Even spacing, or one isolated missing slice in a thin series, which is marked to be filled.

    Steps alone do not tell: rounded positions make them uneven, and many that are slightly long add up.
    """
    if len(stack.slices) < 3:
        raise VolumeError("E_FOV", where=where, found=f"{len(stack.slices)} slices")
    steps = np.diff(stack.positions)
    single = float(steps[steps < 1.5 * np.median(steps)].mean())
    slices = np.rint(steps / single)
    off = _off_lattice(stack.positions, np.concatenate([[0.0], np.cumsum(slices)]))
    if (slices < 1).any() or off > max(ROUNDED_MM, SPACING_TOLERANCE * single):
        found = f"steps from {steps.min():.3f} to {steps.max():.3f} mm, slices up to {off:.3f} mm from an even place"
        raise VolumeError("E_SPACING", where=where, found=found)
    missing = int((slices - 1).sum())
    if missing > 1 or (missing and (not fill_gap or single > MAX_FILLED_SPACING_MM)):
        raise VolumeError("E_GAP", where=where, found=f"{missing} missing of {len(stack.slices) + missing} slices")
    even = float(stack.positions[-1] - stack.positions[0]) / (len(stack.slices) - 1 + missing)
    return replace(stack, spacing=even, gap=int(slices.argmax()) + 1 if missing else None)


def _off_lattice(positions: np.ndarray, numbers: np.ndarray) -> float:
    """How far a position lies from the line through all of them by their slice numbers, at most, in mm."""
    line = np.polynomial.Polynomial.fit(numbers, positions, 1)
    return float(np.abs(positions - line(numbers)).max())


def _drift_per_mm(stack: SliceStack, where: str, *, shear_tilt: bool) -> np.ndarray | None:
    start = np.array(stack.slices[0].position)
    offsets = np.array([s.position for s in stack.slices]) - start
    along = stack.positions - stack.positions[0]
    sideways = offsets - along[:, None] * stack.normal
    drift = along @ sideways / (along @ along)
    apart = np.linalg.norm(sideways - along[:, None] * drift, axis=1)
    if float(apart.max()) > DRIFT_TOLERANCE_MM:
        odd = stack.slices[int(apart.argmax())].path
        found = f"slices that are shifted by {apart.max():.2f} mm against each other"
        raise VolumeError("E_MIXED", where=shown(odd), found=found)
    tilt = float(np.degrees(np.arctan(np.linalg.norm(drift))))
    if tilt <= MAX_TILT_DEGREES:
        return None
    if not shear_tilt:
        raise VolumeError("E_TILT", where=where, found=f"{tilt:.1f} degrees")
    return np.asarray(drift)


def _along(s: SliceHeader, normal: np.ndarray) -> float:
    return float(np.array(s.position) @ normal)

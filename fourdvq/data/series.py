"""The gate for a DICOM series: sorted, complete, straight and in Hounsfield units, or refused with a code.

pydicom reads headers and geometry, SimpleITK the pixels, one file at a time in the order found here. GDCM's own
ordering is never used: it takes a missing slice for wider spacing and drops a damaged file without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from scipy import ndimage

from fourdvq.data.dicom import SeriesCandidate, SliceHeader, scan_folder
from fourdvq.data.volume import HU_MAX, HU_MIN, Volume, VolumeLimits, from_image, to_image
from fourdvq.errors import VolumeError

SPACING_TOLERANCE = 0.01  # of the spacing
SAME_POSITION_MM = 1e-3
MAX_TILT_DEGREES = 0.5
MAX_FILLED_SPACING_MM = 2.0  # a gap in a thin series may be bridged
DRIFT_TOLERANCE_MM = 0.5  # from the straight line of a tilted stack
SLICE_JUMP_HU = 300.0  # median difference to both neighbours: one slice with another rescale
PIXEL_RANGE_MM = (0.38, 0.98)  # paper section 3
EXPIRATION = ("exp", "espir", "uitadem", "ausatm", "exspir")  # also expiratie, expiratoire, expiration
INSPIRATION = ("insp", "inadem", "einatm")
SHARP_KERNELS = ("B6", "B7", "B8", "BR6", "BR7", "BONE", "EDGE", "LUNG", "FC5", "YC", "YD")
# Uncompressed, deflated, RLE, JPEG baseline to lossless, JPEG-LS, JPEG 2000 and HTJ2K: read by SimpleITK 2.5.
_SYNTAXES = frozenset(
    "1.2.840.10008.1.2" + tail
    for tail in (
        "", ".1", ".1.99", ".2", ".5", ".4.50", ".4.51", ".4.57", ".4.70", ".4.80", ".4.81", ".4.90", ".4.91",
        ".4.201", ".4.202", ".4.203",
    )
)  # fmt: skip


@dataclass(frozen=True)
class SeriesLimits:
    """What may be repaired instead of refused, and how large a series may be."""

    fill_single_gap: bool = True
    shear_tilt: bool = True
    max_voxels: int = VolumeLimits().max_voxels


@dataclass(frozen=True)
class LoadedSeries:
    """HU int16 in LPS, W_ codes of what was repaired or is unusual, and the slice thickness in mm."""

    volume: Volume
    warnings: tuple[str, ...]
    thickness_mm: float


@dataclass(frozen=True)
class _Stack:
    """Slices in order along their normal; `positions` in mm along it; `gap` the index a slice is missing before."""

    slices: tuple[SliceHeader, ...]
    normal: np.ndarray
    positions: np.ndarray
    spacing: float
    gap: int | None = None


def read_series(candidate: SeriesCandidate) -> Volume:
    """The volume of a series through the gate, with the default limits. Raises VolumeError as `load_series` does."""
    return load_series(candidate).volume


def load_series(candidate: SeriesCandidate, limits: SeriesLimits | None = None) -> LoadedSeries:
    """Read a series of single-frame CT images.

    Raises VolumeError E_BURNED, E_GEOMETRY, E_RESCALE, E_SYNTAX, E_UNSUPPORTED (a multi-frame file), E_BOMB, E_DUP,
    E_GAP, E_SPACING, E_TILT, E_MIXED, E_CORRUPT and E_HU.
    """
    limits = limits or SeriesLimits()
    where = str(candidate.first.path.parent)
    _check_headers(candidate.slices, limits, where)
    slices, doubled = _without_doubles(candidate.slices, where)
    stack = _with_spacing(_sorted(slices), limits, where)
    drift = _drift_per_mm(stack, limits, where)
    hu = np.stack([_pixels(s) for s in stack.slices])
    _check_hounsfield(hu, where)
    if stack.gap is not None:
        hu = np.insert(hu, stack.gap, (hu[stack.gap - 1] + hu[stack.gap]) / 2, axis=0)
    if drift is not None:
        hu = _unsheared(hu, drift, stack)
    volume = _volume(hu, stack)
    warnings = [*candidate.warnings, *doubled, *_warnings(stack, drift)]
    thickness = max(stack.spacing, *(s.thickness or 0.0 for s in stack.slices))
    return LoadedSeries(volume, tuple(dict.fromkeys(warnings)), thickness)


def best_series(folder: Path, *, study_key: str = "") -> SeriesCandidate:
    """The series of a folder (of one study, if named) to use.

    Raises VolumeError E_CORRUPT for a file that cannot be read, and E_NOTCT, E_DERIVED, E_ARCHIVE or E_EMPTY if there
    is no series, by what was there instead.
    """
    found = scan_folder(folder)
    candidates = [c for c in found.candidates if not study_key or c.study_key == study_key]
    if found.unreadable:
        # A damaged header does not say which series it belongs to; leaving it out could lose a slice.
        raise VolumeError(
            "E_CORRUPT", where=str(found.unreadable[0]), found=f"{len(found.unreadable)} unreadable files"
        )
    if not candidates:
        code = next((c for c in ("E_NOTCT", "E_DERIVED", "E_ARCHIVE") if found.skipped[c]), "E_EMPTY")
        raise VolumeError(code, where=str(folder), found=f"{sum(found.skipped.values())} other files")
    return max(candidates, key=series_score)


def series_score(candidate: SeriesCandidate) -> tuple[bool | int | str, ...]:
    """Orders candidates: thin, not expiratory, inspiratory, soft kernel, no contrast, most slices."""
    head, text = candidate.first, candidate.first.description.lower()
    thickness = head.thickness if head.thickness is not None else 99.0
    return (
        head.has_geometry,
        thickness <= 1.5,
        thickness <= 2.5,
        not any(word in text for word in EXPIRATION),
        any(word in text for word in INSPIRATION),
        not head.kernel.upper().startswith(SHARP_KERNELS),
        not head.contrast,
        len(candidate.slices),
        head.series,
    )


def _check_headers(slices: Sequence[SliceHeader], limits: SeriesLimits, where: str) -> None:
    for s in slices:
        if s.burned_in:
            raise VolumeError("E_BURNED", where=str(s.path), found="BurnedInAnnotation YES")
        if s.frames > 1:
            raise VolumeError("E_UNSUPPORTED", where=str(s.path), found=f"{s.frames} frames in one file")
        if not s.has_geometry:
            raise VolumeError("E_GEOMETRY", where=str(s.path), found="no position, orientation or pixel spacing")
        if s.slope is None or s.intercept is None:
            raise VolumeError("E_RESCALE", where=str(s.path), found="no RescaleSlope or RescaleIntercept")
        if s.transfer_syntax and s.transfer_syntax not in _SYNTAXES:
            raise VolumeError("E_SYNTAX", where=str(s.path), found=s.transfer_syntax)
    voxels = len(slices) * slices[0].rows * slices[0].columns
    if voxels > limits.max_voxels:
        raise VolumeError("E_BOMB", where=where, found=f"{voxels} voxels", wanted=f"at most {limits.max_voxels}")


def _without_doubles(slices: Sequence[SliceHeader], where: str) -> tuple[list[SliceHeader], list[str]]:
    """One file per position; equal pixels at one position are one slice, different pixels are refused."""
    kept: list[SliceHeader] = []
    warnings: list[str] = []
    for s in sorted(slices, key=lambda s: (_along(s), s.path.name)):
        if kept and abs(_along(s) - _along(kept[-1])) <= SAME_POSITION_MM:
            if _pixel_hash(s) != _pixel_hash(kept[-1]):
                raise VolumeError("E_DUP", where=where, found=f"two different images at {_along(s):.2f} mm")
            warnings.append("W_DUP")
        else:
            kept.append(s)
    return kept, warnings


def _sorted(slices: Sequence[SliceHeader]) -> _Stack:
    ordered = sorted(slices, key=_along)
    positions = np.array([_along(s) for s in ordered])
    spacing = float(np.median(np.diff(positions))) if len(ordered) > 1 else 0.0
    return _Stack(tuple(ordered), _normal(ordered[0]), positions, spacing)


def _with_spacing(stack: _Stack, limits: SeriesLimits, where: str) -> _Stack:
    """Even spacing, or one isolated missing slice in a thin series, which is marked to be filled."""
    if len(stack.slices) < 3:
        raise VolumeError("E_FOV", where=where, found=f"{len(stack.slices)} slices")
    steps = np.diff(stack.positions) / stack.spacing
    uneven = np.flatnonzero(np.abs(steps - 1.0) > SPACING_TOLERANCE)
    if uneven.size == 0:
        even = float(stack.positions[-1] - stack.positions[0]) / (len(stack.slices) - 1)
        return replace(stack, spacing=even)
    whole = np.rint(steps[uneven])
    if (whole < 2).any() or (np.abs(steps[uneven] - whole) > SPACING_TOLERANCE * whole).any():
        found = f"steps from {steps.min() * stack.spacing:.3f} to {steps.max() * stack.spacing:.3f} mm"
        raise VolumeError("E_SPACING", where=where, found=found)
    missing = int((whole - 1).sum())
    if missing > 1 or not limits.fill_single_gap or stack.spacing > MAX_FILLED_SPACING_MM:
        raise VolumeError("E_GAP", where=where, found=f"{missing} missing of {len(stack.slices) + missing} slices")
    return replace(stack, gap=int(uneven[0]) + 1)


def _drift_per_mm(stack: _Stack, limits: SeriesLimits, where: str) -> np.ndarray | None:
    """How far (x, y, z mm) slices shift sideways per mm along their normal; None if the gantry stood straight."""
    start = np.array(stack.slices[0].position)
    offsets = np.array([np.array(s.position) - start for s in stack.slices])
    along = stack.positions - stack.positions[0]
    sideways = offsets - along[:, None] * stack.normal
    drift = along @ sideways / (along @ along)
    if float(np.abs(sideways - along[:, None] * drift).max()) > DRIFT_TOLERANCE_MM:
        raise VolumeError("E_MIXED", where=where, found="slices that are shifted against each other")
    tilt = float(np.degrees(np.arctan(np.linalg.norm(drift))))
    if tilt <= MAX_TILT_DEGREES:
        return None
    if not limits.shear_tilt:
        raise VolumeError("E_TILT", where=where, found=f"{tilt:.1f} degrees")
    return np.asarray(drift)


def _pixels(s: SliceHeader) -> np.ndarray:
    """HU float32 (rows, columns) of one file, with that file's own slope and intercept."""
    try:
        if not s.transfer_syntax:
            return _pixels_without_preamble(s)
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(s.path), sitk.sitkFloat32))
    except (RuntimeError, ValueError, AttributeError, NotImplementedError):
        raise VolumeError("E_CORRUPT", where=str(s.path), found="pixels that cannot be decoded") from None
    if values.size != s.rows * s.columns:
        raise VolumeError("E_CORRUPT", where=str(s.path), found=f"{values.size} of {s.rows * s.columns} pixels")
    result: np.ndarray = values.reshape(s.rows, s.columns)
    return result


def _pixels_without_preamble(s: SliceHeader) -> np.ndarray:
    data = pydicom.dcmread(s.path, force=True)
    syntax = ImplicitVRLittleEndian if data.original_encoding[0] else ExplicitVRLittleEndian
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    result: np.ndarray = data.pixel_array.astype(np.float32) * (s.slope or 1.0) + (s.intercept or 0.0)
    return result


def _check_hounsfield(hu: np.ndarray, where: str) -> None:
    low = float(hu.min())
    if low >= VolumeLimits().air_below_hu:
        raise VolumeError("E_HU", where=where, found=f"smallest value {low:g}", wanted="air below -900 HU")
    # Voxel by voxel, because the median of a slice itself jumps where the body starts to fill half of the image.
    jumps = np.abs(np.median(np.diff(hu[:, ::2, ::2], axis=0), axis=(1, 2)))
    odd = np.flatnonzero((jumps[:-1] > SLICE_JUMP_HU) & (jumps[1:] > SLICE_JUMP_HU))
    if odd.size or jumps[0] > SLICE_JUMP_HU or jumps[-1] > SLICE_JUMP_HU:
        raise VolumeError("E_HU", where=where, found="a slice with another intensity scale than its neighbours")


def _unsheared(hu: np.ndarray, drift: np.ndarray, stack: _Stack) -> np.ndarray:
    """Shift each slice back in its plane, so that the stack stands along its normal."""
    head = stack.slices[0]
    orientation = np.array(head.orientation)
    rows_mm, columns_mm = head.pixel_spacing or (1.0, 1.0)
    per_slice = stack.spacing * np.array([drift @ orientation[3:] / rows_mm, drift @ orientation[:3] / columns_mm])
    return np.stack(
        [ndimage.shift(axial, i * per_slice, order=1, mode="constant", cval=HU_MIN) for i, axial in enumerate(hu)]
    )


def _volume(hu: np.ndarray, stack: _Stack) -> Volume:
    head = stack.slices[0]
    orientation = np.array(head.orientation)
    rows_mm, columns_mm = head.pixel_spacing or (1.0, 1.0)
    direction = np.column_stack([orientation[:3], orientation[3:], stack.normal])
    x, y, z = head.position or (0.0, 0.0, 0.0)
    clamped = np.clip(np.rint(hu), HU_MIN, HU_MAX).astype(np.int16)
    raw = Volume(clamped, (stack.spacing, rows_mm, columns_mm), (x, y, z), tuple(float(d) for d in direction.ravel()))
    return from_image(sitk.DICOMOrient(to_image(raw), "LPS"))


def _warnings(stack: _Stack, drift: np.ndarray | None) -> list[str]:
    head = stack.slices[0]
    low, high = PIXEL_RANGE_MM
    found = {
        "W_FILLED": stack.gap is not None,
        "W_TILT": drift is not None,
        "W_PIXEL": not all(low <= mm <= high for mm in head.pixel_spacing or ()),
        "W_CONTRAST": head.contrast,
        "W_PRONE": head.patient_position.endswith("P"),
    }
    return [code for code, holds in found.items() if holds]


def _normal(s: SliceHeader) -> np.ndarray:
    orientation = np.array(s.orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    length = float(np.linalg.norm(normal))
    if length < 0.5:
        raise VolumeError("E_GEOMETRY", where=str(s.path), found="row and column directions that coincide")
    return np.asarray(normal / length)


def _along(s: SliceHeader) -> float:
    return float(np.array(s.position) @ _normal(s))


def _pixel_hash(s: SliceHeader) -> str:
    return hashlib.sha256(_pixels(s).tobytes()).hexdigest()

"""The gate for a DICOM series: sorted, complete, straight and in Hounsfield units, or refused with a code.

pydicom reads headers and geometry; the order is the one found here. GDCM's own ordering is never used: it takes a
missing slice for wider spacing and drops a damaged file without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from fourdvq.data.burnt_text import has_burnt_text
from fourdvq.data.dicom import SeriesCandidate
from fourdvq.data.dicom_file import SliceHeader
from fourdvq.data.limits import HU_MAX, HU_MIN, ReaderLimits, shown
from fourdvq.data.pixels import is_compressed, raw_image, stack_hu, to_hu
from fourdvq.data.slice_faults import check_header
from fourdvq.data.stack import SliceStack, build_stack
from fourdvq.data.technical import TechnicalTags, is_expiratory, technical_tags
from fourdvq.data.volume import Volume, VolumeLimits, from_image, to_image
from fourdvq.errors import VolumeError

SLICE_JUMP_HU = 300.0  # median difference to both neighbours: one slice with another rescale
ODD_SCALES = 2  # so few slices with a scale of their own must show that they need it
CLEARLY_APART = 2.0  # neighbours that differ so many times as much with their own scales as with one for both
PIXEL_RANGE_MM = (0.38, 0.98)  # paper section 3


@dataclass(frozen=True)
class SeriesLimits:
    """What may be repaired instead of refused, and how large a series may be."""

    fill_single_gap: bool = True
    shear_tilt: bool = True
    readers: ReaderLimits = field(default_factory=ReaderLimits)


@dataclass(frozen=True)
class LoadedSeries:
    """HU int16 in LPS, W_ and V_ codes of what was repaired or is unusual, and the slice thickness in mm."""

    volume: Volume
    warnings: tuple[str, ...]
    thickness_mm: float
    technical: TechnicalTags


def read_series(candidate: SeriesCandidate) -> Volume:
    """The volume of a series through the gate, with the default limits. Raises VolumeError as `load_series` does."""
    return load_series(candidate).volume


def load_series(candidate: SeriesCandidate, limits: SeriesLimits | None = None) -> LoadedSeries:
    """Read a series of CT images, one file a slice or one enhanced multi-frame file.

    Raises VolumeError E_MIXED (also for a stray slice), E_IDENTITY, E_DATE, E_BURNED, E_UNSUPPORTED (a multi-frame
    file without functional groups), E_GEOMETRY, E_RESCALE, E_SYNTAX, E_BOMB, E_STACKS, E_DUP, E_GAP, E_SPACING, E_TILT,
    E_FOV (under 3 slices), E_CORRUPT and E_HU.
    """
    limits = limits or SeriesLimits()
    where = shown(candidate.first.path.parent)
    _check_whole(candidate)
    _check_headers(candidate.slices, limits.readers, where)
    stack = build_stack(candidate.slices, where, fill_gap=limits.fill_single_gap, shear_tilt=limits.shear_tilt)
    limits.readers.check_spacing((stack.spacing, *(candidate.first.pixel_spacing or ())), where)
    if stack.gap is not None and "W_SPLIT" in candidate.warnings:
        # The missing slice may be among the parts that were split off: what is there is not bridged over.
        raise VolumeError("E_GAP", where=where, found="a slice is missing from a series that mixes geometries")
    hu = stack_hu(stack.slices)
    _check_hounsfield(hu, where)
    _check_scales(stack, hu)
    if has_burnt_text(hu):
        raise VolumeError("E_BURNED", where=where, found="letters in a corner of the image")
    volume = _volume(_repaired(hu, stack), stack)
    warnings = [*candidate.warnings, *_warnings(stack)]
    thickness = max(stack.spacing, *(s.thickness or 0.0 for s in stack.slices))
    technical = technical_tags(candidate.first)
    return LoadedSeries(volume, tuple(dict.fromkeys(warnings)), thickness, technical)


def _check_whole(candidate: SeriesCandidate) -> None:
    """All slices are there and of one person and day."""
    if candidate.strays:
        found = "an image that lies where this series lacks a slice, but does not belong to it by its header"
        raise VolumeError("E_MIXED", where=shown(candidate.strays[0].path), found=found)
    for code, what in (("E_IDENTITY", "patients"), ("E_DATE", "study dates")):
        values: Counter[tuple[str, ...]] = Counter(_person_or_day(s, code) for s in candidate.slices)
        if len(values) > 1:
            odd = min(values, key=lambda v: values[v])
            path = next(s.path for s in candidate.slices if _person_or_day(s, code) == odd)
            raise VolumeError(code, where=shown(path), found=f"{len(values)} {what} in one series")


def _person_or_day(s: SliceHeader, code: str) -> tuple[str, ...]:
    return (s.patient_id, s.birth_date, s.sex) if code == "E_IDENTITY" else (s.study_date,)


def _check_headers(slices: Sequence[SliceHeader], readers: ReaderLimits, where: str) -> None:
    for s in slices:
        check_header(s)
    head = slices[0]
    readers.check_size(len(slices) * head.rows * head.columns, 4, where)


def _check_hounsfield(hu: np.ndarray, where: str) -> None:
    low = float(hu.min())
    if low >= VolumeLimits().air_below_hu:
        raise VolumeError("E_HU", where=where, found=f"smallest value {low:g}", wanted="air below -900 HU")
    # Voxel by voxel, because the median of a slice itself jumps where the body starts to fill half of the image.
    step = max(2, hu.shape[1] // 128)
    some = hu[:, ::step, ::step].astype(np.float32)
    jumps = np.abs(np.median(np.diff(some, axis=0), axis=(1, 2)))
    odd = np.flatnonzero((jumps[:-1] > SLICE_JUMP_HU) & (jumps[1:] > SLICE_JUMP_HU))
    if odd.size or jumps[0] > SLICE_JUMP_HU or jumps[-1] > SLICE_JUMP_HU:
        raise VolumeError("E_HU", where=where, found="a slice with another intensity scale than its neighbours")


def _check_scales(stack: SliceStack, hu: np.ndarray) -> None:
    """Scales that change within a series must be borne out by the pixels.

    A damaged RescaleSlope or RescaleIntercept is a number like any other; the pixels alone can tell.
    """
    counts = Counter(_scale(s) for s in stack.slices)
    if len(counts) == 1:
        return
    _check_rare_scales(stack.slices, hu, counts)
    _check_changes(stack.slices, hu, counts)


def _check_rare_scales(slices: Sequence[SliceHeader], hu: np.ndarray, counts: Counter[tuple[float, float]]) -> None:
    """A slice with a scale that hardly any other has must look more like its neighbours with it than with theirs."""
    usual = [scale for scale, count in counts.items() if count > ODD_SCALES]
    for i, s in enumerate(slices if usual else ()):
        if _scale(s) in usual:
            continue
        beside = np.mean([hu[k] for k in (i - 1, i + 1) if 0 <= k < len(hu)], axis=0)
        own = float(np.abs(hu[i] - beside).mean())
        if own > 0.5 * min(float(np.abs(_rescaled(s, scale, hu[i]) - beside).mean()) for scale in usual):
            raise _not_borne_out(s)


def _check_changes(slices: Sequence[SliceHeader], hu: np.ndarray, counts: Counter[tuple[float, float]]) -> None:
    """Where the scale changes the HU must go on: a block of slices with a wrong scale is at odds at its ends alone."""
    step = max(1, hu.shape[1] // 128)
    for i in range(1, len(slices)):
        before, after = slices[i - 1], slices[i]
        if _scale(before) == _scale(after):
            continue
        across = hu[i, ::step, ::step].astype(np.float32) - hu[i - 1, ::step, ::step]
        if abs(float(np.median(across))) > SLICE_JUMP_HU or _goes_on_better(before, after, hu[i - 1 : i + 1], step):
            raise _not_borne_out(min((after, before), key=lambda s: counts[_scale(s)]))


def _goes_on_better(before: SliceHeader, after: SliceHeader, hu: np.ndarray, step: int) -> bool:
    """Whether two slices, HU (2, rows, columns), differ by less than half as much with one scale for both.

    Of the mean over every `step`th pixel: where much of an image is air, a wrong slope leaves the median as it is.
    """
    alike = _rescaled(after, _scale(before), hu[1])
    some = np.s_[::step, ::step]
    own, shared = (float(np.abs(image[some].astype(np.float32) - hu[0][some]).mean()) for image in (hu[1], alike))
    return own > CLEARLY_APART * shared


def _not_borne_out(s: SliceHeader) -> VolumeError:
    found = f"slope {s.slope:g} and intercept {s.intercept:g}, which the pixels do not bear out"
    return VolumeError("E_RESCALE", where=shown(s.path), found=found, wanted="the scale of the other slices")


def _scale(s: SliceHeader) -> tuple[float, float]:
    return s.slope or 1.0, s.intercept or 0.0


def _rescaled(s: SliceHeader, scale: tuple[float, float], hu: np.ndarray) -> np.ndarray:
    """The slice with another scale than its own; of one that is compressed, from its HU."""
    if not is_compressed(s):
        return to_hu(raw_image(s), s, scale)
    slope, intercept = _scale(s)
    raw = (hu.astype(np.float64) - intercept) / slope
    return np.asarray(np.clip(np.rint(raw * scale[0] + scale[1]), HU_MIN, HU_MAX))


def _repaired(hu: np.ndarray, stack: SliceStack) -> np.ndarray:
    """With the missing slice filled in, and each slice shifted back in its plane."""
    if stack.gap is not None:
        between = (hu[stack.gap - 1].astype(np.float32) + hu[stack.gap]) / 2
        hu = np.insert(hu, stack.gap, np.rint(between).astype(np.int16), axis=0)
    if stack.drift is None:
        return hu
    head = stack.slices[0]
    orientation = np.array(head.orientation)
    rows_mm, columns_mm = head.pixel_spacing or (1.0, 1.0)
    drift = stack.drift
    per_slice = stack.spacing * np.array([drift @ orientation[3:] / rows_mm, drift @ orientation[:3] / columns_mm])
    for i, axial in enumerate(hu):
        shifted = ndimage.shift(axial.astype(np.float32), i * per_slice, order=1, mode="constant", cval=HU_MIN)
        hu[i] = np.rint(shifted)
    return hu


def _volume(hu: np.ndarray, stack: SliceStack) -> Volume:
    head = stack.slices[0]
    orientation = np.array(head.orientation)
    rows_mm, columns_mm = head.pixel_spacing or (1.0, 1.0)
    direction = np.column_stack([orientation[:3], orientation[3:], stack.normal])
    x, y, z = head.position or (0.0, 0.0, 0.0)
    raw = Volume(hu, (stack.spacing, rows_mm, columns_mm), (x, y, z), tuple(float(d) for d in direction.ravel()))
    if np.allclose(direction, np.eye(3), atol=1e-6):
        return raw
    return from_image(sitk.DICOMOrient(to_image(raw), "LPS"))


def _warnings(stack: SliceStack) -> list[str]:
    head = stack.slices[0]
    low, high = PIXEL_RANGE_MM
    found = {
        "V_EXPIR": is_expiratory(head),
        "W_DUP": stack.doubled > 0,
        "W_FILLED": stack.gap is not None,
        "W_TILT": stack.drift is not None,
        "W_PIXEL": not all(low <= mm <= high for mm in head.pixel_spacing or ()),
        "W_CONTRAST": head.contrast,
        "W_LOSSY": any(s.lossy for s in stack.slices),
        "W_PRONE": head.patient_position.endswith("P"),
    }
    return [code for code, holds in found.items() if holds]

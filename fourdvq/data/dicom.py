"""DICOM headers: which files of a folder are CT slices, and which of them belong together. Pixels are not read here.

Everything read from a header stays in memory at the site; what may be written on is decided in `series.py` and in the
preparation, by a whitelist. Source of the tag names and meanings: DICOM PS3.3, CT image module and image plane module.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError

from fourdvq.data.volume import ARCHIVE_SUFFIXES
from fourdvq.errors import VolumeError

ORIENTATION_TOLERANCE = 1e-4
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_TAGS = [
    "SOPClassUID", "Modality", "ImageType", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID",
    "PatientBirthDate", "PatientSex", "StudyDate", "Rows", "Columns", "PixelSpacing", "ImagePositionPatient",
    "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept", "AcquisitionNumber", "ConvolutionKernel",
    "SeriesDescription", "ProtocolName", "SliceThickness", "BurnedInAnnotation", "ContrastBolusAgent",
    "PatientPosition", "NumberOfFrames",
]  # fmt: skip
# pydicom logs header values with its warnings; a log may hold no patient's value.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class SliceHeader:
    """What one file's header says; None where a tag is absent or not a number."""

    path: Path
    modality: str
    image_type: tuple[str, ...]
    sop_class: str
    transfer_syntax: str  # empty if the file has no preamble and so does not say
    study: str
    series: str
    frame_of_reference: str
    patient_id: str
    birth_date: str
    sex: str
    study_date: str
    rows: int
    columns: int
    pixel_spacing: tuple[float, ...] | None  # between rows, between columns, in mm
    position: tuple[float, ...] | None  # LPS mm of the first pixel's centre
    orientation: tuple[float, ...] | None  # direction of a row, direction of a column
    slope: float | None
    intercept: float | None
    acquisition: str
    kernel: str
    description: str
    thickness: float | None
    burned_in: bool
    contrast: bool
    patient_position: str
    frames: int

    @property
    def has_geometry(self) -> bool:
        """Whether position, orientation and pixel spacing are all there."""
        return None not in (self.position, self.orientation, self.pixel_spacing)


@dataclass(frozen=True)
class SeriesCandidate:
    """Files that form one volume, as far as headers tell; `warnings` are W_ codes."""

    slices: tuple[SliceHeader, ...]
    warnings: tuple[str, ...] = ()

    @property
    def first(self) -> SliceHeader:
        """Any slice stands for what is equal in all of them."""
        return self.slices[0]

    @property
    def study_key(self) -> str:
        """An opaque name of the study: a hash, because the UID itself may not be passed on."""
        return hashlib.sha256(self.first.study.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class FolderScan:
    """Candidates of a folder, and how many files were left out for which reason."""

    candidates: tuple[SeriesCandidate, ...]
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: tuple[Path, ...] = ()


def find_series(folder: Path) -> list[SeriesCandidate]:
    """The CT series in a folder, in any nesting, from headers alone. See `scan_folder` for what was left out."""
    return list(scan_folder(folder).candidates)


def scan_folder(folder: Path) -> FolderScan:
    """Read the headers of all files below `folder` and group the CT slices into series.

    Counted as skipped: E_NOTCT (another modality), E_DERIVED (localizer, secondary capture, reformat), E_CORRUPT (an
    unreadable file), E_ARCHIVE, and "other" (not DICOM). Raises VolumeError E_FOLDER if the folder is missing.
    """
    if not folder.is_dir():
        raise VolumeError("E_FOLDER", where=str(folder))
    kept: list[SliceHeader] = []
    skipped: Counter[str] = Counter()
    unreadable = []
    for path in walk_files(folder):
        reason = _why_skipped(path, kept)
        if reason:
            skipped[reason] += 1
        if reason == "E_CORRUPT":
            unreadable.append(path)
    return FolderScan(tuple(group_slices(kept)), skipped, tuple(unreadable))


def walk_files(folder: Path) -> Iterator[Path]:
    """Files below a folder, sorted; a link that leads back to a folder already seen is not followed."""
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        for name in sorted(files):
            if not name.startswith(".") and name.upper() != "DICOMDIR":
                yield Path(root) / name


def read_header(path: Path) -> SliceHeader | None:
    """The header of a file, or None if it is not DICOM. Raises VolumeError E_CORRUPT if it is, but cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's warnings quote header values
            data = _read_tags(path)
            if data.get("SOPClassUID") and data.get("Modality"):
                return _header(path, data)
        found = "a header that ends early"
    except Exception as error:  # a damaged header fails in many ways inside pydicom; all mean the same here
        found = type(error).__name__
    if _has_preamble(path):
        raise VolumeError("E_CORRUPT", where=str(path), found=found)
    return None


def group_slices(slices: Iterable[SliceHeader]) -> list[SeriesCandidate]:
    """Slices that can form one volume, together; a series that mixes geometries is split, with W_SPLIT.

    A series in which any slice lacks its geometry is not split: it must be refused as a whole, not lose that slice.
    """
    by_series: dict[tuple[str, str], list[SliceHeader]] = {}
    for s in slices:
        by_series.setdefault((s.study, s.series), []).append(s)
    result: list[SeriesCandidate] = []
    for members in by_series.values():
        groups = [members] if not all(s.has_geometry for s in members) else _split(members)
        warnings = ("W_SPLIT",) if len(groups) > 1 else ()
        result += [SeriesCandidate(tuple(group), warnings) for group in groups]
    return result


def _split(members: list[SliceHeader]) -> list[list[SliceHeader]]:
    groups: dict[tuple[Any, ...], list[list[SliceHeader]]] = {}
    for s in members:
        key = (s.frame_of_reference, s.rows, s.columns, s.pixel_spacing, s.acquisition, s.kernel)
        for group in groups.setdefault(key, []):
            if _same_direction(group[0], s):
                group.append(s)
                break
        else:
            groups[key].append([s])
    return [group for alike in groups.values() for group in alike]


def _same_direction(a: SliceHeader, b: SliceHeader) -> bool:
    pairs = zip(a.orientation or (), b.orientation or (), strict=True)
    return all(abs(x - y) <= ORIENTATION_TOLERANCE for x, y in pairs)


def _why_skipped(path: Path, kept: list[SliceHeader]) -> str:
    """Empty if the file was kept."""
    if path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return "E_ARCHIVE"
    try:
        header = read_header(path)
    except (VolumeError, OSError):
        return "E_CORRUPT"
    if header is None:
        return "other"
    if header.modality != "CT":
        return "E_NOTCT"
    if _is_derived(header):
        return "E_DERIVED"
    kept.append(header)
    return ""


def _is_derived(header: SliceHeader) -> bool:
    kinds = {kind.upper() for kind in header.image_type}
    if header.sop_class == _SECONDARY_CAPTURE or kinds & {"LOCALIZER", "SECONDARY"}:
        return True
    return bool(kinds) and not kinds & {"ORIGINAL", "AXIAL"}


def _read_tags(path: Path) -> pydicom.Dataset:
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
    except InvalidDicomError:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS, force=True)


def _has_preamble(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _header(path: Path, data: pydicom.Dataset) -> SliceHeader:
    meta = getattr(data, "file_meta", None)
    spacing = _numbers(data, "PixelSpacing", 2)
    return SliceHeader(
        path=path,
        modality=_text(data, "Modality"),
        image_type=tuple(str(v) for v in _values(data, "ImageType")),
        sop_class=_text(data, "SOPClassUID"),
        transfer_syntax=str(getattr(meta, "TransferSyntaxUID", "") or ""),
        study=_text(data, "StudyInstanceUID"),
        series=_text(data, "SeriesInstanceUID"),
        frame_of_reference=_text(data, "FrameOfReferenceUID"),
        patient_id=_text(data, "PatientID"),
        birth_date=_text(data, "PatientBirthDate"),
        sex=_text(data, "PatientSex"),
        study_date=_text(data, "StudyDate"),
        rows=int(data.get("Rows") or 0),
        columns=int(data.get("Columns") or 0),
        pixel_spacing=spacing if spacing and min(spacing) > 0 else None,
        position=_numbers(data, "ImagePositionPatient", 3),
        orientation=_numbers(data, "ImageOrientationPatient", 6),
        slope=_number(data, "RescaleSlope"),
        intercept=_number(data, "RescaleIntercept"),
        acquisition=_text(data, "AcquisitionNumber"),
        kernel="/".join(str(v) for v in _values(data, "ConvolutionKernel")),
        description=f"{_text(data, 'SeriesDescription')} {_text(data, 'ProtocolName')}".strip(),
        thickness=_number(data, "SliceThickness"),
        burned_in=_text(data, "BurnedInAnnotation").upper() == "YES",
        contrast=bool(_text(data, "ContrastBolusAgent")),
        patient_position=_text(data, "PatientPosition").upper(),
        frames=int(data.get("NumberOfFrames") or 1),
    )


def _text(data: pydicom.Dataset, name: str) -> str:
    value = data.get(name)
    return "" if value is None else str(value).strip()


def _values(data: pydicom.Dataset, name: str) -> list[Any]:
    value = data.get(name)
    if value is None or isinstance(value, str):
        return [value] if value else []
    return list(value)


def _numbers(data: pydicom.Dataset, name: str, count: int) -> tuple[float, ...] | None:
    try:
        numbers = tuple(float(v) for v in _values(data, name))
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count else None


def _number(data: pydicom.Dataset, name: str) -> float | None:
    value = data.get(name)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None

"""DICOM folders: which files are CT slices, and which of them belong together. Pixels are not read here.

A file with a damaged header may not be lost without a word: what still looks like a slice of a series but stands
outside it is kept beside it as a stray, and the series is refused.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import repeat
from pathlib import Path

import numpy as np

from fourdvq.data.dicom_file import CT_CLASSES, SECONDARY_CAPTURE, SliceHeader, read_headers
from fourdvq.data.known_headers import KnownHeaders
from fourdvq.data.limits import ARCHIVE_SUFFIXES
from fourdvq.data.parts import (
    FRAGMENT_SLICES,
    by_person_and_day,
    has_common_frame,
    part_key,
    parts_of,
    places_of,
)
from fourdvq.data.strays import with_strays
from fourdvq.data.walk import walk_files
from fourdvq.errors import VolumeError

__all__ = ["FolderScan", "SeriesCandidate", "SliceHeader", "find_series", "group_slices", "scan_files", "scan_folder"]

_Read = Callable[[], tuple[SliceHeader, ...]]


@dataclass(frozen=True)
class SeriesCandidate:
    """Images that form one volume, as far as headers tell; `warnings` are W_ codes.

    `strays` are images of its folders that may be slices of it although they are not part of it by their headers.
    """

    slices: tuple[SliceHeader, ...]
    warnings: tuple[str, ...] = ()
    strays: tuple[SliceHeader, ...] = ()

    @property
    def first(self) -> SliceHeader:
        """Any slice stands for what is equal in all of them."""
        return self.slices[0]

    def split_off(self) -> SeriesCandidate:
        """The same as a part of a series that has others, which matters to what it lacks."""
        return replace(self, warnings=tuple(dict.fromkeys((*self.warnings, "W_SPLIT"))))

    @cached_property
    def study_key(self) -> str:
        """An opaque name of the study: a hash, because the UID itself may not be passed on."""
        return "study-" + _digest(self.first.study)

    @cached_property
    def series_key(self) -> str:
        """An opaque name of this part of the series, the same whatever the order and the names of the files."""
        head = self.first
        direction = "" if head.orientation is None else [round(v, 2) + 0.0 for v in head.orientation]
        frame = head.frame_of_reference if has_common_frame(self.slices) else ""
        # An acquisition belongs to one part, an enhanced file has one instance, and so few slices one layout.
        acquisition = min(s.acquisition for s in self.slices)
        layout = head.pixels.layout if len(self.slices) <= FRAGMENT_SLICES else ()
        part = (head.series, head.instance, frame, part_key(head), direction, acquisition, layout)
        return "series-" + _digest(repr(part))

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The files of the slices and strays, sorted."""
        by_parts = {s.path.parts: s.path for s in (*self.slices, *self.strays)}  # hashed and compared faster than paths
        return tuple(by_parts[parts] for parts in sorted(by_parts))

    @cached_property
    def folders(self) -> frozenset[Path]:
        """The folders of the slices."""
        return frozenset(Path(*parts) for parts in {s.path.parts[:-1] for s in self.slices})

    @cached_property
    def has_geometry(self) -> bool:
        """Whether every slice says where it lies."""
        return all(s.has_geometry for s in self.slices)

    @cached_property
    def coverage_mm(self) -> float:
        """Extent along the slice normal, outer edges included; 0 where geometry is missing."""
        if not self.has_geometry:
            return 0.0
        places = np.sort(places_of(self.slices))
        return float(places[-1] - places[0]) * len(places) / max(1, len(places) - 1)


@dataclass(frozen=True)
class FolderScan:
    """Candidates of a folder, how many files were left out for which reason, and the files that are damaged."""

    candidates: tuple[SeriesCandidate, ...]
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: tuple[Path, ...] = ()


def find_series(folder: Path) -> list[SeriesCandidate]:
    """The CT series in a folder, in any nesting, from headers alone. See `scan_folder` for what was left out."""
    return list(scan_folder(folder).candidates)


def scan_folder(
    folder: Path, progress: Callable[[int, int], None] | None = None, known: KnownHeaders | None = None
) -> FolderScan:
    """Read the headers of all files below `folder` and group the CT slices into series.

    Counted as skipped: E_NOTCT (another modality), E_DERIVED (localizer, secondary capture, reformat), E_CORRUPT (a
    damaged file), E_ARCHIVE, "other" (not DICOM), and what `walk_files` counts. `progress` is told files done and all.
    A file that `known` remembers is not opened. Raises VolumeError E_FOLDER if the folder is missing.
    """
    if not folder.is_dir():
        raise VolumeError("E_FOLDER", where=str(folder))
    walk = walk_files(folder)
    if known is None:
        found = scan_files(walk.files, progress)
    else:
        reads = map(partial, repeat(known.headers), walk.files, walk.states)
        found = _scan(walk.files, reads, progress)
    return replace(found, skipped=found.skipped + walk.skipped)


def scan_files(files: Sequence[Path], progress: Callable[[int, int], None] | None = None) -> FolderScan:
    """`scan_folder` for files that are named one by one."""
    return _scan(files, (partial(read_headers, path) for path in files), progress)


def group_slices(slices: Iterable[SliceHeader]) -> list[SeriesCandidate]:
    """Slices that can form one volume, together; a series that mixes geometries is split, with W_SPLIT.

    A series in which any slice lacks its geometry is not split: it must be refused as a whole, not lose that slice.
    """
    by_series: dict[tuple[str, str, str], list[SliceHeader]] = {}
    for s in slices:
        # Each enhanced file is a whole of its own.
        by_series.setdefault((s.study, s.series, "" if s.frame is None else str(s.path)), []).append(s)
    result: list[SeriesCandidate] = []
    for members in by_series.values():
        groups = [group for owned in by_person_and_day(members) for group in _volumes(owned)]
        warnings = ("W_SPLIT",) if len(groups) > 1 else ()
        result += [SeriesCandidate(tuple(group), warnings) for group in groups]
    return result


def _volumes(members: list[SliceHeader]) -> list[list[SliceHeader]]:
    whole = members[0].frame is not None or not all(s.has_geometry for s in members)
    return [members] if whole else parts_of(members)


def _scan(
    files: Sequence[Path], reads: Iterable[_Read], progress: Callable[[int, int], None] | None = None
) -> FolderScan:
    """The series of files of which each has its own way of being read."""
    kept: list[SliceHeader] = []
    aside: list[SliceHeader] = []
    skipped: Counter[str] = Counter()
    unreadable = []
    for done, (path, read) in enumerate(zip(files, reads, strict=True), start=1):
        reason = _sort_out(path, read, kept, aside)
        if reason:
            skipped[reason] += 1
        if reason in ("E_CORRUPT", "E_BOMB"):
            unreadable.append(path)
        if progress is not None:
            progress(done, len(files))
    return FolderScan(tuple(with_strays(group_slices(kept), aside)), skipped, tuple(unreadable))


def _sort_out(path: Path, read: _Read, kept: list[SliceHeader], aside: list[SliceHeader]) -> str:
    """Empty if the file's images were kept; `aside` gets the headers of images that are no slices."""
    if path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return "E_ARCHIVE"
    try:
        headers = read()
    except VolumeError as error:
        return error.code
    except OSError:
        return "E_CORRUPT"
    if not headers:
        return "other"
    head = headers[0]
    derived = _is_derived(head.image_type, head.sop_class)
    is_image = head.rows > 0 or head.sop_class in CT_CLASSES  # raw data of a CT scanner is none
    reason = "E_NOTCT" if head.modality != "CT" or not is_image else "E_DERIVED" if derived else ""
    (aside if reason else kept).extend(headers)
    return reason


@lru_cache(maxsize=1024)
def _is_derived(image_type: tuple[str, ...], sop_class: str) -> bool:
    kinds = {kind.upper() for kind in image_type}
    if sop_class == SECONDARY_CAPTURE or kinds & {"LOCALIZER", "SECONDARY"}:
        return True
    return bool(kinds) and not kinds & {"ORIGINAL", "AXIAL"}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]

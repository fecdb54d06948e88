"""What preparation starts from: a scan as a path with its day, and how it is read, whatever its format."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fourdvq.data.cohort import Cohort
from fourdvq.data.files import contents_sha256, file_sha256, write_atomic
from fourdvq.data.limits import ReaderLimits, shown
from fourdvq.data.metaimage import files_of
from fourdvq.data.technical import TechnicalTags
from fourdvq.errors import DataError
from fourdvq.preprocessing.profile import LimitsSpec

if TYPE_CHECKING:
    from fourdvq.data.volume import Volume

# To a quote, a colon or the end of the line, as spaces are part of many names; not the stroke of `Input/output error`.
_PATH = re.compile(r"(?:<path>)?(?<!\w)/[^'\":\n]*")


@dataclass(frozen=True)
class ScanInput:
    """One scan to prepare; plain values, so that another process can be given it. Paths never reach an output."""

    index: int
    days: int
    path: Path
    mask_path: Path | None = None
    kind: Literal["image", "dicom"] = "image"
    source_sha256: str = ""  # content of the scan and its mask; computed when it is empty
    study_key: str = ""  # which DICOM study of the folder
    series_key: str = ""  # which series of the study; empty: the best one
    files: tuple[Path, ...] = ()  # the files of that series; empty: all below `path` are looked at
    split: bool = False  # other parts of the series were left out of `files`


@dataclass(frozen=True)
class LoadedScan:
    """A scan as it was read: HU in LPS, the given mask if there is one, W_ and V_ codes, slice thickness in mm.

    `technical` is the whitelist of what a header may pass on: scanner maker, kernel class, kV, contrast.
    """

    volume: Volume
    mask: Volume | None
    warnings: tuple[str, ...]
    thickness_mm: float
    technical: TechnicalTags = field(default_factory=TechnicalTags)


class SourceHashes:
    """Content hashes of source files, remembered by path, size and times of change.

    A cohort of 700 scans is 100 GB: it is hashed once, and a later run looks at sizes and times only. Of the times one
    is the system's own: a copy can bring the other along. The file that remembers them holds hashes and no names.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.new = 0  # files hashed since the last save
        self._path = path
        self._known = _remembered(path) if path is not None else {}
        self._met: set[str] = set()

    def of(self, *paths: Path | tuple[Path, ...] | None) -> str:
        """One hash for the contents of all paths (None is skipped); a tuple of files is remembered as one."""
        parts = []
        for path in (p for p in paths if p is not None):
            files = path if isinstance(path, tuple) else _files_in(path)
            look = self._look(files)
            if look not in self._known:
                self._known[look] = _sha256_of(path, files)
                self.new += 1
            self._met.add(look)
            parts.append(self._known[look])
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def save(self, *, all_met: bool = False) -> None:
        """Write what is known to the file given at the start, if there is one and something has changed.

        What another run has added meanwhile is kept; whoever calls makes sure that nobody else writes just now. With
        `all_met`, after a run over all there is, what was not asked for is forgotten.
        """
        gone = all_met and len(self._met) < len(self._known)
        if self._path is None or not (self.new or gone):
            return
        known = _remembered(self._path) | self._known
        kept = {look: known[look] for look in self._met} if all_met else known
        write_atomic(self._path, json.dumps(kept, sort_keys=True).encode())
        self.new = 0

    @staticmethod
    def _look(files: Sequence[Path]) -> str:
        places = [str(path.absolute()) for path in files]
        states = [os.stat(place) for place in places]  # noqa: PTH116 (a path's own stat takes twice as long)
        seen = [(place, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for place, s in zip(places, states, strict=True)]
        return hashlib.sha256(repr(seen).encode()).hexdigest()


def scan_inputs(cohort: Cohort, patient_id: str, hashes: SourceHashes | None = None) -> list[ScanInput]:
    """A patient's scans in time order, numbered from 0; content hashes are taken from `hashes` if it is given.

    A scan whose files cannot be read just now has none: who prepares it says so, and the others go on.
    """
    result = []
    for index, row in enumerate(cohort.scans_of(patient_id)):
        scan = ScanInput(
            index=index,
            days=row.days,
            path=row.path,
            mask_path=row.mask_path,
            kind=row.kind,
            study_key=row.study_key,
            series_key=row.series_key,
            files=row.files,
            split=row.split,
        )
        result.append(replace(scan, source_sha256=_hash_of(scan, hashes) if hashes else ""))
    return result


def load_input(
    scan: ScanInput, limits: LimitsSpec, *, with_mask: bool, readers: ReaderLimits | None = None
) -> LoadedScan:
    """Read a scan, and its mask if wanted and given; `readers` bound what a header may announce.

    Of a DICOM folder exactly the series is read that the scan names. Raises VolumeError with the code of the first
    fault.
    """
    from fourdvq.data.volume import read_mask, read_volume

    readers = readers or ReaderLimits()
    mask = read_mask(scan.mask_path, readers=readers) if with_mask and scan.mask_path is not None else None
    if scan.kind == "image":
        volume = read_volume(scan.path, readers=readers)
        return LoadedScan(volume, mask, (), volume.spacing[0])
    from fourdvq.data.choice import best_series
    from fourdvq.data.series import SeriesLimits, load_series

    candidate = best_series(scan.path, study_key=scan.study_key, series_key=scan.series_key, files=scan.files)
    if scan.split:
        candidate = candidate.split_off()
    series = load_series(candidate, SeriesLimits(limits.fill_single_gap, limits.tilt == "shear", readers))
    return LoadedScan(series.volume, mask, series.warnings, series.thickness_mm, series.technical)


def unreadable(scan: ScanInput) -> str:
    """Why a scan's files cannot be read to their end just now, without a path; empty if they can.

    Whatever a reader said about such a scan tells of a share or of rights, and not of the scan.
    """
    try:
        for source in (p for p in _sources(scan) if p is not None):
            for path in source if isinstance(source, tuple) else _files_in(source) or (source,):
                file_sha256(path)
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def told(error: DataError, scan: ScanInput) -> str:
    """What was found in a scan and where, without a path: a folder's name may be a patient's.

    A file of a series is told by its number in the order of names; where the series lies stands in private/.
    """
    names, place = _names_of(scan), "the scan"
    if len(names) > 1 and error.where in names:
        place = f"file {names.index(error.where) + 1} of {len(names)} by name"
    elif scan.mask_path is not None and error.where == shown(scan.mask_path):
        place = "the lung mask"
    return f"{place}: {without_paths(error.found, scan)}"


def without_paths(text: str, scan: ScanInput) -> str:
    """A text in which the scan's paths, and what else looks like an absolute path, are blanked."""
    for place in sorted(_places_of(scan), key=len, reverse=True):
        text = text.replace(place, "<path>")
    return _PATH.sub("<path>", text)


def source_key(scan: ScanInput) -> str:
    """The content hash of a scan and its mask: of the files that are read, not of others in their folder."""
    return scan.source_sha256 or _source_sha256(scan, SourceHashes())


def _source_sha256(scan: ScanInput, hashes: SourceHashes) -> str:
    contents = hashes.of(*_sources(scan))
    # A part of a series is read by a stricter rule than the same files alone.
    return hashlib.sha256(f"{contents} split".encode()).hexdigest() if scan.split else contents


def _hash_of(scan: ScanInput, hashes: SourceHashes) -> str:
    try:
        return _source_sha256(scan, hashes)
    except OSError:
        return ""


def _remembered(path: Path) -> dict[str, str]:
    """What a file of hashes holds. One that is absent or damaged costs hashing the cohort again, and nothing else."""
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in stored.items()} if isinstance(stored, dict) else {}


def _sha256_of(path: Path | tuple[Path, ...], files: Sequence[Path]) -> str:
    return file_sha256(path) if isinstance(path, Path) and path.is_file() else contents_sha256(files)


def _names_of(scan: ScanInput) -> list[str]:
    files = scan.files or (_files_in(scan.path) if scan.path.exists() else [scan.path])
    return [shown(path) for path in sorted(files)]


def _places_of(scan: ScanInput) -> set[str]:
    """The scan's files and the folders above them, in both spellings of a name that is no UTF-8."""
    files = [path.absolute() for path in (scan.path, scan.mask_path, *scan.files) if path is not None]
    places = {place for path in files for place in (path, *path.parents) if place.name}
    return {spelling for place in places for spelling in (str(place), shown(place))}


def _sources(scan: ScanInput) -> tuple[Path | tuple[Path, ...] | None, ...]:
    # The voxels of an .mhd lie in another file, and a change of them is a change of the scan.
    files = files_of(scan.path) if scan.path.suffix.lower() == ".mhd" else scan.files
    return files or scan.path, scan.mask_path


def _files_in(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())

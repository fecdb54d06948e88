"""What preparation starts from: a scan as a path with its day, and how it is read, whatever its format."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fourdvq.data.cohort import Cohort
from fourdvq.data.files import content_sha256, write_atomic
from fourdvq.data.volume import Volume, read_mask, read_volume
from fourdvq.preprocessing.profile import LimitsSpec


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


@dataclass(frozen=True)
class LoadedScan:
    """A scan as it was read: HU in LPS, the given mask if there is one, W_ codes, and the slice thickness in mm."""

    volume: Volume
    mask: Volume | None
    warnings: tuple[str, ...]
    thickness_mm: float


class SourceHashes:
    """Content hashes of source files, remembered by path, size and time of change.

    A cohort of 700 scans is 100 GB: it is hashed once, and a later run looks at sizes and times only. The file that
    remembers them holds hashes and no names.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.new = 0  # files hashed since the last save
        self._path = path
        self._known: dict[str, str] = {}
        if path is not None and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self._known = {str(k): str(v) for k, v in stored.items()}

    def of(self, *paths: Path | None) -> str:
        """One hash for the contents of all paths (None is skipped)."""
        parts = []
        for path in (p for p in paths if p is not None):
            look = self._look(path)
            if look not in self._known:
                self._known[look] = content_sha256(path)
                self.new += 1
            parts.append(self._known[look])
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def save(self) -> None:
        """Write what is known to the file given at the start, if there is one and something is new.

        What another run has added meanwhile is kept; whoever calls makes sure that nobody else writes just now.
        """
        if self._path is None or not self.new:
            return
        stored = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
        write_atomic(self._path, json.dumps(stored | self._known, sort_keys=True).encode())
        self.new = 0

    @staticmethod
    def _look(path: Path) -> str:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        seen = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return hashlib.sha256(repr(seen).encode()).hexdigest()


def scan_inputs(cohort: Cohort, patient_id: str, hashes: SourceHashes | None = None) -> list[ScanInput]:
    """A patient's scans in time order, numbered from 0; content hashes are taken from `hashes` if it is given."""
    result = []
    for index, row in enumerate(cohort.scans_of(patient_id)):
        source = hashes.of(row.path, row.mask_path) if hashes else ""
        result.append(ScanInput(index, row.days, row.path, row.mask_path, row.kind, source, row.study_key))
    return result


def load_input(scan: ScanInput, limits: LimitsSpec, *, with_mask: bool) -> LoadedScan:
    """Read a scan, and its mask if wanted and given. Raises VolumeError with the code of the first fault."""
    mask = read_mask(scan.mask_path) if with_mask and scan.mask_path is not None else None
    if scan.kind == "image":
        volume = read_volume(scan.path)
        return LoadedScan(volume, mask, (), volume.spacing[0])
    from fourdvq.data.choice import best_series
    from fourdvq.data.series import SeriesLimits, load_series

    candidate = best_series(scan.path, study_key=scan.study_key)
    series_limits = SeriesLimits(fill_single_gap=limits.fill_single_gap, shear_tilt=limits.tilt == "shear")
    series = load_series(candidate, series_limits)
    return LoadedScan(series.volume, mask, series.warnings, series.thickness_mm)


def source_key(scan: ScanInput) -> str:
    """The content hash of a scan and its mask."""
    return scan.source_sha256 or SourceHashes().of(scan.path, scan.mask_path)

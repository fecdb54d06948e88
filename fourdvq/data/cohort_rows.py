"""The rows a cohort is made of, and the findings about them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fourdvq.data.limits import shown
from fourdvq.errors import explain

if TYPE_CHECKING:
    from fourdvq.data.dicom import SeriesCandidate

Event = Literal["death", "censored", "transplant"]


@dataclass(frozen=True)
class Finding:
    """A fault of the tables; it blocks its scan or patient if the code starts with E_. For people at the site only."""

    code: str
    where: str
    found: str
    fix: str
    patient_id: str = ""
    scan_id: str = ""

    @property
    def blocks(self) -> bool:
        """Whether the scan, or without one the patient, is left out."""
        return self.code.startswith("E_")


@dataclass(frozen=True)
class PatientRow:
    """One row of clinical.csv; `age` in years and `time_days` count from the first CT."""

    patient_id: str
    age: float | None
    sex: Literal["M", "F"] | None
    smoking: int | None  # 1 ever, 0 never
    time_days: int | None
    event: Event | None


@dataclass(frozen=True)
class ScanRow:
    """One scan: a file, or a DICOM folder with the keys of the study and series chosen in it, and their files.

    `days` count from the patient's first CT. `split`: other parts of its series were left out, so that what it lacks
    may be among them.
    """

    patient_id: str
    scan_id: str
    path: Path
    days: int
    mask_path: Path | None = None
    kind: Literal["image", "dicom"] = "image"
    study_key: str = ""
    series_key: str = ""
    files: tuple[Path, ...] = ()
    split: bool = False


@dataclass(frozen=True)
class DatedScan:
    """A scan before its date has become a number of days; `score` orders two of one day, larger is better.

    One that is not `usable` says when the patient was scanned, and no more: a finding says why it is left out.
    """

    row: ScanRow
    where: str
    date: datetime.date | None
    days: int | None
    score: tuple[int, ...] = ()
    series: SeriesCandidate | None = None
    usable: bool = True


@dataclass(frozen=True)
class CandidateRow:
    """One series that a scan could have been made of: opaque keys, a word for each criterion, why it was not taken.

    `folder` and `patient_id` are for files that never leave the site's own hands.
    """

    patient_id: str
    scan_id: str
    study_key: str
    series_key: str
    used: bool
    by: str  # score, or series.yaml
    reject: str
    folder: Path
    words: Mapping[str, str] = field(default_factory=dict)


def finding(code: str, where: str, found: str, *, patient: str = "", scan: str = "", fix: str = "") -> Finding:
    """A finding whose remedy, unless a better one is known, is the code's own."""
    return Finding(code, shown(where), shown(found), fix or explain(code).fix, patient, scan)

"""The rows a cohort is made of, and the findings about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fourdvq.errors import explain

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
    """One scan: a file, or a DICOM folder with the hash that names the study in it; `days` since the first CT."""

    patient_id: str
    scan_id: str
    path: Path
    days: int
    mask_path: Path | None = None
    kind: Literal["image", "dicom"] = "image"
    study_key: str = ""


def finding(code: str, where: str, found: str, *, patient: str = "", scan: str = "", fix: str = "") -> Finding:
    """A finding whose remedy, unless a better one is known, is the code's own."""
    return Finding(code, where, found, fix or explain(code).fix, patient, scan)

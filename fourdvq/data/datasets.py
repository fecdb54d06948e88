"""Prepared scans as tensors. Reads a prep folder only, and of it only what a person approved.

Arrays are (D, H, W); x01 is in [0, 1]: HU clipped to the profile's window and scaled. Times are years since the
patient's first approved scan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fourdvq.config import sha256_of
from fourdvq.data.prepared import CLINICAL_COLUMNS, MANIFEST_COLUMNS, read_splits, read_table
from fourdvq.data.review import APPROVING, read_decisions
from fourdvq.errors import CohortError

DAYS_PER_YEAR = 365.25


@dataclass(frozen=True)
class PreparedScan:
    """One approved scan; `days` counts from the patient's first CT, `years` from the first approved one."""

    pseudonym: str
    index: int
    days: int
    years: float
    folder: Path
    content_sha256: str
    spacing: tuple[float, float, float]  # z, y, x in mm


@dataclass(frozen=True)
class Acquisition:
    """How a scan was taken: the scanner's maker, one of the known names or empty, and the slice thickness."""

    maker: str
    thickness_mm: float


@dataclass(frozen=True)
class PreparedPatient:
    """A patient's approved scans in time order, all on the grid of the first one."""

    pseudonym: str
    scans: tuple[PreparedScan, ...]
    split: str


@dataclass(frozen=True)
class PreparedCohort:
    """What training may read. `cohort_sha256` changes with any scan, decision, split or clinical row."""

    patients: tuple[PreparedPatient, ...]
    cohort_sha256: str
    profile_sha256: str

    def of(self, *splits: str) -> tuple[PreparedPatient, ...]:
        """The patients of the named splits."""
        return tuple(p for p in self.patients if p.split in splits)

    def scans(self, *splits: str) -> tuple[PreparedScan, ...]:
        """All scans of the named splits, patient by patient."""
        return tuple(scan for patient in self.of(*splits) for scan in patient.scans)


@dataclass(frozen=True)
class ClinicalRow:
    """Covariates and follow-up for the survival analysis; age and time count from the first approved scan."""

    pseudonym: str
    age: float | None
    sex: int | None  # 1 male, 0 female
    smoking: int | None  # 1 ever, 0 never
    time_days: int | None
    event: int | None  # 1 died (or transplanted, if the federation counts it), 0 censored
    complete: bool


def open_prepared(prep: Path) -> PreparedCohort:
    """The approved scans of a prep folder.

    A scan counts if its last decision approves it, on the content it has now, and if its patient's baseline is approved
    too: a follow-up carries the baseline's tissue outside the lung. Raises CohortError E_FILE (no manifest),
    E_PROFILE (made under more than one profile), E_TABLE (a patient without a split) and E_NO_APPROVED.
    """
    usable = _approved_rows(prep)
    if not usable:
        raise CohortError("E_NO_APPROVED", where=str(prep / "review.csv"))
    profiles = sorted({r["profile_sha256"] for r in usable})
    if len(profiles) > 1:
        found = f"scans made under {len(profiles)} profiles"
        raise CohortError("E_PROFILE", where=str(prep / "manifest.csv"), found=found)
    patients = _patients(prep, usable, read_splits(prep))
    identity = {
        "scans": [[s.pseudonym, s.index, s.days, s.content_sha256, p.split] for p in patients for s in p.scans],
        "clinical": _clinical_lines(prep, {p.pseudonym for p in patients}),
    }
    return PreparedCohort(patients, sha256_of(identity), profiles[0])


def load_acquisition(scan: PreparedScan) -> Acquisition | None:
    """How a scan was taken, from the numbers that preparation kept beside it; None where it kept none."""
    try:
        facts = json.loads((scan.folder / "qc.json").read_bytes())["scan"]
        return Acquisition(str(facts["technical"]["manufacturer"]), float(facts["thickness_mm"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_hu(scan: PreparedScan) -> np.ndarray:
    """HU int16 (D, H, W), memory-mapped and read-only."""
    hu: np.ndarray = np.load(scan.folder / "hu.npy", mmap_mode="r", allow_pickle=False)
    return hu


def load_x01(scan: PreparedScan, window_hu: tuple[float, float]) -> Tensor:
    """(1, D, H, W) float32 in [0, 1]."""
    return _to_x01(load_hu(scan), window_hu)


def load_lung(scan: PreparedScan) -> Tensor:
    """The patient's lung mask, bool (D, H, W): the baseline's, the same for all of the patient's scans."""
    shape = load_hu(scan).shape
    packed = np.load(scan.folder / "mask.npy", allow_pickle=False)
    return torch.from_numpy(np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape).astype(bool))


def latent_mask(lung: Tensor, compression: int) -> Tensor:
    """(d, h, w) bool from (D, H, W) bool: trilinear to the code grid, then > 0 (dilated). Source: the paper's code."""
    size = [n // compression for n in lung.shape]
    small = F.interpolate(lung[None, None].float(), size=size, mode="trilinear", align_corners=False)
    return small[0, 0] > 0


def clinical_of(prep: Path, *, transplant: Literal["censor", "event"] = "censor") -> list[ClinicalRow]:
    """The clinical rows of prep/clinical.csv; `complete` says that a row can enter the survival analysis.

    Where the first CT was rejected, time and age move to the first approved scan (given by the manifest).
    """
    start = _first_approved_days(prep)
    words = {"death": 1, "censored": 0, "transplant": int(transplant == "event")}
    result = []
    for row in read_table(prep / "clinical.csv", CLINICAL_COLUMNS):
        shift = start.get(row["pseudonym"], 0)
        age = float(row["age"]) + shift / DAYS_PER_YEAR if row["age"] else None
        time = int(row["time_days"]) - shift if row["time_days"] else None
        sex = {"M": 1, "F": 0}.get(row["sex"])
        smoking = int(row["smoking"]) if row["smoking"] else None
        event = words.get(row["event"])
        complete = None not in (age, sex, smoking, time, event) and time is not None and time >= 0
        result.append(ClinicalRow(row["pseudonym"], age, sex, smoking, time, event, complete))
    return result


class ScanDataset:
    """Scans by position, as (1, D, H, W) float32 in [0, 1]; what a trainer reads (`ScanSource`).

    `cache` keeps HU int16 in memory after the first read: half the size of the tensors, and exact.
    """

    def __init__(self, scans: Sequence[PreparedScan], window_hu: tuple[float, float], cache: bool = True) -> None:
        self._scans = tuple(scans)
        self._window = window_hu
        self._kept: dict[int, np.ndarray] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self._scans)

    def __getitem__(self, i: int) -> Tensor:
        if self._kept is None:
            return load_x01(self._scans[i], self._window)
        if i not in self._kept:
            self._kept[i] = np.array(load_hu(self._scans[i]))
        return _to_x01(self._kept[i], self._window)

    def patient_of(self, i: int) -> str:
        """Pseudonym of the patient of scan `i`."""
        return self._scans[i].pseudonym


def _to_x01(hu: np.ndarray, window_hu: tuple[float, float]) -> Tensor:
    low, high = window_hu
    x = torch.from_numpy(np.asarray(hu, dtype=np.float32))
    return x.sub_(low).div_(high - low).clamp_(0.0, 1.0)[None]


def _patients(prep: Path, rows: Sequence[dict[str, str]], splits: Mapping[str, str]) -> tuple[PreparedPatient, ...]:
    by_patient: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_patient.setdefault(row["pseudonym"], []).append(row)
    without = sorted(p for p in by_patient if p not in splits)
    if without:
        found = f"no split for {without[0]}" + (f" and {len(without) - 1} more" if len(without) > 1 else "")
        raise CohortError("E_TABLE", where=str(prep / "splits.csv"), found=found, fix="run `fourdvq-client preprocess`")
    return tuple(
        PreparedPatient(pseudonym, _scans(prep, by_patient[pseudonym]), splits[pseudonym])
        for pseudonym in sorted(by_patient)
    )


def _scans(prep: Path, rows: Sequence[dict[str, str]]) -> tuple[PreparedScan, ...]:
    ordered = sorted(rows, key=lambda r: (int(r["days"]), int(r["index"])))
    first = int(ordered[0]["days"])
    return tuple(
        PreparedScan(
            pseudonym=r["pseudonym"],
            index=int(r["index"]),
            days=int(r["days"]),
            years=(int(r["days"]) - first) / DAYS_PER_YEAR,
            folder=prep / r["folder"],
            content_sha256=r["content_sha256"],
            spacing=(float(r["spacing_z"]), float(r["spacing_y"]), float(r["spacing_x"])),
        )
        for r in ordered
    )


def _approved_rows(prep: Path) -> list[dict[str, str]]:
    """Manifest rows whose scan and whose baseline are approved on the content they have now."""
    decisions = read_decisions(prep)
    approved = {}
    for row in read_table(prep / "manifest.csv", MANIFEST_COLUMNS):
        if decisions.about(row) in APPROVING:
            approved[row["pseudonym"], int(row["index"])] = row
    return [r for r in approved.values() if (r["pseudonym"], int(r["baseline"])) in approved]


def _first_approved_days(prep: Path) -> dict[str, int]:
    first: dict[str, int] = {}
    for row in _approved_rows(prep) if (prep / "manifest.csv").exists() else []:
        days = int(row["days"])
        first[row["pseudonym"]] = min(days, first.get(row["pseudonym"], days))
    return first


def _clinical_lines(prep: Path, pseudonyms: set[str]) -> list[list[str]]:
    path = prep / "clinical.csv"
    rows = read_table(path, CLINICAL_COLUMNS) if path.exists() else []
    return sorted([row[c] for c in CLINICAL_COLUMNS] for row in rows if row["pseudonym"] in pseudonyms)

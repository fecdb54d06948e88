"""Which scans a hospital has: rows of scans.csv, or the studies that DICOM headers name; dates become days.

Days count from the patient's first CT. A date is read, used once, and not kept.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fourdvq.data.cohort_rows import Finding, ScanRow, finding
from fourdvq.data.dicom import SeriesCandidate, scan_folder
from fourdvq.data.tables import parse_date, parse_whole, read_source_table
from fourdvq.data.volume import IMAGE_SUFFIXES, is_image_file
from fourdvq.errors import CohortError

SCANS_REQUIRED = ("patient_id", "scan_id", "path")
SCANS_OPTIONAL = ("date", "days_from_baseline", "mask")


@dataclass(frozen=True)
class DatedScan:
    """A scan before its date has become a number of days."""

    row: ScanRow
    where: str
    date: datetime.date | None
    days: int | None


def scans_from_table(path: Path, folder: Path, columns: Mapping[str, str], findings: list[Finding]) -> list[DatedScan]:
    table = read_source_table(path, required=SCANS_REQUIRED, optional=SCANS_OPTIONAL, columns=columns)
    if not table.columns & {"date", "days_from_baseline"}:
        raise CohortError("E_COLUMN", where=path.name, found="neither date nor days_from_baseline")
    seen: Counter[tuple[str, str]] = Counter()
    result = []
    for row, number in zip(table.rows, table.numbers, strict=True):
        where = f"{table.name} row {number}"
        patient, scan = row["patient_id"], row["scan_id"]
        seen[patient, scan] += 1
        if seen[patient, scan] > 1:
            findings.append(finding("E_DUPLICATE", where, f"scan {scan!r} a second time", patient=patient))
            continue
        source = _resolve(row["path"], folder, path.parent)
        if source is None:
            findings.append(finding("E_FILE", f"{where}, column path", row["path"], patient=patient, scan=scan))
            continue
        mask = _mask_of(source, row.get("mask", ""), folder, path.parent)
        kind: Literal["image", "dicom"] = "dicom" if source.is_dir() else "image"
        date, days = parse_date(row.get("date", "")), parse_whole(row.get("days_from_baseline", ""))
        result.append(DatedScan(ScanRow(patient, scan, source, 0, mask, kind), where, date, days))
    return result


def scans_from_dicom(folder: Path, findings: list[Finding]) -> list[DatedScan]:
    found = scan_folder(folder)
    studies: dict[tuple[str, str], list[SeriesCandidate]] = {}
    for candidate in found.candidates:
        studies.setdefault((candidate.first.patient_id, candidate.first.study), []).append(candidate)
    if not studies:
        if any(is_image_file(p) for p in folder.rglob("*")):
            fix = "write scans.csv: these files do not say whose they are and when they were made"
            raise CohortError("E_FILE", where="scans.csv", found="image files without DICOM headers", fix=fix)
        raise CohortError("E_EMPTY", where=str(folder), found=_skipped_text(found.skipped))
    result = []
    numbered: Counter[str] = Counter()
    for (patient, _), candidates in sorted(studies.items(), key=lambda item: (item[0][0], item[1][0].first.study_date)):
        numbered[patient] += 1
        first = candidates[0].first
        where = f"DICOM study of {first.study_date or 'no date'} of patient {patient!r}"
        if not patient:
            findings.append(finding("E_ID", where, "no PatientID"))
            continue
        place = _common_folder([s.path for c in candidates for s in c.slices])
        mask = _mask_of(place, "")
        row = ScanRow(patient, f"study-{numbered[patient]}", place, 0, mask, "dicom", candidates[0].study_key)
        result.append(DatedScan(row, where, parse_date(first.study_date), None))
    findings += _identity_findings([c for group in studies.values() for c in group])
    return result


def _identity_findings(candidates: Sequence[SeriesCandidate]) -> list[Finding]:
    persons: dict[str, dict[str, set[str]]] = {}
    for candidate in candidates:
        header = candidate.first
        person = persons.setdefault(header.patient_id, {"sex": set(), "birth date": set()})
        person["sex"] |= {header.sex} - {"", "O"}
        person["birth date"] |= {header.birth_date} - {""}
    return [
        finding(
            "E_IDENTITY", f"DICOM headers of patient {patient!r}", f"{len(kinds)} values of {what}", patient=patient
        )
        for patient, person in persons.items()
        for what, kinds in person.items()
        if len(kinds) > 1
    ]


def place_in_time(
    dated: Sequence[DatedScan], findings: list[Finding], today: datetime.date | None
) -> tuple[tuple[ScanRow, ...], dict[str, datetime.date]]:
    """Days since each patient's first CT, scans without a usable date left out; and the first dates, kept in memory."""
    usable: list[DatedScan] = []
    for scan in dated:
        patient = scan.row.patient_id
        if scan.date is None and scan.days is None:
            findings.append(finding("E_DATE", scan.where, "no readable date", patient=patient, scan=scan.row.scan_id))
        elif scan.date and today and scan.date > today:
            findings.append(
                finding("E_DATE", scan.where, "a date in the future", patient=patient, scan=scan.row.scan_id)
            )
        elif scan.date is None and scan.days is not None and scan.days < 0:
            findings.append(finding("E_TIME", scan.where, f"day {scan.days}", patient=patient))
        else:
            usable.append(scan)
    first_dates: dict[str, datetime.date] = {}
    for scan in usable:
        if scan.date:
            patient = scan.row.patient_id
            first_dates[patient] = min(scan.date, first_dates.get(patient, scan.date))
    rows = [
        replace(s.row, days=(s.date - first_dates[s.row.patient_id]).days if s.date else s.days or 0) for s in usable
    ]
    for patient in sorted({r.patient_id for r in rows}):
        if min(r.days for r in rows if r.patient_id == patient) > 0:
            findings.append(finding("E_TIME", f"scans of patient {patient!r}", "no scan on day 0", patient=patient))
    return tuple(_one_per_day(rows, findings)), first_dates


def _one_per_day(rows: Sequence[ScanRow], findings: list[Finding]) -> list[ScanRow]:
    kept: dict[tuple[str, int], ScanRow] = {}
    for row in rows:
        key = (row.patient_id, row.days)
        if key in kept:
            where = f"scans {kept[key].scan_id!r} and {row.scan_id!r} of patient {row.patient_id!r}"
            findings.append(finding("W_SAMEDAY", where, f"both on day {row.days}; the first is kept"))
        else:
            kept[key] = row
    return list(kept.values())


def _resolve(text: str, *folders: Path) -> Path | None:
    tries = [folder / text for folder in folders]
    return next((path for path in tries if text and path.exists()), None)


def _mask_of(source: Path, text: str, *folders: Path) -> Path | None:
    """The mask that the table names, or the file beside the scan (or DICOM folder) with its name and _lung."""
    if text:
        return _resolve(text, *folders) or folders[0] / text
    endings = sorted(IMAGE_SUFFIXES, key=len, reverse=True)
    suffix = "" if source.is_dir() else next((e for e in endings if source.name.lower().endswith(e)), "")
    stem = source.name[: len(source.name) - len(suffix)]
    beside = [source.with_name(f"{stem}_lung{ending}") for ending in endings]
    return next((path for path in beside if path.exists()), None)


def _common_folder(paths: Sequence[Path]) -> Path:
    folder = paths[0].parent
    while not all(path.is_relative_to(folder) for path in paths):
        folder = folder.parent
    return folder


def _skipped_text(skipped: Counter[str]) -> str:
    return ", ".join(f"{n} x {code}" for code, n in sorted(skipped.items())) or "no file"

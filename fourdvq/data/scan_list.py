"""Which scans a hospital has: rows of scans.csv, or the studies that DICOM headers name; dates become days.

Days count from the patient's first CT, also where that scan itself cannot be used: follow-up and age count from it. A
date is read, used once, and not kept.
"""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fourdvq.data.cohort_rows import DatedScan, Finding, ScanRow, finding
from fourdvq.data.dicom_file import DICOM_SUFFIXES
from fourdvq.data.dicom_studies import DicomReader, mask_of
from fourdvq.data.limits import is_image_file
from fourdvq.data.reachable import is_folder, lies_there, why_unreadable
from fourdvq.data.tables import parse_date, parse_whole, read_source_table
from fourdvq.data.walk import walk_files
from fourdvq.errors import CohortError
from fourdvq.os_errors import reading

SCANS_REQUIRED = ("patient_id", "scan_id", "path")
SCANS_OPTIONAL = ("date", "days_from_baseline", "mask")


def scans_from_table(
    path: Path,
    folder: Path,
    columns: Mapping[str, str],
    dicom: DicomReader,
    findings: list[Finding],
    patients: Collection[str] = (),
) -> list[DatedScan]:
    """One scan for each row; one whose file or DICOM folder cannot be used is a finding, and gives its date alone.

    `patients` are those of the other table: no scan may be of one of them by its header, and of another by its row.
    """
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
        date, days = parse_date(row.get("date", "")), parse_whole(row.get("days_from_baseline", ""))
        source = _resolve(row["path"], folder, path.parent)
        if source is None:
            findings.append(finding("E_FILE", f"{where}, column path", row["path"], patient=patient, scan=scan))
            result.append(DatedScan(ScanRow(patient, scan, folder, 0), where, date, days, usable=False))
            continue
        mask = mask_of(source, row.get("mask", ""), folder, path.parent)
        if why := _trouble(source, mask):
            # The row stays, so that the patient's other scans keep their numbers; preparation waits for its files.
            findings.append(finding("E_READ", f"{where}, column path", why, patient=patient, scan=scan))
            result.append(DatedScan(ScanRow(patient, scan, source, 0, mask, _kind(source)), where, date, days))
        elif is_folder(source) or source.name.lower().endswith(DICOM_SUFFIXES):
            dicom.add_folder(ScanRow(patient, scan, source, 0, mask, "dicom"), where, date, days)
        else:
            result.append(DatedScan(ScanRow(patient, scan, source, 0, mask), where, date, days))
    return result + dicom.chosen(findings, {*patients, *(row["patient_id"] for row in table.rows)})


def scans_from_dicom(folder: Path, dicom: DicomReader, findings: list[Finding]) -> list[DatedScan]:
    """One scan for each study below `folder`, usable or not.

    Raises CohortError E_FILE or E_EMPTY if there is none, and what `from_os` says of a folder that cannot be read.
    """
    with reading(str(folder)):
        os.scandir(folder).close()
    found = dicom.add_studies(folder)
    if not found.candidates:
        if any(is_image_file(p) for p in walk_files(folder).files):
            fix = "write scans.csv: these files do not say whose they are and when they were made"
            raise CohortError("E_FILE", where="scans.csv", found="image files without DICOM headers", fix=fix)
        raise CohortError("E_EMPTY", where=str(folder), found=_skipped_text(found.skipped))
    return dicom.chosen(findings)


def place_in_time(
    dated: Sequence[DatedScan], findings: list[Finding], today: datetime.date | None
) -> tuple[tuple[ScanRow, ...], dict[str, datetime.date]]:
    """Days since each patient's first CT, scans that cannot be used left out; and the first dates, kept in memory."""
    known = [_with_known_time(scan, findings, today) for scan in dated]
    by_patient: dict[str, list[DatedScan]] = {}
    for scan in known:
        by_patient.setdefault(scan.row.patient_id, []).append(scan)
    first_dates = {patient: first for patient, scans in by_patient.items() if (first := _first_date(scans))}
    for patient, scans in sorted(by_patient.items()):
        fault = _unknown_first(scans, first_dates.get(patient))
        if fault and any(s.usable for s in scans):
            findings.append(finding("E_TIME", f"scans of patient {patient!r}", fault, patient=patient))
    rows = [
        (replace(s.row, days=(s.date - first_dates[s.row.patient_id]).days if s.date else s.days or 0), s.score)
        for s in known
        if s.usable
    ]
    return tuple(_one_per_day(rows, findings)), first_dates


def _with_known_time(scan: DatedScan, findings: list[Finding], today: datetime.date | None) -> DatedScan:
    """The scan; without its date if that is in the future, and not usable if no time is left."""
    patient = scan.row.patient_id
    if scan.date and today and scan.date > today:
        findings.append(finding("E_DATE", scan.where, "a date in the future", patient=patient, scan=scan.row.scan_id))
        return replace(scan, date=None, days=None, usable=False)
    if scan.usable and scan.date is None and scan.days is None:
        findings.append(finding("E_DATE", scan.where, "no readable date", patient=patient, scan=scan.row.scan_id))
        return replace(scan, usable=False)
    if scan.date is None and scan.days is not None and scan.days < 0:
        findings.append(finding("E_TIME", scan.where, f"day {scan.days}", patient=patient))
        return replace(scan, usable=False)
    return scan


def _first_date(scans: Sequence[DatedScan]) -> datetime.date | None:
    """The date of a patient's first CT: what a row with a date and days says, else the first date; None without any."""
    return min(_stated_firsts(scans) or {s.date for s in scans if s.date}, default=None)


def _stated_firsts(scans: Sequence[DatedScan]) -> set[datetime.date]:
    """The date of day 0, from each row that has both a date and days."""
    return {s.date - datetime.timedelta(s.days) for s in scans if s.date and s.days is not None}


def _unknown_first(scans: Sequence[DatedScan], first: datetime.date | None) -> str:
    """Why a patient's first CT may be another one than the first that is known: times would count from a wrong day."""
    dates = {s.date for s in scans if s.date}
    stated = {s.days for s in scans if s.date is None}
    firsts = _stated_firsts(scans)
    faults = {
        "dates and days that disagree": len(firsts) > 1,
        "dates, and days without a date: which day is 0 is not known": dates and stated - {None} and not firsts,
        "a scan without a date, so that the day of the first CT is not known": None in stated and 0 not in stated,
        "no scan on day 0": 0 not in stated and first not in dates,
    }
    return next((fault for fault, holds in faults.items() if holds), "")


def _one_per_day(dated: Sequence[tuple[ScanRow, tuple[int, ...]]], findings: list[Finding]) -> list[ScanRow]:
    """The scan with the better score of each day; of two equal ones the first."""
    kept: dict[tuple[str, int], tuple[ScanRow, tuple[int, ...]]] = {}
    for row, score in dated:
        key = (row.patient_id, row.days)
        if key not in kept:
            kept[key] = row, score
            continue
        better, other = ((row, score), kept[key]) if score > kept[key][1] else (kept[key], (row, score))
        kept[key] = better
        where = f"scans {better[0].scan_id!r} and {other[0].scan_id!r} of patient {row.patient_id!r}"
        why = "the better series" if better[1] != other[1] else "the first"
        findings.append(finding("W_SAMEDAY", where, f"both on day {row.days}; {why} is kept", patient=row.patient_id))
    return [row for row, _ in kept.values()]


def _resolve(text: str, *folders: Path) -> Path | None:
    tries = [folder / text for folder in folders]
    return next((path for path in tries if text and lies_there(path)), None)


def _trouble(source: Path, mask: Path | None) -> str:
    """Why the scan or its mask cannot be opened; a mask that is not there is a matter of preparation."""
    both = [source, mask] if mask is not None and lies_there(mask) else [source]
    return next(filter(None, map(why_unreadable, both)), "")


def _kind(source: Path) -> Literal["image", "dicom"]:
    return "image" if is_image_file(source) else "dicom"


def _skipped_text(skipped: Counter[str]) -> str:
    return ", ".join(f"{n} x {code}" for code, n in sorted(skipped.items())) or "no file"

"""Which scans a hospital has: rows of scans.csv, or the studies that DICOM headers name; dates become days.

Days count from the patient's first CT. A date is read, used once, and not kept.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fourdvq.data.cohort_rows import DatedScan, Finding, ScanRow, finding
from fourdvq.data.dicom_studies import DicomReader, mask_of
from fourdvq.data.limits import is_image_file
from fourdvq.data.tables import parse_date, parse_whole, read_source_table
from fourdvq.data.walk import walk_files
from fourdvq.errors import CohortError

SCANS_REQUIRED = ("patient_id", "scan_id", "path")
SCANS_OPTIONAL = ("date", "days_from_baseline", "mask")


def scans_from_table(
    path: Path, folder: Path, columns: Mapping[str, str], dicom: DicomReader, findings: list[Finding]
) -> list[DatedScan]:
    """One scan for each row whose file or DICOM folder can be used; the others become findings."""
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
        mask = mask_of(source, row.get("mask", ""), folder, path.parent)
        date, days = parse_date(row.get("date", "")), parse_whole(row.get("days_from_baseline", ""))
        if source.is_dir():
            dicom.add_folder(ScanRow(patient, scan, source, 0, mask, "dicom"), where, date, days)
        else:
            result.append(DatedScan(ScanRow(patient, scan, source, 0, mask), where, date, days))
    return result + dicom.chosen(findings)


def scans_from_dicom(folder: Path, dicom: DicomReader, findings: list[Finding]) -> list[DatedScan]:
    """One scan for each study below `folder`. Raises CohortError E_FILE or E_EMPTY if there is none."""
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
        (replace(s.row, days=(s.date - first_dates[s.row.patient_id]).days if s.date else s.days or 0), s.score)
        for s in usable
    ]
    earliest: dict[str, int] = {}
    for row, _ in rows:
        earliest[row.patient_id] = min(row.days, earliest.get(row.patient_id, row.days))
    for patient in (p for p in sorted(earliest) if earliest[p] > 0):
        findings.append(finding("E_TIME", f"scans of patient {patient!r}", "no scan on day 0", patient=patient))
    return tuple(_one_per_day(rows, findings)), first_dates


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
    return next((path for path in tries if text and path.exists()), None)


def _skipped_text(skipped: Counter[str]) -> str:
    return ", ".join(f"{n} x {code}" for code, n in sorted(skipped.items())) or "no file"

"""The cohort a hospital brings: clinical.csv, scans.csv or DICOM headers, read strictly; every fault is a finding.

A fault in a row is no exception: the patient it blocks is left out and the others go on. Only a table
that cannot be read at all stops the run. Dates become days since the patient's first CT here and go no further.
docs/reference/data.md describes both tables.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fourdvq.data.clinical_table import CLINICAL_OPTIONAL, CLINICAL_REQUIRED, ClinicalReader, accepted_words
from fourdvq.data.cohort_rows import CandidateRow, Event, Finding, PatientRow, ScanRow, finding
from fourdvq.data.dicom_studies import DicomOptions, DicomReader
from fourdvq.data.doubles import without_doubles
from fourdvq.data.prepared import CLINICAL_COLUMNS, write_table
from fourdvq.data.scan_list import (
    SCANS_OPTIONAL,
    SCANS_REQUIRED,
    place_in_time,
    scans_from_dicom,
    scans_from_table,
)
from fourdvq.data.tables import nearest, read_source_table
from fourdvq.errors import CohortError, ConfigError
from fourdvq.os_errors import reading

__all__ = [
    "Cohort",
    "Event",
    "Finding",
    "PatientRow",
    "ScanRow",
    "load_cohort",
    "pseudonym",
    "pseudonyms",
    "write_clinical",
]


@dataclass(frozen=True)
class Cohort:
    """All rows that could be read, and the findings; `usable` leaves out what a finding blocks."""

    patients: tuple[PatientRow, ...]
    scans: tuple[ScanRow, ...]
    findings: tuple[Finding, ...]
    candidates: tuple[CandidateRow, ...] = ()  # every DICOM series that a scan could have been made of
    skipped: Mapping[str, int] = field(default_factory=dict)  # files below the scan folder that are no CT, by reason

    @property
    def usable(self) -> tuple[PatientRow, ...]:
        """Patients that no finding blocks and that have a scan."""
        blocked = {f.patient_id for f in self.findings if f.blocks and not f.scan_id}
        with_scan = {s.patient_id for s in self.scans} - blocked
        return tuple(p for p in self.patients if p.patient_id in with_scan)

    def scans_of(self, patient_id: str) -> tuple[ScanRow, ...]:
        """A patient's scans in time order."""
        return tuple(sorted((s for s in self.scans if s.patient_id == patient_id), key=lambda s: (s.days, s.scan_id)))


def load_cohort(
    clinical: Path,
    scans: Path | None,
    scans_folder: Path,
    *,
    columns: Mapping[str, str] | None = None,
    values: Mapping[str, Mapping[str, str]] | None = None,
    today: datetime.date | None = None,
    dicom: DicomOptions | None = None,
) -> Cohort:
    """Read the tables (and, without scans.csv, the DICOM headers of `scans_folder`).

    `columns` maps our column names to the hospital's, `values` the hospital's words to ours, per column. `today` makes
    later dates a finding; `dicom` says how series are chosen. Raises CohortError E_FILE, E_TABLE, E_COLUMN, E_FOLDER
    and E_EMPTY, ConfigError for a choice of series that names nothing and for a column that is none of ours, and what
    `from_os` says of a table or folder that cannot be read.
    """
    with reading(str(scans_folder)):
        if not scans_folder.is_dir():
            found = "a file" if scans_folder.exists() else "nothing"
            raise CohortError("E_FOLDER", where=str(scans_folder), found=found)
    findings: list[Finding] = []
    _check_mapping(columns or {})
    table = read_source_table(clinical, required=CLINICAL_REQUIRED, optional=CLINICAL_OPTIONAL, columns=columns or {})
    if not table.columns & {"time_days", "last_contact_date"}:
        raise CohortError("E_COLUMN", where=clinical.name, found="neither time_days nor last_contact_date")
    reader = DicomReader(dicom)
    listed = {row["patient_id"] for row in table.rows}
    dated = (
        scans_from_table(scans, scans_folder, columns or {}, reader, findings, listed)
        if scans
        else scans_from_dicom(scans_folder, reader, findings)
    )
    rows, first_dates = place_in_time(without_doubles(dated, findings), findings, today)
    patients = ClinicalReader(table, accepted_words(values or {}), findings, first_dates, rows, today).read()
    _check_ids(patients, rows, table.name, scans.name if scans else str(scans_folder), findings)
    known = {p.patient_id for p in patients}
    findings += _count_findings(rows, known)
    if table.separator == ";":
        findings.append(finding("W_COMMA", table.name, "separator ;"))
    return Cohort(patients, rows, tuple(findings), _without_lost(reader.candidates, rows), dict(reader.skipped))


def pseudonym(secret: bytes, patient_id: str) -> str:
    """First 12 hex digits of HMAC-SHA256(secret, patient id): a patient's only name outside the private folder."""
    return hmac.new(secret, patient_id.encode(), hashlib.sha256).hexdigest()[:12]


def pseudonyms(secret: bytes, patient_ids: Sequence[str]) -> dict[str, str]:
    """Patient id to pseudonym. Raises CohortError E_DUPLICATE if two patients would share one."""
    result = {patient_id: pseudonym(secret, patient_id) for patient_id in patient_ids}
    if len(set(result.values())) < len(result):
        raise CohortError("E_DUPLICATE", where="the pseudonyms", found="two patients with one pseudonym")
    return result


def write_clinical(prep: Path, patients: Sequence[PatientRow], names: Mapping[str, str]) -> None:
    """Write prep/clinical.csv: the patients' rows under their pseudonyms (`names`), sorted by pseudonym."""
    rows = [
        {
            "pseudonym": names[p.patient_id],
            "age": p.age,
            "sex": p.sex,
            "smoking": p.smoking,
            "time_days": p.time_days,
            "event": p.event,
        }
        for p in patients
    ]
    write_table(prep / "clinical.csv", CLINICAL_COLUMNS, sorted(rows, key=lambda row: str(row["pseudonym"])))


def _check_mapping(columns: Mapping[str, str]) -> None:
    """A slip in the name of an optional column would pass for its absence: times would count from another day."""
    ours = (*CLINICAL_REQUIRED, *CLINICAL_OPTIONAL, *SCANS_REQUIRED, *SCANS_OPTIONAL)
    for name in (name for name in columns if name not in ours):
        wanted = ", ".join(dict.fromkeys(ours))
        raise ConfigError("E_KEY", where="site.yaml: columns", found=repr(name), wanted=wanted, fix=nearest(name, ours))


def _check_ids(
    patients: Sequence[PatientRow], scans: Sequence[ScanRow], table: str, source: str, findings: list[Finding]
) -> None:
    """Ids in one table only, in both directions, with the nearest id of the other."""
    clinical, scanned = sorted({p.patient_id for p in patients}), sorted({s.patient_id for s in scans})
    for ids, others, where, absent in ((scanned, clinical, source, table), (clinical, scanned, table, source)):
        known = set(others)
        for patient in (i for i in ids if i not in known):
            findings.append(
                finding("E_ID", where, f"{patient!r} is not in {absent}", patient=patient, fix=nearest(patient, others))
            )


def _without_lost(candidates: Sequence[CandidateRow], scans: Sequence[ScanRow]) -> tuple[CandidateRow, ...]:
    """The candidates; those of a scan that was left out afterwards, as of two on one day, are not used."""
    kept = {(s.patient_id, s.scan_id) for s in scans}
    return tuple(
        c
        if not c.used or (c.patient_id, c.scan_id) in kept
        else replace(c, used=False, by="", reject="its scan is left out, see findings.csv")
        for c in candidates
    )


def _count_findings(scans: Sequence[ScanRow], known: set[str]) -> list[Finding]:
    counts = Counter(s.patient_id for s in scans if s.patient_id in known)
    return [
        finding("W_ONE_SCAN", f"scans of patient {patient!r}", "one scan", patient=patient)
        for patient, n in sorted(counts.items())
        if n == 1
    ]

"""clinical.csv, row by row: covariates and follow-up, in our words, against the patient's scans."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fourdvq.data.cohort_rows import Finding, PatientRow, ScanRow, finding
from fourdvq.data.tables import SourceTable, nearest, parse_date, parse_number, parse_whole
from fourdvq.errors import CohortError

AGE_RANGE = (18.0, 110.0)
CLINICAL_REQUIRED = ("patient_id", "age", "sex", "smoking", "event")
CLINICAL_OPTIONAL = ("time_days", "last_contact_date", "time_origin")
UNKNOWN_WORDS = frozenset({"", "?", "-", "na", "n/a", "nan", "none", "unknown", "missing", "."})
WORDS: dict[str, dict[str, str]] = {
    "sex": {"m": "M", "male": "M", "f": "F", "female": "F"},
    "smoking": {"ever": "1", "current": "1", "former": "1", "smoker": "1", "never": "0", "non-smoker": "0"},
    "event": {
        "death": "death",
        "dead": "death",
        "censored": "censored",
        "alive": "censored",
        "transplant": "transplant",
    },
}


@dataclass
class ClinicalReader:
    """Reads clinical.csv row by row against the patients' scans."""

    table: SourceTable
    words: Mapping[str, Mapping[str, str]]
    findings: list[Finding]
    first_dates: Mapping[str, datetime.date]
    scans: Sequence[ScanRow]
    today: datetime.date | None

    def read(self) -> tuple[PatientRow, ...]:
        last: dict[str, int] = {}
        for scan in self.scans:
            last[scan.patient_id] = max(scan.days, last.get(scan.patient_id, 0))
        patients: dict[str, PatientRow] = {}
        for row, number in zip(self.table.rows, self.table.numbers, strict=True):
            patient, where = row["patient_id"], f"{self.table.name} row {number}"
            if not patient:
                self.findings.append(finding("E_ID", where, "no patient_id"))
            elif patient in patients:
                self.findings.append(finding("E_DUPLICATE", where, f"patient {patient!r} again", patient=patient))
            else:
                patients[patient] = self._row(row, where, last.get(patient, 0))
        return tuple(patients.values())

    def _row(self, row: Mapping[str, str], where: str, last_scan: int) -> PatientRow:
        patient = row["patient_id"]
        sex, smoking = self._word(row, "sex", where), self._word(row, "smoking", where)
        event = self._word(row, "event", where)
        age, time = self._age(row, where), self._time(row, where)
        if time is not None and time < last_scan:
            self._add("E_TIME", f"{where}, follow-up", f"{time} days, but a scan on day {last_scan}", patient)
        missing = [
            name
            for name, value in (("age", age), ("sex", sex), ("smoking", smoking), ("time", time), ("event", event))
            if value is None
        ]
        if missing and not self._blocked(patient):
            self._add("W_COVARIATE", where, "no " + ", ".join(missing), patient)
        return PatientRow(
            patient_id=patient,
            age=age,
            sex=sex,  # type: ignore[arg-type]  # the words of `sex` are M and F
            smoking=None if smoking is None else int(smoking),
            time_days=time,
            event=event,  # type: ignore[arg-type]  # the words of `event`
        )

    def _word(self, row: Mapping[str, str], column: str, where: str) -> str | None:
        """Our word for a field, or None. An unknown word of smoking is missing; of sex and event it is a finding."""
        text = row[column]
        known = self.words[column]
        if text.lower() in known:
            return known[text.lower()]
        if text.lower() in UNKNOWN_WORDS or column == "smoking":
            return None
        fix = nearest(text.lower(), list(known)) or f"add it to site.yaml: values: {column}"
        self._add("E_WORD", f"{where}, column {column}", repr(text), row["patient_id"], fix)
        return None

    def _age(self, row: Mapping[str, str], where: str) -> float | None:
        text = row["age"]
        if text.lower() in UNKNOWN_WORDS:
            return None
        age = parse_number(text, comma_is_decimal=True)
        if age is None or not AGE_RANGE[0] <= age <= AGE_RANGE[1]:
            self._add("E_AGE", f"{where}, column age", repr(text), row["patient_id"])
            return None
        if "," in text:
            self._add("W_COMMA", f"{where}, column age", repr(text), row["patient_id"])
        return age

    def _time(self, row: Mapping[str, str], where: str) -> int | None:
        """Days from the first CT to death or last contact."""
        text, patient = row.get("time_days", ""), row["patient_id"]
        if text.lower() not in UNKNOWN_WORDS:
            days = parse_whole(text)
            if days is not None:
                days += self._origin_shift(row, where)
            if days is None or days < 0:
                self._add("E_TIME", f"{where}, column time_days", repr(text), patient)
                return None
            return days
        text = row.get("last_contact_date", "")
        if text.lower() in UNKNOWN_WORDS:
            return None
        date, first = parse_date(text), self.first_dates.get(patient)
        if date is None or (self.today and date > self.today):
            self._add("E_DATE", f"{where}, column last_contact_date", repr(text), patient)
            return None
        if first is None:  # the scans came with days, not dates: the two cannot be put on one axis
            return None
        if date < first:
            self._add("E_TIME", f"{where}, column last_contact_date", "before the first scan", patient)
            return None
        return (date - first).days

    def _origin_shift(self, row: Mapping[str, str], where: str) -> int:
        """0, or the days from the first CT to the date that time_days counts from."""
        text, patient = row.get("time_origin", ""), row["patient_id"]
        first = self.first_dates.get(patient)
        if not text or first is None:
            return 0
        origin = parse_date(text)
        if origin is None:
            self._add("E_DATE", f"{where}, column time_origin", repr(text), patient)
            return 0
        return (origin - first).days

    def _add(self, code: str, where: str, found: str, patient: str, fix: str = "") -> None:
        self.findings.append(finding(code, where, found, patient=patient, fix=fix))

    def _blocked(self, patient: str) -> bool:
        return any(f.blocks and f.patient_id == patient for f in self.findings)


def accepted_words(values: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Per column, every accepted word in lower case and what it means; the site's own words win over ours."""
    result = {column: dict(words) for column, words in WORDS.items()}
    for column, mapping in values.items():
        if column not in result:
            raise CohortError("E_COLUMN", where="site.yaml: values", found=column, wanted=", ".join(WORDS))
        for theirs, ours in mapping.items():
            meaning = WORDS[column].get(str(ours).lower())
            if meaning is None:
                where, wanted = f"site.yaml: values.{column}.{theirs}", ", ".join(WORDS[column])
                raise CohortError("E_WORD", where=where, found=repr(ours), wanted=wanted)
            result[column][str(theirs).lower()] = meaning
    return result

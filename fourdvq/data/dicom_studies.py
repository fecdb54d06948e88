"""DICOM studies as scans: each patient's studies, the series chosen in each, and what is wrong with them.

A study's date and its patient are read here, used once, and stand in no opaque key.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fourdvq.data.choice import (
    NONE,
    Choice,
    ChoiceRules,
    Estimate,
    check_overrides,
    choose_series,
    nothing_found,
)
from fourdvq.data.cohort_rows import CandidateRow, DatedScan, Finding, ScanRow, finding
from fourdvq.data.dicom import FolderScan, SeriesCandidate, scan_files, scan_folder
from fourdvq.data.dicom_file import DICOM_SUFFIXES
from fourdvq.data.known_headers import KnownHeaders
from fourdvq.data.limits import IMAGE_SUFFIXES, shown
from fourdvq.data.reachable import is_folder, lies_there, why_unreadable
from fourdvq.data.remains import DamagedFile, damage_by_study, remains_of
from fourdvq.data.rough_lung import rough_lung_ml
from fourdvq.data.tables import parse_date
from fourdvq.errors import VolumeError

OVERRIDES = "series.yaml"


@dataclass(frozen=True)
class DicomOptions:
    """How series are chosen: hard filters, the guess of the lung volume, and a person's own choices by key.

    `progress` is told how many files were looked at, and of how many; files that `known` remembers are not opened.
    """

    rules: ChoiceRules = field(default_factory=ChoiceRules)
    estimate: Estimate | None = rough_lung_ml
    overrides: Mapping[str, str] = field(default_factory=dict)
    progress: Callable[[int, int], None] | None = None
    known: KnownHeaders | None = None


@dataclass(frozen=True)
class _Study:
    """The candidates for one scan, before one is chosen; `damaged` are files that may be slices of it.

    Of a `declared` one a table says whose it is, else the headers.
    """

    row: ScanRow
    where: str
    date: datetime.date | None
    days: int | None
    candidates: tuple[SeriesCandidate, ...]
    damaged: tuple[DamagedFile, ...] = ()
    error: VolumeError | None = None
    declared: bool = False


class DicomReader:
    """Collects studies from folders, then chooses one series for each, patient by patient.

    `candidates` and `skipped` say afterwards what there was to choose from and what was left out, by reason.
    """

    def __init__(self, options: DicomOptions | None = None) -> None:
        self._options = options or DicomOptions()
        self._studies: list[_Study] = []
        self._loose_damage: list[Path] = []
        self.candidates: list[CandidateRow] = []
        self.skipped: Counter[str] = Counter()

    def add_folder(self, row: ScanRow, where: str, date: datetime.date | None, days: int | None) -> None:
        """A DICOM folder, or one file, that the hospital's table names as one scan of a patient."""
        found = self._look(row.path)
        # Of several studies in the folder, the one of that day.
        candidates = tuple(c for c in found.candidates if date is None or _day_of(c) in (date, None))
        error = None
        if not found.candidates:
            error = nothing_found(found, row.path)
        elif not candidates:
            error = _other_day(found.candidates, row.path)
        others = {c.first.study for c in found.candidates} - {c.first.study for c in candidates}
        damaged = tuple(d for d in map(remains_of, found.unreadable) if d.study not in others)
        study = _Study(row, where, date, days, candidates, damaged, error, declared=True)
        self._studies.append(study)

    def add_studies(self, folder: Path) -> FolderScan:
        """Every study below a folder, as a scan of the patient its headers name."""
        found = self._look(folder)
        by_study: dict[tuple[str, str], list[SeriesCandidate]] = {}
        for candidate in found.candidates:
            by_study.setdefault((_patient_of(candidate), candidate.first.study), []).append(candidate)
        numbered: Counter[str] = Counter()
        damaged = damage_by_study(found.unreadable, {key: _folders_of(cs) for key, cs in by_study.items()})
        in_time = sorted(by_study.items(), key=lambda item: (item[0][0], _days_of(item[1])[:1], item[0][1]))
        for (patient, uid), candidates in in_time:
            numbered[patient] += 1
            date = next(iter(_days_of(candidates)), None)
            where = f"DICOM study of {date or 'no date'} of patient {patient!r}"
            place = _common_folder(_folders_of(candidates))
            row = ScanRow(patient, f"study-{numbered[patient]}", place, 0, mask_of(place, ""), "dicom")
            files = tuple(damaged.get((patient, uid), ()))
            self._studies.append(_Study(row, where, date, None, tuple(candidates), files))
        claimed = {d.path for some in damaged.values() for d in some}
        self._loose_damage += [p for p in found.unreadable if p not in claimed]
        return found

    def chosen(self, findings: list[Finding], listed: Collection[str] = ()) -> list[DatedScan]:
        """A scan for each study; those with a fault are findings, and not usable.

        `listed` are all patients of the tables, whose ids may stand in no other's headers. Raises ConfigError for an
        override that names nothing.
        """
        check_overrides(self._options.overrides, [s.candidates for s in self._studies], OVERRIDES)
        nobodys = "a damaged DICOM file that does not say whose it is"
        findings += [finding(_code_of(path), str(path), nobodys) for path in self._loose_damage]
        findings += _identity_findings(self._studies, listed)
        result = []
        for _, mine in sorted(_by_patient(self._studies).items()):
            faults = [_fault(s) for s in mine]
            for study, fault in zip(mine, faults, strict=True):
                if fault is not None:
                    findings.append(_noted(study, fault))
                    date = None if fault.code == "E_DATE" else study.date
                    result.append(DatedScan(study.row, study.where, date, study.days, usable=False))
            sound = [s for s, fault in zip(mine, faults, strict=True) if fault is None]
            left_out = [s for s in sound if all(self._is_left_out(c) for c in s.candidates)]
            result += [DatedScan(s.row, s.where, s.date, s.days, usable=False) for s in left_out]
            self.candidates += [row for s in left_out for row in _left_out_rows(s, self._options.rules)]
            result += self._chosen_of([s for s in sound if s not in left_out], findings)
        return result

    def _chosen_of(self, studies: Sequence[_Study], findings: list[Finding]) -> list[DatedScan]:
        """A patient's scans; those of one day with scores that compare their chosen series with each other."""
        options = self._options
        choices = choose_series(
            [tuple(c for c in s.candidates if not self._is_left_out(c)) for s in studies],
            rules=options.rules,
            estimate=options.estimate,
            overrides=options.overrides,
        )
        days: dict[object, list[SeriesCandidate]] = {}
        for study, choice in zip(studies, choices, strict=True):
            days.setdefault(study.date or study.days, []).append(choice.used)
        shared = [used for used in days.values() if len(used) > 1]
        scores = {
            id(judged.candidate): judged.score
            for day in choose_series(shared, rules=options.rules, estimate=options.estimate)
            for judged in day.judged
        }
        result = []
        for study, choice in zip(studies, choices, strict=True):
            self.candidates += _candidate_rows(study, choice)
            scan = _scan_of(study, choice, findings)
            result.append(replace(scan, score=scores.get(id(choice.used), scan.score)))
        return result

    def _is_left_out(self, candidate: SeriesCandidate) -> bool:
        return self._options.overrides.get(candidate.study_key) == NONE

    def _look(self, folder: Path) -> FolderScan:
        if folder.is_file():
            found = scan_files([folder], self._options.progress)
        else:
            found = scan_folder(folder, self._options.progress, self._options.known)
        self.skipped += found.skipped
        return found


def mask_of(source: Path, text: str, *folders: Path) -> Path | None:
    """The mask that a table names, or the file beside the scan (or DICOM folder) with its name and _lung."""
    if text:
        return next((f / text for f in folders if lies_there(f / text)), folders[0] / text)
    endings = sorted(IMAGE_SUFFIXES, key=len, reverse=True)
    known = (*endings, *DICOM_SUFFIXES)
    suffix = "" if is_folder(source) else next((e for e in known if source.name.lower().endswith(e)), "")
    stem = source.name[: len(source.name) - len(suffix)]
    beside = [source.with_name(f"{stem}_lung{ending}") for ending in endings]
    return next((path for path in beside if lies_there(path)), None)


def _by_patient(studies: Iterable[_Study]) -> dict[str, list[_Study]]:
    result: dict[str, list[_Study]] = {}
    for study in studies:
        result.setdefault(study.row.patient_id, []).append(study)
    return result


def _folders_of(candidates: Iterable[SeriesCandidate]) -> frozenset[Path]:
    return frozenset(folder for c in candidates for folder in c.folders)


def _day_of(candidate: SeriesCandidate) -> datetime.date | None:
    return parse_date(candidate.first.study_date)


def _days_of(candidates: Iterable[SeriesCandidate]) -> list[datetime.date]:
    """The days that the headers name, the first one first."""
    return sorted({day for c in candidates if (day := _day_of(c))})


def _other_day(candidates: Iterable[SeriesCandidate], folder: Path) -> VolumeError:
    found = "headers of " + ", ".join(map(str, _days_of(candidates)))
    fix = "correct the row; if the dates in the headers are not the real ones, give days_from_baseline and no date"
    return VolumeError("E_DATE", where=shown(folder), found=found, wanted="the date of the row", fix=fix)


def _patient_of(candidate: SeriesCandidate) -> str:
    """The id that most slices carry: one damaged header may not move a scan to another patient."""
    return Counter(s.patient_id for s in candidate.slices).most_common(1)[0][0]


@dataclass(frozen=True)
class _Fault:
    """What keeps a whole study out."""

    code: str
    where: str
    found: str
    fix: str = ""


def _fault(study: _Study) -> _Fault | None:
    if not study.row.patient_id:
        return _Fault("E_ID", study.where, "no PatientID")
    if study.error is not None:
        error = study.error
        return _Fault(error.code, f"{study.where}: {error.where}", error.found, error.fix)
    if len(days := _days_of(study.candidates)) > 1:
        return _Fault("E_DATE", study.where, f"series of {len(days)} days")
    born = {parse_date(c.first.birth_date) for c in study.candidates} - {None}
    if study.date is not None and any(b is not None and b > study.date for b in born):
        return _Fault("E_DATE", study.where, "a study before the patient's birth")
    return None


def _noted(study: _Study, fault: _Fault) -> Finding:
    scan = study.row.scan_id if study.row.patient_id else ""
    return finding(fault.code, fault.where, fault.found, patient=study.row.patient_id, scan=scan, fix=fault.fix)


def _scan_of(study: _Study, choice: Choice, findings: list[Finding]) -> DatedScan:
    """The scan with its chosen series; a series that may have lost a slice is a finding, and preparation refuses it."""
    used, row = choice.used, study.row
    if used.strays:
        found = "an image that lies where the scan lacks a slice, but does not belong to it by its header"
        where = str(used.strays[0].path)
        findings.append(finding("E_MIXED", where, found, patient=row.patient_id, scan=row.scan_id))
    # Unless a damaged file says that it is of another series, going on without it could lose a slice.
    others = {j.candidate.first.series for j in choice.judged} - {used.first.series}
    damaged = [d.path for d in study.damaged if d.series not in others]
    if damaged:
        found, code = f"{len(damaged)} damaged files beside the scan's slices", _code_of(*damaged)
        findings.append(finding(code, str(damaged[0]), found, patient=row.patient_id, scan=row.scan_id))
    files = tuple(sorted({*used.files, *damaged})) if damaged else used.files
    split = "W_SPLIT" in used.warnings
    row = replace(row, study_key=used.study_key, series_key=used.series_key, files=files, split=split)
    score = next(j.score for j in choice.judged if j.candidate is used)
    return DatedScan(row, study.where, study.date, study.days, score, used)


def _code_of(*damaged: Path) -> str:
    """E_READ if any of the files cannot even be opened: then it is the share or a right that wants mending."""
    return "E_READ" if any(map(why_unreadable, damaged)) else "E_CORRUPT"


def _candidate_rows(study: _Study, choice: Choice) -> list[CandidateRow]:
    row = study.row
    return [
        CandidateRow(
            patient_id=row.patient_id,
            scan_id=row.scan_id,
            study_key=j.candidate.study_key,
            series_key=j.candidate.series_key,
            used=j.candidate is choice.used,
            by=choice.by if j.candidate is choice.used else "",
            reject=j.reject or ("" if j.candidate is choice.used else _lost_by(j.score, choice.judged[0].score)),
            folder=j.candidate.first.path.parent,
            words=j.words,
        )
        for j in choice.judged
    ]


def _left_out_rows(study: _Study, rules: ChoiceRules) -> list[CandidateRow]:
    """The candidates of a study that a person leaves out, so that it can be taken back."""
    (choice,) = choose_series([study.candidates], rules=rules)
    return [replace(row, used=False, by="", reject=f"{OVERRIDES}: {NONE}") for row in _candidate_rows(study, choice)]


_CRITERIA = (
    "no geometry", "too few slices", "coverage", "thickness", "breathed out", "not thin", "not named inspiration",
    "smaller lung", "another kernel than the other visits", "kernel", "contrast", "fewer slices",
)  # fmt: skip


def _lost_by(score: Sequence[int], best: Sequence[int]) -> str:
    """The first criterion in which a candidate falls behind the best one."""
    return next((word for word, a, b in zip(_CRITERIA, score, best, strict=True) if a < b), "equal; settled by the key")


def _identity_findings(studies: Sequence[_Study], listed: Collection[str]) -> list[Finding]:
    """Whoever is named by two birth dates or sexes, or whose headers name another patient of the tables."""
    findings = []
    for patient, mine in _by_patient(studies).items():
        persons = {(s.patient_id, s.sex, s.birth_date) for x in mine for c in x.candidates for s in c.slices}
        ids = {person[0] for person in persons}
        where = f"DICOM headers of patient {patient!r}"
        sexes = {sex.upper() for _, sex, _ in persons} & {"M", "F"}
        several = {"patient id": ids, "sex": sexes, "birth date": {born for *_, born in persons} - {""}}
        if any(s.declared for s in mine):
            others = sorted((ids & set(listed)) - {patient})
            if others:
                findings.append(finding("E_IDENTITY", where, f"the id of patient {others[0]!r}", patient=patient))
            elif len(several.pop("patient id") - {""}) > 1:
                # Some exports give each visit an id of its own; the table says whose they are.
                findings.append(finding("W_IDENTITY", where, f"{len(ids)} values of patient id", patient=patient))
            several.pop("patient id", None)
        findings += [
            finding("E_IDENTITY", where, f"{len(values)} values of {what}", patient=patient)
            for what, values in several.items()
            if len(values) > 1
        ]
    return findings


def _common_folder(folders: Collection[Path]) -> Path:
    folder = next(iter(folders))
    while not all(other.is_relative_to(folder) for other in folders):
        folder = folder.parent
    return folder

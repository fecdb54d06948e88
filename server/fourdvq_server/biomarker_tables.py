"""Hospitals that have a CSV of biomarkers and no images: one file is one site, all files lie on this machine.

Columns `pseudonym` (or `id`, `patient_id`), `time_days`, `event`, `age`, `sex`, `smoking`; every other column is a
biomarker. The biomarkers of the first file, in its order, must be in all files.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fourdvq.data.clinical_table import UNKNOWN_WORDS, ClinicalReader, accepted_words
from fourdvq.data.cohort_rows import Finding
from fourdvq.data.tables import SourceTable, parse_number, read_source_table
from fourdvq.errors import CohortError
from fourdvq.survival.biomarkers import biomarker_table
from fourdvq.survival.table import CoxSite

ID_NAMES = ("pseudonym", "id", "patient_id")
CLINICAL = ("time_days", "event", "age", "sex", "smoking")
NUMBER_WORDS: Mapping[str, Mapping[str, str]] = {
    "sex": {"0": "F", "1": "M"},
    "smoking": {"0": "0", "1": "1", "yes": "1", "no": "0"},
    "event": {"0": "censored", "1": "death"},
}


@dataclass(frozen=True)
class _Row:
    """A clinical row as the survival table wants it."""

    pseudonym: str
    age: float | None
    sex: int | None
    smoking: int | None
    time_days: int | None
    event: int | None


@dataclass(frozen=True)
class TableSites:
    """The sites by file name without its ending, the biomarkers' names, and patients left out per site and reason."""

    sites: tuple[CoxSite, ...]
    biomarkers: tuple[str, ...]
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)


def read_tables(paths: Sequence[Path], *, transplant: str = "censor") -> TableSites:
    """Raises CohortError with file, row and column for what cannot be used: E_FILE, E_TABLE, E_COLUMN, E_DUPLICATE,
    E_WORD, E_TIME, E_AGE, E_VALUE. Patients with a missing covariate or biomarker are left out and counted."""
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise CohortError("E_DUPLICATE", where="--table", found="two files of one name", wanted="a name for each site")
    biomarkers = _biomarkers_of(paths[0])
    sites, left_out = [], {}
    for path in paths:
        site, left_out[path.stem] = _site(path, biomarkers, transplant)
        sites.append(site)
    return TableSites(tuple(sites), biomarkers, left_out)


def _biomarkers_of(path: Path) -> tuple[str, ...]:
    header = _header(path)
    found = tuple(name for name in header if name not in (*ID_NAMES, *CLINICAL))
    if not found:
        raise CohortError("E_COLUMN", where=path.name, found="no column of a biomarker", wanted="at least one", fix="")
    if "" in found or len(set(header)) < len(header):
        raise CohortError("E_TABLE", where=path.name, found="a column without a name, or one name twice")
    return found


def _header(path: Path) -> list[str]:
    # Read with the columns that must be there, so that a missing or broken file has the same code as everywhere.
    separator = read_source_table(path, required=("time_days", "event"), optional=(), columns={}).separator
    text = path.read_text(encoding="utf-8-sig").lstrip()
    return [name.strip() for name in next(csv.reader(io.StringIO(text), delimiter=separator))]


def _site(path: Path, biomarkers: tuple[str, ...], transplant: str) -> tuple[CoxSite, dict[str, int]]:
    header = _header(path)
    named = next((name for name in ID_NAMES if name in header), ID_NAMES[0])
    table = read_source_table(
        path, required=("patient_id", *CLINICAL, *biomarkers), optional=(), columns={"patient_id": named}
    )
    findings: list[Finding] = []
    words = {column: {**words, **NUMBER_WORDS[column]} for column, words in accepted_words({}).items()}
    patients = ClinicalReader(table, words, findings, {}, (), None).read()
    for problem in findings:
        if problem.blocks:
            raise CohortError(problem.code, where=problem.where, found=problem.found, fix=_fix(problem))
    events = {"death": 1, "censored": 0, "transplant": int(transplant == "event"), None: None}
    rows = [
        _Row(p.patient_id, p.age, {"M": 1, "F": 0, None: None}[p.sex], p.smoking, p.time_days, events[p.event])
        for p in patients
    ]
    made = biomarker_table(_shares(table, biomarkers), rows, name=path.stem)
    left_out = {"incomplete clinical row": made.incomplete, "missing biomarker": made.without_histogram}
    return made.site, {reason: count for reason, count in left_out.items() if count}


def _fix(problem: Finding) -> str:
    if problem.code != "E_WORD":
        return problem.fix
    known = {"sex": "M, F, 0 (female), 1 (male)", "event": "death, censored, transplant, 0 (censored), 1 (death)"}
    return "use one of: " + next((words for column, words in known.items() if column in problem.where), "0, 1")


def _shares(table: SourceTable, biomarkers: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Biomarkers (K,) of every patient who has all of them."""
    found = {}
    for row, number in zip(table.rows, table.numbers, strict=True):
        if any(row[name].lower() in UNKNOWN_WORDS for name in biomarkers):
            continue
        values = [parse_number(row[name], comma_is_decimal=table.separator != ",") for name in biomarkers]
        for name, value in zip(biomarkers, values, strict=True):
            if value is None or not np.isfinite(value):
                where = f"{table.name} row {number}, column {name}"
                raise CohortError("E_VALUE", where=where, found=repr(row[name]), wanted="a number", fix="")
        found[row["patient_id"]] = np.array(values, dtype=np.float64)
    return found

"""What a site says about its intake, and what intake tells the site: series.yaml in, candidates.csv out.

candidates.csv shows every series that could have been used, under opaque keys; `private/series.csv` says in which
folder each key is found. A line `study-...: series-...` in series.yaml overrules the choice, and `study-...: none`
leaves a study out. `private/headers` keeps what DICOM headers said, for the next time.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fourdvq.data.choice import NONE, ChoiceRules
from fourdvq.data.cohort import Cohort, Finding, pseudonyms
from fourdvq.data.dicom_studies import OVERRIDES, DicomOptions
from fourdvq.data.files import csv_bytes
from fourdvq.data.known_headers import KnownHeaders
from fourdvq.data.limits import shown
from fourdvq.errors import ConfigError
from fourdvq.preprocessing.profile import Profile
from fourdvq_client.site_secret import site_secret
from fourdvq_client.workspace import Workspace, read_profile, write_private
from fourdvq_client.yaml_file import read_yaml

FINDING_COLUMNS = ("code", "where", "found", "fix", "patient_id", "scan_id")
CANDIDATE_COLUMNS = (
    "patient", "study", "series", "used", "by", "slices", "thickness", "breath", "lung", "kernel", "contrast", "reject",
)  # fmt: skip
_WORDS = CANDIDATE_COLUMNS[5:11]
_ROW = re.compile(r"(.+) (row \d+(?:, [a-z-]+(?: \w+)?)?)")


@dataclass(frozen=True)
class ShownFinding:
    """A finding without anything that names a patient, a date or a path; findings.csv has the rest."""

    code: str
    patient: str  # pseudonym, or empty
    where: str
    fix: str


def candidates_file(workspace: Workspace) -> Path:
    """Every series that a scan could have been made of, with its score in words."""
    return workspace.root / "candidates.csv"


@contextlib.contextmanager
def remembered_headers(workspace: Workspace) -> Iterator[KnownHeaders]:
    """The headers read by earlier runs; what this one reads is kept for the next, also if it is broken off.

    It only saves time: a memory that cannot be read or written costs reading the headers again, and nothing else.
    """
    try:
        stored = workspace.headers.read_bytes()
    except OSError:
        stored = b""
    known = KnownHeaders(stored)
    finished = False
    try:
        with _collector_paused():
            yield known
        finished = True
    finally:
        # A run that was broken off has not seen all files, so that it forgets none. Of runs side by side, each of which
        # sees all files, the last one to end leaves its memory.
        if workspace.private.is_dir() and known.changed(all_met=finished):
            with contextlib.suppress(OSError):
                write_private(workspace.headers, known.as_text(all_met=finished))


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Headers by the hundred thousand hold no cycle, and looking for one again and again takes a third of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def dicom_options(
    workspace: Workspace,
    progress: Callable[[int, int], None] | None = None,
    known: KnownHeaders | None = None,
) -> DicomOptions:
    """How this site chooses series: the profile's limits, and series.yaml if there is one.

    Raises ConfigError E_TYPE or E_VALUE for a series.yaml that is not made of keys.
    """
    rules = _rules(read_profile(workspace)) if workspace.profile_json.is_file() else ChoiceRules()
    return DicomOptions(
        rules=rules, overrides=read_overrides(workspace.root / OVERRIDES), progress=progress, known=known
    )


def read_overrides(path: Path) -> dict[str, str]:
    """Study key to series key, or to `none` for a study to leave out; empty if there is no such file."""
    if not path.is_file():
        return {}
    overrides: dict[str, str] = {}
    for study, series in read_yaml(path).items():
        for key, kind, word in ((study, "study", None), (series, "series", NONE)):
            if not isinstance(key, str) or (key != word and not re.fullmatch(rf"{kind}-[0-9a-f]{{12}}", key)):
                wanted = f"{kind}- and 12 hex digits, as in candidates.csv" + (f", or {word}" if word else "")
                raise ConfigError("E_VALUE", where=f"{OVERRIDES}: {study}", found=repr(key), wanted=wanted)
        overrides[study] = series
    return overrides


def write_intake(workspace: Workspace, cohort: Cohort) -> None:
    """Write findings.csv, candidates.csv and private/series.csv, each for the owner's eyes only (mode 0600)."""
    findings = [[getattr(f, c) for c in FINDING_COLUMNS] for f in cohort.findings]
    write_private(workspace.findings, _shown_csv(FINDING_COLUMNS, findings))
    names = _names(workspace, (c.patient_id for c in cohort.candidates))
    rows = [
        [names[c.patient_id], c.study_key, c.series_key, "yes" if c.used else "", c.by]
        + [c.words.get(word, "") for word in _WORDS]
        + [c.reject]
        for c in cohort.candidates
    ]
    write_private(candidates_file(workspace), _shown_csv(CANDIDATE_COLUMNS, sorted(rows)))
    places = sorted([c.study_key, c.series_key, c.patient_id, shown(c.folder)] for c in cohort.candidates)
    write_private(workspace.private / "series.csv", _shown_csv(("study", "series", "patient_id", "folder"), places))


def shown_findings(workspace: Workspace, findings: Sequence[Finding], tables: Mapping[str, str]) -> list[ShownFinding]:
    """The findings as they may be printed; `tables` maps the names of the hospital's files to what we call them."""
    from fourdvq.errors import explain

    names = _names(workspace, (f.patient_id for f in findings))
    return [
        ShownFinding(f.code, names.get(f.patient_id, ""), _place(f.where, tables), explain(f.code).fix)
        for f in findings
    ]


def _place(where: str, tables: Mapping[str, str]) -> str:
    """The row and column of a table; anything else may hold a name and is only in findings.csv."""
    found = _ROW.fullmatch(where)
    return f"{tables[found[1]]} {found[2]}" if found and found[1] in tables else "see findings.csv"


def _names(workspace: Workspace, patients: Iterable[str]) -> dict[str, str]:
    ids = sorted(set(patients) - {""})
    return pseudonyms(site_secret(workspace), ids)


def _rules(profile: Profile) -> ChoiceRules:
    """The hard filters of the profile; what it only warns of filters nothing."""
    limits = profile.limits
    return ChoiceRules(
        min_coverage_mm=limits.min_coverage_mm if limits.cut_field == "refuse" else 0.0,
        max_thickness_mm=limits.max_thickness_mm if limits.thick == "refuse" else float("inf"),
    )


def _shown_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    return csv_bytes(columns, rows, errors="backslashreplace")  # a path need not be UTF-8

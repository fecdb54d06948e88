"""From the hospital's tables and scans to prep/: pseudonyms, parallel preparation, splits, the manifest.

Real ids are read from the hospital's own tables and written to two places only: findings.csv and private/.
"""

from __future__ import annotations

import csv
import io
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from fourdvq.data.cohort import Cohort, Finding, load_cohort, pseudonyms, write_clinical
from fourdvq.data.prepared import read_splits, write_splits
from fourdvq.data.review import rejected_indices
from fourdvq.data.splits import SplitPatient, assign_splits
from fourdvq.errors import CohortError
from fourdvq.plan import SplitSpec
from fourdvq.preprocessing.pipeline import PatientResult, scan_inputs, write_manifest
from fourdvq.preprocessing.profile import require_supported
from fourdvq_client.approval import LATEST, find_plan
from fourdvq_client.patient_pool import PatientJob, prepare_all
from fourdvq_client.policy import load_policy
from fourdvq_client.site_folder import SECRET_BYTES
from fourdvq_client.workspace import SiteConfig, Workspace, read_profile, write_private

FINDING_COLUMNS = ("code", "where", "found", "fix", "patient_id", "scan_id")
_LEFT_OUT = ".left-out"  # below the depth at which prepared scans are looked for


@dataclass(frozen=True)
class PreparationSummary:
    """What became of the scans: counts by status and by code."""

    patients: int
    scans: int
    reused: int
    blocking: int  # findings of the tables that left a patient or scan out before any pixel was read
    by_status: dict[str, int]
    by_code: dict[str, int]
    splits: dict[str, int]
    details: tuple[str, ...]  # pseudonym, scan, code and words, for people at the site

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {**vars(self), "details": list(self.details)}

    @property
    def some_refused(self) -> bool:
        """Whether any scan was refused or failed, or a finding left it out."""
        return bool(self.blocking) or any(self.by_status.get(status) for status in ("refused", "failed"))


def read_cohort(workspace: Workspace, config: SiteConfig) -> Cohort:
    """The hospital's tables and scans as they are now; the findings are written to findings.csv (mode 0600)."""
    cohort = load_cohort(
        config.clinical,
        config.scans_csv,
        config.scans,
        columns=config.columns,
        values=config.values,
        today=datetime.now(UTC).date(),
    )
    write_private(
        workspace.findings, _csv(FINDING_COLUMNS, ([getattr(f, c) for c in FINDING_COLUMNS] for f in cohort.findings))
    )
    return cohort


def prepare_site(
    workspace: Workspace,
    config: SiteConfig,
    *,
    workers: int = 0,
    retry_failed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PreparationSummary:
    """Prepare every usable patient; what did not change is kept. `workers` 0 takes the number from site.yaml.

    Raises ConfigError for the profile, CohortError for tables that cannot be read, TemporaryStop DISK_FULL.
    """
    profile = read_profile(workspace)
    require_supported(profile)
    cohort = read_cohort(workspace, config)
    if not cohort.usable:
        raise CohortError(
            "E_FEW", where=str(config.clinical), found="no usable patient", fix=f"see {workspace.findings.name}"
        )
    names = pseudonyms(site_secret(workspace), [p.patient_id for p in cohort.usable])
    _write_names(workspace, names)
    _set_apart_others(workspace, set(names.values()))
    from fourdvq.preprocessing.inputs import SourceHashes

    hashes = SourceHashes(workspace.state / "source_hashes.json")
    jobs = [
        PatientJob(
            pseudonym=names[p.patient_id],
            scans=tuple(scan_inputs(cohort, p.patient_id, hashes)),
            excluded=rejected_indices(workspace.prep, names[p.patient_id]),
        )
        for p in cohort.usable
    ]
    hashes.save()
    results = prepare_all(
        jobs, profile, workspace.prep, workers=workers or config.workers, retry_failed=retry_failed, progress=progress
    )
    write_clinical(workspace.prep, cohort.usable, names)
    splits = _split(workspace, cohort, names, results)
    write_manifest(workspace.prep, results)
    return _summary(results, splits, blocking(cohort.findings))


def site_secret(workspace: Workspace) -> bytes:
    """The key of pseudonyms and splits; made once, never changed: another one would rename every patient."""
    if not workspace.secret.is_file():
        if workspace.patients.is_file():
            raise CohortError(
                "E_FILE", where=str(workspace.secret), fix="restore private/secret from a backup: it names the patients"
            )
        write_private(workspace.secret, secrets.token_bytes(SECRET_BYTES))
    return workspace.secret.read_bytes()


def real_ids(workspace: Workspace) -> dict[str, str]:
    """Pseudonym to real id, from private/; empty before the first preparation."""
    if not workspace.patients.is_file():
        return {}
    with workspace.patients.open(encoding="utf-8", newline="") as stream:
        return {row["pseudonym"]: row["patient_id"] for row in csv.DictReader(stream)}


def pseudonym_of(workspace: Workspace, named: str) -> str:
    """The pseudonym of a patient named by pseudonym or real id. CohortError E_PATIENT with the nearest if unknown."""
    import difflib

    known = real_ids(workspace)
    if named in known:
        return named
    backwards = {real: pseudonym for pseudonym, real in known.items()}
    if named in backwards:
        return backwards[named]
    close = difflib.get_close_matches(named, [*known, *backwards], n=1)
    hint = f"did you mean {close[0]}?" if close else ""
    raise CohortError("E_PATIENT", where="patient", found=named, fix=hint)


def blocking(findings: Iterable[Finding]) -> int:
    """How many findings leave a scan or patient out."""
    return sum(f.blocks for f in findings)


def _split(
    workspace: Workspace, cohort: Cohort, names: dict[str, str], results: Sequence[PatientResult]
) -> dict[str, int]:
    """Give every prepared patient a split; those who have one keep it."""
    prepared = {r.pseudonym: sum(bool(s.content_sha256) for s in r.scans) for r in results}
    patients = [
        SplitPatient(names[p.patient_id], prepared[names[p.patient_id]], p.event == "death")
        for p in cohort.usable
        if prepared.get(names[p.patient_id])
    ]
    existing = read_splits(workspace.prep)
    assigned = assign_splits(patients, key=site_secret(workspace), shares=_shares(workspace), existing=existing)
    write_splits(workspace.prep, assigned)
    present = {p.pseudonym for p in patients}
    return dict(Counter(split for pseudonym, split in assigned.items() if pseudonym in present))


def _shares(workspace: Workspace) -> SplitSpec:
    """All test at an external site; else the shares of the plan that came last, or the defaults before any came."""
    if load_policy(workspace.policy_yaml).rules.role == "external":
        return SplitSpec(train=0.0, validation=0.0, test=1.0)
    return find_plan(workspace, LATEST).splits if (workspace.plans / LATEST).is_file() else SplitSpec()


def _set_apart_others(workspace: Workspace, present: set[str]) -> None:
    """Move prepared patients that are no longer in the tables out of what training reads, and back if they return.

    Not deleted: a table that was saved half would cost days of work.
    """
    apart = workspace.prep / _LEFT_OUT
    for folder in [p for p in workspace.prep.glob("*") if p.is_dir() and p.name != _LEFT_OUT]:
        if folder.name not in present:
            apart.mkdir(exist_ok=True)
            shutil.rmtree(apart / folder.name, ignore_errors=True)
            folder.rename(apart / folder.name)
    for folder in apart.glob("*") if apart.is_dir() else ():
        if folder.name in present and not (workspace.prep / folder.name).exists():
            folder.rename(workspace.prep / folder.name)


def _write_names(workspace: Workspace, names: dict[str, str]) -> None:
    """The table of all patients ever seen: a name once given is never forgotten."""
    known = {real: pseudonym for pseudonym, real in real_ids(workspace).items()} | names
    write_private(workspace.patients, _csv(("patient_id", "pseudonym"), sorted(known.items())))


def _summary(results: Sequence[PatientResult], splits: dict[str, int], blocked: int) -> PreparationSummary:
    scans = [(r.pseudonym, s) for r in results for s in r.scans]
    told = tuple(
        f"{pseudonym} scan {s.index}: {s.code} {s.detail}".rstrip()
        for pseudonym, s in scans
        if s.status in ("refused", "failed") and s.code
    )
    return PreparationSummary(
        patients=len(results),
        scans=len(scans),
        reused=sum(s.reused for _, s in scans),
        blocking=blocked,
        by_status=dict(Counter(s.status for _, s in scans)),
        by_code=dict(Counter(s.code for _, s in scans if s.code)),
        splits=splits,
        details=told,
    )


def _csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode()

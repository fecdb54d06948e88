"""From the hospital's tables and scans to prep/: pseudonyms, what has to be made, parallel preparation, the summary.

Real ids are read from the hospital's own tables and written to two places only: findings.csv and private/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from fourdvq.data.cohort import Cohort, Finding, load_cohort, pseudonyms
from fourdvq.data.review import read_decisions
from fourdvq.errors import CohortError, explain
from fourdvq.preprocessing.manifest import DamagedScan, verify, write_manifest
from fourdvq.preprocessing.pipeline import PatientResult, StepInHand, forget_step, scan_inputs, settled_patient
from fourdvq.preprocessing.profile import Profile, require_supported
from fourdvq_client.cohort_tables import finish_tables, set_apart_others, write_names
from fourdvq_client.intake import dicom_options, remembered_headers, write_intake
from fourdvq_client.shards import WHOLE, Shard, tables_locked
from fourdvq_client.site_secret import real_ids, site_secret
from fourdvq_client.workspace import SiteConfig, Workspace, read_profile

if TYPE_CHECKING:
    from fourdvq_client.patient_worker import PatientJob

__all__ = [
    "PreparationSummary",
    "Request",
    "blocking",
    "prepare_site",
    "pseudonym_of",
    "read_cohort",
    "real_ids",
    "site_secret",
    "verify_site",
]

_SAVED_EVERY = 50  # newly hashed files: hashing a cohort takes minutes, and a kill should not cost them


@dataclass(frozen=True)
class Request:
    """What a person asks of a preparation."""

    shard: Shard = WHOLE
    retry_failed: bool = False  # refused and failed scans are tried again
    force: str = ""  # a step from which everything is made again
    auto_approve: bool = False  # approve undecided scans of grade PASS
    scan_seconds: float = 10_800.0
    isolated: bool = False  # a process of its own even for a single worker


@dataclass(frozen=True)
class PreparationSummary:
    """What became of the scans of this run: counts by status and by code."""

    patients: int
    scans: int
    reused: int
    blocking: int  # findings of the tables that left a patient or scan out before any pixel was read
    by_status: dict[str, int]
    by_code: dict[str, int]
    splits: dict[str, int]
    details: tuple[str, ...]  # pseudonym, scan, code and words, for people at the site
    workers: int  # processes that worked side by side; 0 if nothing had to be made
    auto_approved: int
    waiting: int  # scans of the cohort that other shards have not made yet
    contact_sheet: str

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {**vars(self), "details": list(self.details), "remedies": self.remedies()}

    def remedies(self) -> dict[str, str]:
        """What to do about each code."""
        return {code: explain(code).fix for code in sorted(self.by_code)}

    @property
    def some_refused(self) -> bool:
        """Whether any scan was refused or failed, or a finding left it out."""
        return bool(self.blocking) or any(self.by_status.get(status) for status in ("refused", "failed"))


@dataclass(frozen=True)
class Verification:
    """How much was read, and what is not as it was written."""

    patients: int
    scans: int
    damaged: tuple[DamagedScan, ...]


def read_cohort(workspace: Workspace, config: SiteConfig, progress: Callable[[int, int], None] | None = None) -> Cohort:
    """The hospital's tables and scans as they are now; findings.csv and candidates.csv (mode 0600) say what was found.

    The header of a DICOM file that has not changed since the last time is not read again.
    `progress` is told how many files of a DICOM folder were looked at, and of how many. Raises CohortError for tables
    that cannot be read, ConfigError for a series.yaml that names nothing.
    """
    with remembered_headers(workspace) as known:
        cohort = load_cohort(
            config.clinical,
            config.scans_csv,
            config.scans,
            columns=config.columns,
            values=config.values,
            today=datetime.now(UTC).date(),
            dicom=dicom_options(workspace, progress, known),
        )
    write_intake(workspace, cohort)
    return cohort


def prepare_site(
    workspace: Workspace,
    config: SiteConfig,
    *,
    workers: int = 0,
    request: Request | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> PreparationSummary:
    """Prepare every usable patient of the shard; what did not change is kept. `workers` 0 takes site.yaml's number.

    `progress` is called with (patients done, all patients), `on_step` with the step in hand. Whoever calls holds
    `shards.preparing`. Raises ConfigError for the profile, CohortError for tables that cannot be read, TemporaryStop
    DISK_FULL.
    """
    request = request or Request()
    profile = read_profile(workspace)
    cohort = read_cohort(workspace, config)
    if not cohort.usable:
        raise CohortError(
            "E_FEW", where=str(config.clinical), found="no usable patient", fix=f"see {workspace.findings.name}"
        )
    with tables_locked(workspace):
        names = pseudonyms(site_secret(workspace), [p.patient_id for p in cohort.usable])
        write_names(workspace, names)
        set_apart_others(workspace, set(names.values()), request.shard)
    jobs = _jobs(workspace, cohort, names, request, on_step)
    if request.force:
        for job in jobs:
            forget_step(workspace.prep / job.pseudonym, request.force)
    watcher = _Watcher(len(jobs), progress, on_step)
    settled = _settled(jobs, profile, workspace, watcher)
    to_make = [job for job in jobs if job.pseudonym not in settled]
    used, made = _make(to_make, profile, workspace, config, workers, request, watcher) if to_make else (0, [])
    results = settled | {r.pseudonym: r for r in made}
    finished = finish_tables(workspace, cohort, names, whole=request.shard.whole, auto_approve=request.auto_approve)
    return _summary(
        [results[job.pseudonym] for job in jobs],
        blocking=blocking(cohort.findings),
        splits=finished.splits,
        workers=used,
        auto_approved=finished.auto_approved,
        waiting=finished.waiting,
        contact_sheet=str(finished.contact_sheet),
    )


def verify_site(
    workspace: Workspace, shard: Shard, *, progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Read and hash every prepared file of the shard's patients; what is damaged is made again by the next run.

    Whoever calls holds `shards.preparing`.
    """
    prep = workspace.prep
    mine = sorted(p.name for p in prep.glob("*") if p.is_dir() and not p.name.startswith(".") and shard.has(p.name))
    scans = sum(1 for name in mine for _ in (prep / name).glob("*/step.json"))  # without one it is yet to be made
    damaged: list[DamagedScan] = []
    for done, found in enumerate(verify(prep, mine), start=1):
        damaged += found
        if progress is not None:
            progress(done, len(mine))
    with tables_locked(workspace):
        write_manifest(prep)
    return Verification(len(mine), scans, tuple(damaged))


def pseudonym_of(workspace: Workspace, named: str) -> str:
    """The pseudonym of a patient named by pseudonym or real id. CohortError E_PATIENT if unknown, with the nearest.

    The nearest is named by pseudonym, also for a slip in a real id: nobody's real id is printed.
    """
    import difflib

    known = real_ids(workspace)
    if named in known:
        return named
    backwards = {real: pseudonym for pseudonym, real in known.items()}
    if named in backwards:
        return backwards[named]
    close = difflib.get_close_matches(named, [*known, *backwards], n=1)
    hint = f"did you mean {backwards.get(close[0], close[0])}?" if close else ""
    raise CohortError("E_PATIENT", where="patient", found=named, fix=hint)


def blocking(findings: Iterable[Finding]) -> int:
    """How many findings leave a scan or patient out."""
    return sum(f.blocks for f in findings)


class _Watcher:
    """Counts patients and names steps for whoever waits."""

    def __init__(
        self, total: int, progress: Callable[[int, int], None] | None, on_step: Callable[[str], None] | None
    ) -> None:
        self._total = total
        self._done = 0
        self._progress = progress
        self._on_step = on_step

    def step(self, pseudonym: str, step: StepInHand) -> None:
        """A step begins."""
        if self._on_step is not None:
            self._on_step(f"{pseudonym} scan {step.scan.index}: {step.name}")

    def patient(self, result: PatientResult) -> None:
        """A patient is done."""
        del result
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _jobs(
    workspace: Workspace,
    cohort: Cohort,
    names: dict[str, str],
    request: Request,
    on_step: Callable[[str], None] | None,
) -> list[PatientJob]:
    """The shard's patients, with the content hashes of their files; those are remembered as they are found."""
    from fourdvq.preprocessing.inputs import SourceHashes
    from fourdvq_client.patient_worker import PatientJob

    hashes = SourceHashes(workspace.state / "source_hashes.json")
    rejected = read_decisions(workspace.prep).rejected()
    mine = [p for p in cohort.usable if request.shard.has(names[p.patient_id])]
    jobs = []
    for patient in mine:
        name = names[patient.patient_id]
        scans = tuple(scan_inputs(cohort, patient.patient_id, hashes))
        retry = frozenset(s.index for s in scans) if request.retry_failed else frozenset()
        jobs.append(PatientJob(name, scans, rejected.get(name, frozenset()), retry))
        if hashes.new >= _SAVED_EVERY:
            _save(workspace, hashes.save)
            if on_step is not None:
                on_step(f"hashed the files of {len(jobs)} of {len(mine)} patients")
    _save(workspace, partial(hashes.save, all_met=request.shard.whole))
    return jobs


def _save(workspace: Workspace, save: Callable[[], None]) -> None:
    with tables_locked(workspace):
        save()


def _settled(
    jobs: Sequence[PatientJob], profile: Profile, workspace: Workspace, watcher: _Watcher
) -> dict[str, PatientResult]:
    """The patients of whom nothing has to be made; no process is started for them, and no image library loaded."""
    settled = {}
    for job in jobs:
        result = settled_patient(
            job.scans, profile, workspace.prep, pseudonym=job.pseudonym, rejected=job.rejected, retry=job.retry
        )
        if result is not None:
            settled[job.pseudonym] = result
            watcher.patient(result)
    return settled


def _make(
    jobs: Sequence[PatientJob],
    profile: Profile,
    workspace: Workspace,
    config: SiteConfig,
    workers: int,
    request: Request,
    watcher: _Watcher,
) -> tuple[int, list[PatientResult]]:
    """The number of workers that the memory allows, and what they made."""
    from fourdvq.data.limits import ReaderLimits
    from fourdvq_client.patient_pool import Limits, Means, prepare_all
    from fourdvq_client.policy import load_policy
    from fourdvq_client.worker_memory import free_memory, worker_need

    require_supported(profile)
    free = free_memory()
    beside = 1 if config.device.startswith("cuda") else workers or config.workers  # a GPU's memory is for one at a time
    asked = min(beside, len(jobs))
    count = min(asked, max(1, free // worker_need(profile)))
    in_process = count == 1 and not request.isolated
    bounds = load_policy(workspace.policy_yaml).rules.limits
    readers = ReaderLimits(bounds.max_voxels, bounds.spacing_mm, bounds.decode_memory_mb)
    means = Means(profile, workspace.prep, config.device, config.weights, readers)
    limits = Limits(0 if in_process else count, free, request.scan_seconds, bounds.decode_seconds)
    return count, prepare_all(jobs, means, limits, watcher)


def _summary(results: Sequence[PatientResult], **facts: object) -> PreparationSummary:
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
        by_status=dict(Counter(s.status for _, s in scans)),
        by_code=dict(Counter(s.code for _, s in scans if s.code)),
        details=told,
        **facts,  # type: ignore[arg-type]
    )

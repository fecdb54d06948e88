"""A site inside another program of the same machine: what `fourdvq-server demo` calls, by name, never by import.

Entry point `fourdvq.apps: client`. Everything is done as at a hospital, with the same folders, policy and guard.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

Progress = Callable[[int, int], None]


def create_site(
    root: Path,
    *,
    site: str,
    role: str,
    template: str = "demo",
    scans: Path,
    clinical: Path,
    scans_csv: Path | None = None,
    invitation: Mapping[str, Any] | None = None,
    profile: Mapping[str, Any] | None = None,
) -> None:
    """Make a site folder as `fourdvq-client init` does. Raises ConfigError E_EXISTS if there is one."""
    from fourdvq.config import build
    from fourdvq.wire.invitation import Invitation
    from fourdvq_client import site_folder

    settings = site_folder.SiteSettings(site=site, role=role, scans=scans, clinical=clinical, scans_csv=scans_csv)
    invited = build(Invitation, invitation) if invitation is not None else None
    site_folder.create_site(root, settings, template=template, invitation=invited, profile=profile)


def make_phantom(
    out: Path,
    *,
    site: str,
    patients: int,
    seed: int,
    size: tuple[int, int, int],
    longitudinal_share: float = 1.0,
    scans_per_patient: tuple[int, int] = (2, 4),
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A synthetic hospital: scans, clinical.csv, scans.csv. Returns counts."""
    from fourdvq.data.phantom import make_cohort

    cohort = make_cohort(
        out,
        patients=patients,
        seed=seed,
        size=size,
        scans_per_patient=scans_per_patient,
        site=site,
        longitudinal_share=longitudinal_share,
        workers=workers,
        progress=progress,
    )
    scans = sum(len(p.visits) for p in cohort.patients)
    return {"folder": str(cohort.folder), "patients": len(cohort.patients), "scans": scans}


def preprocess(
    root: Path, *, workers: int = 1, progress: Progress | None = None, decision: str | None = None
) -> dict[str, Any]:
    """Prepare all scans; `decision="demo"` records that review decision for every prepared scan."""
    from fourdvq.data.review import decide
    from fourdvq_client.preparation import prepare_site
    from fourdvq_client.workspace import open_workspace

    workspace, config = open_workspace(root)
    summary = prepare_site(workspace, config, workers=workers, progress=progress)
    if decision is not None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        decide(workspace.prep, None, decision, reviewer="demo", time=now)  # type: ignore[arg-type]
    return summary.as_dict()


def prepared_summary(root: Path) -> dict[str, Any]:
    """Counts of approved patients and scans by split."""
    from fourdvq.data.datasets import open_prepared
    from fourdvq_client.workspace import open_workspace

    workspace, _ = open_workspace(root)
    cohort = open_prepared(workspace.prep)
    splits: dict[str, int] = {}
    for patient in cohort.patients:
        splits[patient.split] = splits.get(patient.split, 0) + 1
    return {
        "patients": len(cohort.patients),
        "scans": sum(len(p.scans) for p in cohort.patients),
        "longitudinal": sum(len(p.scans) > 1 for p in cohort.patients),
        "splits": splits,
        "cohort_sha256": cohort.cohort_sha256,
        "profile_sha256": cohort.profile_sha256,
    }


def client_app(root: Path, *, worker: str = "inline") -> Any:
    """The site's ClientApp, with its log in logs/client.jsonl."""
    from fourdvq_client.app import make_client_app
    from fourdvq_client.runtime import open_site
    from fourdvq_client.site_log import start_log

    site = open_site(root, worker=worker)
    start_log(site.workspace)
    return make_client_app(site)


def approve(root: Path, *, by: str) -> str:
    """Approve the plan that the coordinator sent last; returns its hash."""
    from fourdvq_client import approval
    from fourdvq_client.workspace import open_workspace

    workspace, _ = open_workspace(root)
    return approval.approve(workspace, approval.find_plan(workspace, approval.LATEST), by=by)


def report(root: Path, run: str = "") -> dict[str, str]:
    """Score the released model on the site's test patients and write the report; returns the paths of its editions."""
    from fourdvq_client.local_scores import join_parts, load_scores, score_locally
    from fourdvq_client.released import open_release
    from fourdvq_client.site_report import write_site_report
    from fourdvq_client.workspace import open_workspace

    workspace, config = open_workspace(root)
    release = open_release(workspace)
    if load_scores(workspace, release) is None and join_parts(workspace, release) is None:
        score_locally(workspace, config, release)
    return {name: str(path) for name, path in write_site_report(workspace, config, run=run).items()}


def generate(
    root: Path,
    *,
    patient: str | None = None,
    interval: float | None = 1.0,
    years: float | None = 3.0,
    times: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Generate scans of one patient (the first with two scans if none is named); returns the paths written."""
    from fourdvq_client.site_generation import Asked, generate_for
    from fourdvq_client.workspace import open_workspace

    workspace, config = open_workspace(root)
    asked = Asked(interval=interval, years=years, times=tuple(times) if times is not None else None)
    return dict(generate_for(workspace, config, patient=patient or "", asked=asked).as_dict())


def showcase(root: Path) -> dict[str, Any]:
    """A held-out patient's later scans generated from the first two, and two years beyond; the paths written."""
    from fourdvq_client import site_generation
    from fourdvq_client.workspace import open_workspace

    workspace, config = open_workspace(root)
    return dict(site_generation.showcase(workspace, config).as_dict())


def merge_prepared(out_root: Path, roots: Sequence[Path], site: str) -> None:
    """One site folder with the prepared scans of several: what pooled training is compared on."""
    from fourdvq_client.pooling import merge_sites

    merge_sites(out_root, roots, site)


logging.getLogger("flwr").setLevel(logging.WARNING)
